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

GRID = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
HELD_OUT = 0.2
_STEPS, _TOLERANCE = 1000, 1e-5


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


def fit_logistic(features: Tensor, labels: Tensor, *, C: float = 0.1, classes: int | None = None) -> Logistic:
    """Fit features `[n, D]` to labels int64 `[n]` in 0 ... classes - 1; fp64 on a CPU, fp32 on a GPU.

    Raises UserError where all labels are the same.
    """
    return _Problem(features, labels, classes).solve(C)


def choose_logistic(
    features: Tensor, labels: Tensor, *, grid: Sequence[float] = GRID, classes: int | None = None, seed: int = 0
) -> Logistic:
    """The fit on all of `features`, with the C of `grid` that does best on a held-out fifth of them.

    The fifth is drawn from each class, by `seed`; of equally good ones the smallest C is taken. Where a fifth cannot be
    held out, or there is nothing to choose from, it is the middle of the grid.
    """
    fit, held = (part.to(labels.device) for part in stratified(labels, HELD_OUT, seed))
    best, best_right = grid[len(grid) // 2], -1
    if len(grid) > 1 and len(held) and len(labels[fit].unique()) > 1:
        problem = _Problem(features[fit], labels[fit], classes)
        for C in sorted(grid):  # each solution starts from the last one
            right = int((problem.solve(C).predict(features[held]) == labels[held]).sum())
            if right > best_right:
                best, best_right = C, right
    return fit_logistic(features, labels, C=best, classes=classes)


class _Problem:
    """Standardised features in the coordinates of their principal components, and labels: solved for any C.

    The penalty does not change under a rotation. In these coordinates the Hessian where the weights are zero, v / K + p
    for a component of variance v, K classes and a penalty p, is a diagonal; divided by its root, a direction is as
    steep as any other, and L-BFGS, which needs a thousand steps on correlated features, some dozens.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int | None):
        if len(labels.unique()) < 2:
            raise UserError("all training images are of one class; a classifier needs at least two")
        x = features.to(torch.float64 if features.device.type == "cpu" else torch.float32)
        self.mean, scale = x.mean(0), x.std(0, correction=0)
        # What never varies must not be blown up.
        self.scale = torch.where(scale > 1e-6 * self.mean.abs() + 1e-12, scale, 1)
        x = (x - self.mean) / self.scale
        self.variances, self.directions = torch.linalg.eigh(x.T @ x / len(x))
        self.x, self.labels = x @ self.directions, labels
        self.classes = int(labels.max()) + 1 if classes is None else classes
        self._weight = self.x.new_zeros(self.classes, x.shape[1])  # the last solution, where the next one begins
        self._bias = self.x.new_zeros(self.classes)
        self.steps = 0  # that it took

    def solve(self, C: float) -> Logistic:
        penalty = 1 / (C * len(self.x))
        root = (self.variances.clamp_min(0) / self.classes + penalty).sqrt()
        scaled = (self._weight * root).requires_grad_()
        bias = self._bias.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=_STEPS,
            history_size=20,
            tolerance_grad=_TOLERANCE,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            weight = scaled / root
            loss = F.cross_entropy(F.linear(self.x, weight, bias), self.labels)
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.inference_mode(False), torch.enable_grad():
            solver.step(closure)
        self.steps = solver.state[scaled]["n_iter"]
        self._weight, self._bias = scaled.detach() / root, bias.detach()
        return Logistic(self.mean, self.scale, self._weight @ self.directions.T, self._bias, C)
