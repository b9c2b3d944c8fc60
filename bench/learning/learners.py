"""Three ways to pretrain on the same batches from the same weights: ours, straight, and the released modules.

The schedules are laid out over time, not over updates: whoever is faster makes more updates, and all end at the end of
their schedules when the time is over.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor, nn

from bench.baselines.released import importable
from bench.baselines.straight import straight_ema, straight_loss, straight_models, straight_optimizer
from bench.harness.compare import NotRun
from bench.harness.workload import rectangular
from ijepa_fast.config import Config, validate
from ijepa_fast.data.loader import Batch
from ijepa_fast.model import VisionTransformer
from ijepa_fast.optim import Schedule
from ijepa_fast.run import Run
from ijepa_fast.step import update

PUBLISHED_BATCH, PUBLISHED_EPOCHS, PUBLISHED_WARMUP = 2048, 300, 40


class Paced:
    """A schedule that is read at a share of its length, whatever the update."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.share = schedule, 0.0

    def __getattr__(self, name: str):
        return getattr(self.schedule, name)

    def _step(self) -> int:
        return min(int(self.share * self.schedule.total), self.schedule.total - 1)

    def lr(self, step: int) -> float:
        return self.schedule.lr(self._step())

    def weight_decay(self, step: int) -> float:
        return self.schedule.weight_decay(self._step())

    def momentum(self, step: int) -> float:
        return self.schedule.momentum(self._step())


def published(config: Config) -> Config:
    """`config` with the released recipe's masks and schedules, its learning rates scaled to the batch.

    By its square root, as for Adam (Malladi et al., arXiv 2205.10287); the warm-up is 40 of 300 parts of the run.
    Model, images, crops and batch stay as they are.
    """
    raw = config.model_dump(mode="json")
    batch = config.optim.global_batch_size
    scale = (batch / PUBLISHED_BATCH) ** 0.5
    raw["mask"] |= {"sampler": "reference", "collate": "truncate", "group": batch, "views": 1, "max_keep": None}
    raw["mask"] |= {"num_targets": 4, "target_scale": [0.15, 0.2], "context_scale": [0.85, 1.0]}
    raw["optim"] |= {"start_lr": 2e-4 * scale, "lr": 1e-3 * scale, "final_lr": 1e-6 * scale}
    raw["optim"] |= {"weight_decay": 0.04, "final_weight_decay": 0.4, "betas": [0.9, 0.999], "momentum": [0.996, 1.0]}
    raw["optim"] |= {"warmup_epochs": config.optim.epochs * PUBLISHED_WARMUP / PUBLISHED_EPOCHS, "loss": "smooth_l1"}
    return validate(raw, "the released recipe")


def recipe(provider: str, config: Config) -> Config:
    """`config` as this provider runs it: ours_fp8 with e4m3 products in all of the target encoder's blocks."""
    if provider == "ours_fp8":
        low = config.model.model_copy(update={"target_dtype": "fp8", "fp8_blocks": "all"})
        return config.model_copy(update={"model": low})
    return config if provider == "ours" else published(config)


class Modules(NamedTuple):
    encoder: nn.Module
    predictor: nn.Module
    target_encoder: nn.Module


class Ours:
    """`ijepa_fast.step.update`, as `ijepa_fast.train` calls it."""

    def __init__(self, run: Run, released: Path | None = None):
        self.pace = Paced(run.schedule)
        self.run = run._replace(schedule=self.pace)

    def step(self, step: int, batches: Iterator[Batch]) -> Tensor:
        return update(self.run, step, batches).loss

    def target_encoder(self) -> VisionTransformer:
        return self.run.state.target_encoder


class Straight:
    """Our rewriting of the released step in plain PyTorch, with its optimizer and EMA."""

    def __init__(self, run: Run, released: Path | None = None):
        self.run, self.pace = run, Paced(run.schedule)
        self.modules = self.build(run, released)
        self.modules.target_encoder.load_state_dict(self.modules.encoder.state_dict())
        self.modules.target_encoder.requires_grad_(False)
        self.optimizer = straight_optimizer(self.modules.encoder, self.modules.predictor, lr=0.0, weight_decay=0.0)

    def build(self, run: Run, released: Path | None) -> Modules:
        encoder, predictor = straight_models(run.state.encoder, run.state.predictor)
        return Modules(encoder, predictor, straight_models(run.state.encoder, run.state.predictor)[0])

    def loss(self, images: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        return straight_loss(*self.modules, images, contexts, targets, self.run.config.optim.loss)

    def step(self, step: int, batches: Iterator[Batch]) -> Tensor:
        total = torch.zeros((), device=self.run.world.device)
        parts = self.run.data.loader.micro_batches_per_step
        for _ in range(parts):
            batch = next(batches)
            masks = (rectangular(packed, len(batch.images)) for packed in batch.masks[:2])
            loss = self.loss(normalised(batch.images), *masks) / parts
            loss.backward()
            total += loss.detach()
        decayed, rest = self.optimizer.param_groups
        decayed["lr"] = rest["lr"] = self.pace.lr(step)
        decayed["weight_decay"] = self.pace.weight_decay(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        straight_ema(self.modules.target_encoder, self.modules.encoder, self.pace.momentum(step))
        return total

    def target_encoder(self) -> VisionTransformer:
        """Ours, with the weights of this one's, to be probed by the same code."""
        ours = self.run.state.target_encoder
        ours.load_state_dict(self.modules.target_encoder.state_dict())
        return ours


class Released(Straight):
    """The released code's own modules, in the order of the released loop."""

    def build(self, run: Run, released: Path | None) -> Modules:
        if released is None:
            raise NotRun("needs --released CHECKOUT")
        with importable(released):
            from src.masks.utils import apply_masks
            from src.models import vision_transformer
            from src.utils.tensors import repeat_interleave_batch
        self.apply_masks, self.repeat = apply_masks, repeat_interleave_batch
        ours, predictor = run.state.encoder, run.state.predictor

        def encoder() -> nn.Module:
            built = getattr(vision_transformer, run.config.model.name)(
                patch_size=ours.patch_size, img_size=[ours.image_size]
            )
            built.load_state_dict(ours.state_dict())
            return built.to(run.world.device)

        theirs = vision_transformer.vit_predictor(
            num_patches=ours.grid**2,
            embed_dim=ours.size.dim,
            predictor_embed_dim=predictor.size.dim,
            depth=predictor.size.depth,
            num_heads=predictor.size.num_heads,
        )
        theirs.load_state_dict(predictor.state_dict())
        return Modules(encoder(), theirs.to(run.world.device), encoder())

    def loss(self, images: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        encoder, predictor, target_encoder = self.modules
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            with torch.no_grad():
                h = target_encoder(images)
                h = F.layer_norm(h, (h.size(-1),))
                h = self.repeat(self.apply_masks(h, targets), len(h), repeat=len(contexts))
            z = predictor(encoder(images, contexts), contexts, targets)
            return F.smooth_l1_loss(z, h)


def normalised(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` as float `[B, 3, H, W]`, as from the released loader."""
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


LEARNERS = {"ours": Ours, "ours_fp8": Ours, "straight": Straight, "released": Released}
