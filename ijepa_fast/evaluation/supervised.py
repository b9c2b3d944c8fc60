"""Training on labelled images, for the probes that need more than features: attentive and fine-tuning.

Every epoch sees other random crops (of the pretraining's scale), half of them flipped. The learning rate warms up and
falls along a cosine. Under torchrun every rank takes its share of each batch, and gradients are summed.
"""
import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ijepa_fast.data.decoder import Decoder
from ijepa_fast.data.reader import Reader
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.dataset import DataSet, Labelled
from ijepa_fast.evaluation.features import decode, one_ahead, progress


class Recipe(NamedTuple):
    """How a probe is trained; `batch` of all ranks together."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    smoothing: float


class Images(NamedTuple):
    """What pixels are read with, and by whom."""

    decoder: Decoder
    world: World
    size: int
    threads: int
    seed: int
    console: Console | None


def train(
    net: nn.Module, groups: Sequence[dict[str, Any]], part: Labelled, recipe: Recipe, images: Images, name: str
) -> None:
    """Train `net` (uint8 images `[b, S, S, 3]` to logits `[b, classes]`) by AdamW, in place.

    `groups`: AdamW's, each with the `lr_scale` of its learning rate. All ranks begin with the same weights. Raises
    UserError on all ranks where the loss is not finite.
    """
    world, n = images.world, len(part.ids)
    batch = min(recipe.batch, n)
    updates = n // batch
    total, warmup = recipe.epochs * updates, recipe.warmup_epochs * updates
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=recipe.lr)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    net.train()
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(part.index, images.threads))
        advance = stack.enter_context(progress(images.console, name, total))
        plan = []
        for epoch in range(recipe.epochs):
            order = np.random.default_rng((images.seed, epoch)).permutation(n)
            rows = [order[first : first + batch] for first in range(0, updates * batch, batch)]
            plan += [(one[world.rank :: world.size], epoch) for one in rows]
        ahead = stack.enter_context(one_ahead(plan, lambda item: _read(part, reader, images, *item)))
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * group["lr_scale"] * _schedule(step, total, warmup)
            with world.raise_on_all_ranks():
                pixels, labels = next(ahead)
            optimizer.zero_grad(set_to_none=False)
            if len(labels):
                logits = net(pixels.to(world.device))
                loss = F.cross_entropy(
                    logits.float(), labels.to(world.device), label_smoothing=recipe.smoothing, reduction="sum"
                )
                (loss / batch).backward()
            _sum_gradients(parameters, world)
            optimizer.step()
            advance(1)
    finite = all(bool(p.isfinite().all()) for p in parameters)
    with world.raise_on_all_ranks():
        if not finite:
            raise UserError(f"{name} diverged at a learning rate of {recipe.lr:g}; give a lower one with --lr")


@torch.no_grad()
def predict(net: nn.Module, part: Labelled, images: Images, batch: int, name: str) -> Tensor:
    """Logits of the central crops, fp32 `[n, classes]` on the CPU, in the order of `part`; on every rank."""
    world, n = images.world, len(part.ids)
    net.eval()
    share = -(-n // world.size)
    rows = np.resize(np.arange(n), share * world.size)[world.rank :: world.size]  # equal shares: the last are repeated
    logits = []
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(part.index, images.threads))
        advance = stack.enter_context(progress(images.console, f"{name}: val", n))
        some = [(rows[first : first + batch], None) for first in range(0, share, batch)]
        ahead = stack.enter_context(one_ahead(some, lambda item: _read(part, reader, images, *item)))
        for _ in some:
            with world.raise_on_all_ranks():
                pixels, _labels = next(ahead)
            logits.append(net(pixels.to(world.device)).float())
            advance(len(pixels) * world.size)
    every = world.gather(torch.cat(logits)).view(world.size, share, -1)
    return every.transpose(0, 1).flatten(0, 1)[:n].cpu()


def default_batch(data: DataSet, most: int) -> int:
    """About 16 updates an epoch for a small set, and at most `most` images."""
    return int(min(max(2 ** round(math.log2(max(len(data.train.ids) / 16, 1))), 8), most))


def _read(part: Labelled, reader: Reader, images: Images, rows: np.ndarray, epoch: int | None) -> tuple[Tensor, Tensor]:
    ids = part.ids[rows]
    pixels = decode(part, images.decoder, reader.read(ids), ids, images.size, epoch, images.seed)
    return pixels, torch.from_numpy(part.labels[rows])


def _schedule(step: int, total: int, warmup: int) -> float:
    """The share of the learning rate: linear up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _sum_gradients(parameters: Sequence[Tensor], world: World) -> None:
    if world.size > 1:
        for parameter in parameters:
            if parameter.grad is None:  # a rank without images
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
