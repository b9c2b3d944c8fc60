"""The linear probe by the paper's protocol (A.2), on features that were computed before.

LARS or SGD for 50 epochs, the learning rate divided by 10 after 15, 30 and 45; a grid of learning rates and weight
decays, each with and without a batch norm before the head. All heads of the grid are one stacked tensor, trained in one
pass over the data. The best on a held-out part of train is then trained again on all of train; the images that are
evaluated have no say. `logistic` finds the optimum that this looks for in seconds; this is for comparison with papers.
"""
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.split import stratified

EPOCHS, STEPS, DROP = 50, (15, 30, 45), 0.1
MOMENTUM, TRUST = 0.9, 0.001
# For about 64 updates an epoch, whatever the set: not scaled with the batch. LARS at 6.4 is the usual 0.1 for a batch
# of 256, scaled to the 16384 that ImageNet is trained with; small sets of poor features want more.
RATES = {"lars": (1.6, 6.4, 25.6, 102.4), "sgd": (0.001, 0.01, 0.1, 1.0)}
DECAYS = (0.0, 5e-4)
HELD_OUT = 0.2
_NORM_EPS = 1e-5


class Setting(NamedTuple):
    """One head of the grid."""

    lr: float
    weight_decay: float
    batch_norm: bool

    def __str__(self) -> str:
        return f"lr {self.lr:g}, decay {self.weight_decay:g}{', batch norm' * self.batch_norm}"


class Heads(NamedTuple):
    """Stacked linear heads on features, normalised for those whose `batch_norm` is set."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weight: Tensor  # [heads, classes, D]
    bias: Tensor  # [heads, classes]
    settings: tuple[Setting, ...]

    def logits(self, features: Tensor) -> Tensor:
        """fp32 `[m, heads, classes]`."""
        plain = features.float()
        return _logits(plain, (plain - self.mean) / self.scale, self.weight, self.bias, _normed(self.settings))

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Of each head, fp64 `[heads]`."""
        right = torch.zeros(len(self.settings), dtype=torch.float64, device=features.device)
        for x, y in zip(features.split(4096), labels.split(4096), strict=True):
            right += (self.logits(x).argmax(2) == y[:, None]).sum(0)
        return right / len(labels)


def lars_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    *,
    momentum: float = MOMENTUM,
    trust: float = TRUST,
    adapt: bool = True,
) -> None:
    """One LARS update, in place, of tensors `[heads, ...]`: each head is a layer with a norm of its own.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), algorithm 1:
    v <- momentum * v + lr * trust * |w| / (|g| + decay * |w|) * (g + decay * w), and w <- w - v. `lr` and
    `weight_decay` are `[heads]`. As usual, biases (tensors of two dimensions) are neither scaled nor decayed, and a
    weight or gradient of nothing but zeros has scale 1. `adapt=False` scales nothing: SGD with momentum.
    """
    for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
        shape = (-1, *[1] * (weight.ndim - 1))
        rate, decay = lr.view(shape), weight_decay.view(shape)
        if weight.ndim > 2:
            direction = gradient + decay * weight
            if adapt:
                w = weight.flatten(1).norm(dim=1).view(shape)
                g = gradient.flatten(1).norm(dim=1).view(shape)
                rate = rate * torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), 1.0)
        else:
            direction = gradient
        velocity.mul_(momentum).add_(rate * direction)
        weight.sub_(velocity)


def train_heads(
    views: Sequence[Tensor],
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    classes: int,
    optimizer: str = "lars",
    epochs: int = EPOCHS,
    batch: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda epochs: None,
) -> Heads:
    """Train one head a setting on features `[n, D]`, all in one pass an epoch, and in the same order of images.

    `views`: features of the same images in other crops, one after the other an epoch; one is enough. `batch`: by
    default a 64th of the images, from 32 to the paper's 16384 (which are a 78th of ImageNet). The batch norm has no
    parameters of its own, which the head behind it makes superfluous, and the statistics of all of train.
    """
    n, dim = views[0].shape
    batch = batch or min(max(2 ** round(np.log2(max(n / 64, 1))), 32), 16384, n)
    device = views[0].device
    mean = torch.stack([view.float().mean(0) for view in views]).mean(0)
    square = torch.stack([(view.float() - mean).square().mean(0) for view in views]).mean(0)
    scale = (square + _NORM_EPS).sqrt()
    generator = torch.Generator().manual_seed(seed)
    weight = (0.01 * torch.randn(1, classes, dim, generator=generator)).repeat(len(settings), 1, 1).to(device)
    bias = torch.zeros(len(settings), classes, device=device)
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    lr = torch.tensor([setting.lr for setting in settings], device=device)
    decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
    normed = _normed(settings)
    drops = [max(round(step * epochs / EPOCHS), 1) for step in STEPS]
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator)
        features, rate = views[epoch % len(views)], lr * DROP ** sum(epoch >= drop for drop in drops)
        for rows in order[: n - n % batch].split(batch):
            x, y = features[rows.to(device)].float(), labels[rows.to(device)]
            gradients = _gradients(x, (x - mean) / scale, y, weight, bias, normed)
            lars_([weight, bias], gradients, velocities, rate, decay, adapt=optimizer == "lars")
        tick(1)
    return Heads(mean, scale, weight, bias, tuple(settings))


def choose_heads(
    views: Sequence[Tensor],
    labels: Tensor,
    *,
    classes: int,
    optimizer: str = "lars",
    rates: Sequence[float] | None = None,
    decays: Sequence[float] = DECAYS,
    epochs: int = EPOCHS,
    batch: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda epochs: None,
) -> Heads:
    """One head: that of the grid which does best on a held-out fifth of train, trained again on all of it.

    Where a fifth cannot be held out, the first of the grid. A head that diverged is never chosen.
    """
    settings = [Setting(*one) for one in itertools.product(rates or RATES[optimizer], decays, (True, False))]
    fit, held = (part.to(labels.device) for part in stratified(labels, HELD_OUT, seed))
    best = settings[0]
    how: dict[str, Any] = {"classes": classes, "optimizer": optimizer, "epochs": epochs, "seed": seed, "tick": tick}
    if len(held) and len(settings) > 1:
        heads = train_heads([view[fit] for view in views], labels[fit], settings, batch=batch, **how)
        finite = heads.weight.isfinite().flatten(1).all(1)
        if not finite.any():
            raise UserError(f"every head of the linear probe diverged; lower its learning rates than {rates}")
        accuracy = torch.where(finite, heads.accuracy(views[0][held], labels[held]), -1.0)
        best = settings[int(accuracy.argmax())]
    return train_heads(views, labels, [best], batch=batch, **how)


def _normed(settings: Sequence[Setting]) -> list[bool]:
    return [setting.batch_norm for setting in settings]


def _logits(plain: Tensor, normal: Tensor, weight: Tensor, bias: Tensor, normed: list[bool]) -> Tensor:
    """`[B, heads, classes]`: one matrix product for the heads with a batch norm, one for the others."""
    out = plain.new_empty(len(plain), *bias.shape)
    for x, flag in ((normal, True), (plain, False)):
        which = [head for head, has in enumerate(normed) if has == flag]
        if which:
            out[:, which] = F.linear(x, weight[which].flatten(0, 1)).unflatten(1, (len(which), -1)) + bias[which]
    return out


def _gradients(
    plain: Tensor, normal: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, normed: list[bool]
) -> list[Tensor]:
    """Of the mean cross-entropy of each head, which no other head has a part in."""
    logits = _logits(plain, normal, weight, bias, normed)
    error = logits.softmax(2)
    error[torch.arange(len(labels)), :, labels] -= 1
    error /= len(labels)  # [B, heads, classes]
    gradient = torch.empty_like(weight)
    for x, flag in ((normal, True), (plain, False)):
        which = [head for head, has in enumerate(normed) if has == flag]
        if which:
            gradient[which] = (error[:, which].flatten(1).T @ x).unflatten(0, (len(which), -1))
    return [gradient, error.sum(0)]
