"""AdamW's parameter groups and the schedules of learning rate, weight decay and momentum, as functions of the step."""
import math
from dataclasses import dataclass

import torch
from ijepa_kernels import AdamWEMA, Quantized
from torch import Tensor, nn

from ijepa_fast.config import OptimConfig
from ijepa_fast.model import Predictor, VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The released recipe's three schedules; `step` is the index of a global update: 0, 1, 2, ...

    Learning rate (linear warm-up, then half a cosine) and weight decay (half a cosine) count updates from 1: the first
    one is already a step into the schedule. The momentum of the EMA, linear, counts from 0. `schedule_stretch` >= 1
    lays them out for a run that many times as long, so that this one stops before their end.
    """

    steps_per_epoch: int
    epochs: int
    warmup_epochs: float
    start_lr: float
    peak_lr: float
    final_lr: float
    start_weight_decay: float
    final_weight_decay: float
    start_momentum: float
    final_momentum: float
    schedule_stretch: float = 1.0

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1 or self.epochs < 1:
            raise ValueError(f"a schedule needs at least one step, got {self.epochs} epochs of {self.steps_per_epoch}")
        if self.schedule_stretch < 1:
            raise ValueError(f"schedule_stretch must be at least 1, got {self.schedule_stretch}")

    @property
    def total(self) -> int:
        """Updates from one end of the schedules to the other."""
        return int(self.schedule_stretch * self.epochs * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        warmup = int(self.warmup_epochs * self.steps_per_epoch)
        done = step + 1
        if done < warmup:
            return self.start_lr + done / warmup * (self.peak_lr - self.start_lr)
        progress = (done - warmup) / max(1, self.total - warmup)
        return max(self.final_lr, _half_cosine(self.peak_lr, self.final_lr, progress))

    def weight_decay(self, step: int) -> float:
        value = _half_cosine(self.start_weight_decay, self.final_weight_decay, (step + 1) / self.total)
        bound = max if self.final_weight_decay <= self.start_weight_decay else min
        return bound(self.final_weight_decay, value)

    def momentum(self, step: int) -> float:
        # Over the unrounded length, as released: `total` is cut down to an integer.
        length = self.steps_per_epoch * self.epochs * self.schedule_stretch
        return self.start_momentum + step * (self.final_momentum - self.start_momentum) / length


def build_schedule(config: OptimConfig, steps_per_pass: int) -> Schedule:
    """The schedules of a config; `steps_per_pass`: updates in one pass over the images."""
    return Schedule(
        steps_per_epoch=config.epoch_length or steps_per_pass,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        start_lr=config.start_lr,
        peak_lr=config.lr,
        final_lr=config.final_lr,
        start_weight_decay=config.weight_decay,
        final_weight_decay=config.final_weight_decay,
        start_momentum=config.momentum[0],
        final_momentum=config.momentum[1],
        schedule_stretch=config.schedule_stretch,
    )


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def param_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict]:
    """Trained parameters in the released order: encoder matrices, predictor matrices, encoder 1-D, predictor 1-D.

    `decay` says whether `set_rates` writes the schedule's weight decay into the group. Matrices are decayed, the patch
    projection and the mask token among them; biases and norms are not. Frozen positions are left out.
    """
    groups = []
    for decay in (True, False):
        for model in (encoder, predictor):
            chosen = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and (parameter.ndim != 1 and "bias" not in name) == decay
            ]
            groups.append({"params": chosen, "decay": decay, "weight_decay": 0.0})
    return groups


def build_optimizer(
    encoder: VisionTransformer,
    predictor: Predictor,
    target_encoder: VisionTransformer | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamWEMA:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `param_groups`, whose step also moves the target encoder.

    It writes the copies that the models multiply with as well (see `keep_copies`): one pass over all state. Sharded
    parameters are DTensors, whose dispatch costs the host about 20 us a parameter and update on top (measured with
    torch 2.13 on one core, 300 updates of 200 parameters; it did not grow, nor did memory): 15 ms for the giant.
    Learning rate and weight decay are 0 until `set_rates` sets them, before every update.
    """
    targets = {}
    if target_encoder is not None:
        pairs = zip(encoder.parameters(), target_encoder.parameters(), strict=True)
        targets = {source: target for source, target in pairs if source.requires_grad}  # not the frozen positions
    kept = [one for model in (encoder, predictor, target_encoder) if model is not None for one in model.kept_copies()]
    copies: dict[Tensor, Tensor | Quantized] = {}
    for one in kept:
        copies.update(zip(one.weights, one.copies, strict=True))
    groups = param_groups(encoder, predictor)
    return AdamWEMA(groups, targets=targets, copies=copies, lr=0.0, betas=betas, eps=eps, weight_decay=0.0)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> tuple[float, float]:
    """Put the learning rate and weight decay of update `step` into the optimizer's groups, and return the two."""
    lr, weight_decay = schedule.lr(step), schedule.weight_decay(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay
    return lr, weight_decay
