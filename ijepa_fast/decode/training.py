"""Training the decoder on what a frozen model predicts, over the batches and masks that pretraining would see."""
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ijepa_kernels import ema_update_
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijepa_fast.config import DataConfig
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.decode.blocks import predicted_blocks
from ijepa_fast.decode.model import Decoder, DecoderSettings, save, to_float
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.view.open import MASKS

if TYPE_CHECKING:
    from ijepa_fast.weights import Model

_MOMENTUM = 0.995  # of the average of the decoder's weights, which is what is kept
_WARMUP = 100  # steps
_SAVE_EVERY = 100  # steps


def train(
    model: "Model", data: DataConfig, out: Path, *, steps: int, batch: int, lr: float, seed: int, weights: str,
    device: torch.device,
) -> list[float]:  # fmt: skip
    """Train a decoder for `model` for `steps` updates of `batch` images, into `out`; returns the loss of each.

    Every image gives as many blocks as it has targets. AdamW, a short warm-up, then a cosine to zero; what is saved,
    also every 100 steps, is the moving average of the weights. `weights` is written into the file.
    """
    torch.manual_seed(seed)
    settings = DecoderSettings(model.encoder.size.dim, model.image_size, model.patch_size)
    decoder = Decoder(settings).to(device)
    average = copy.deepcopy(decoder).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / _WARMUP, total_iters=_WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator(device).manual_seed(seed)
    masks = MultiBlockMasks(MASKS, model.encoder.grid, seed, batch)
    losses: list[float] = []
    with build_pipeline(data, masks, micro_batch=batch, device=device) as pipeline, _bar() as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"))
        for done, given in enumerate(pipeline.loader.batches(0, steps), start=1):
            blocks = predicted_blocks(model, given.images, given.masks, device)
            loss = decoder.loss(to_float(blocks.pixels), blocks.features, generator)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            cosine.step()
            # A short memory at first, or the average would be of the noise it began with.
            ema_update_(list(average.parameters()), list(decoder.parameters()), min(_MOMENTUM, done / (done + 10)))
            losses.append(loss.item())
            recent = losses[-50:]
            bar.update(task, completed=done, loss=sum(recent) / len(recent))
            if done % _SAVE_EVERY == 0 or done == steps:
                save(average, out, {"weights": weights, "steps": str(done), "seed": str(seed)})
                if not sys.stderr.isatty():
                    print(f"step {done} of {steps}, loss {sum(recent) / len(recent):.4f}", file=sys.stderr)
    return losses


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
