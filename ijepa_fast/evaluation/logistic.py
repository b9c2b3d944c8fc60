"""Exact L2-regularised logistic regression on frozen features, by L-BFGS on whatever device the features are on.

The fast default of all linear probes: a convex problem has one answer, whatever the learning rate. It is the problem of
scikit-learn's `LogisticRegression`: least C * sum of the cross-entropies + |weight|^2 / 2, the bias left out of the
penalty, here on features standardised by the training images' mean and standard deviation.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.split import stratified

GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
HELD_OUT = 0.2
_ITERATIONS, _TOLERANCE = 1000, 1e-5


class Logistic(NamedTuple):
    """A fitted classifier of standardised features; `C` as in scikit-learn, the inverse of the penalty."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weight: Tensor  # [classes, D]
    bias: Tensor  # [classes]
    C: float

    def logits(self, features: Tensor) -> Tensor:
        """fp32 or fp64 `[m, classes]`, whatever the fit was made in, of features `[m, D]` that are not standardised."""
        return F.linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """int64 `[m]`."""
        return self.logits(features).argmax(1)


def fit_logistic(
    features: Tensor, labels: Tensor, *, C: float = 0.1, classes: int | None = None, start: Logistic | None = None
) -> Logistic:
    """Fit features `[n, D]` to labels int64 `[n]` in 0 ... classes - 1; fp64 on a CPU, fp32 on a GPU.

    `start` is where to begin (a fit with another C). Raises UserError where all labels are the same.
    """
    if len(labels.unique()) < 2:
        raise UserError("all training images are of one class; a classifier needs at least two")
    dtype = torch.float64 if features.device.type == "cpu" else torch.float32
    x = features.to(dtype)
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * mean.abs() + 1e-12, scale, 1)  # what never varies must not be blown up
    x = (x - mean) / scale
    classes = int(labels.max()) + 1 if classes is None else classes
    if start is None:
        weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    _minimise(x, labels, weight.requires_grad_(), bias.requires_grad_(), 1 / (C * len(x)))
    return Logistic(mean, scale, weight.detach(), bias.detach(), C)


def _minimise(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    """Of the mean cross-entropy + penalty * |weight|^2 / 2, in place."""
    solver = torch.optim.LBFGS(
        [weight, bias], lr=1, max_iter=_ITERATIONS, history_size=10, tolerance_grad=_TOLERANCE, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)


def choose_logistic(
    features: Tensor, labels: Tensor, *, grid: Sequence[float] = GRID, classes: int | None = None, seed: int = 0
) -> Logistic:
    """The fit on all of `features`, with the C of `grid` that does best on a held-out fifth of them.

    The fifth is drawn from each class, by `seed`; of equally good ones the smallest C is taken. Where a class has but
    one image, or there is nothing to choose from, it is the middle of the grid.
    """
    fit, held = (part.to(labels.device) for part in stratified(labels, HELD_OUT, seed))
    best, best_right, last = grid[len(grid) // 2], -1, None
    if len(grid) > 1 and len(held) and len(labels[fit].unique()) > 1:
        for C in sorted(grid):  # from a strong penalty to a weak one: each fit begins where the last one ended
            last = fit_logistic(features[fit], labels[fit], C=C, classes=classes, start=last)
            right = int((last.predict(features[held]) == labels[held]).sum())
            if right > best_right:
                best, best_right = C, right
    return fit_logistic(features, labels, C=best, classes=classes)
