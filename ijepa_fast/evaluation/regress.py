"""Numbers from frozen features: counts and distances as in the paper's CLEVR tasks, or any column of a CSV file.

A column is predicted as classes, by logistic regression (as VTAB, arXiv 1910.04867, and the paper do it), or as values,
by ridge regression.
"""
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.dataset import DataSet
from ijepa_fast.evaluation.logistic import choose_logistic
from ijepa_fast.evaluation.results import Row, accuracy_row, bootstrap
from ijepa_fast.evaluation.split import stratified
from ijepa_fast.evaluation.suite import Task

MOST_CLASSES = 20  # whole numbers of at most so many kinds are classes, by default
PENALTIES = tuple(10.0**power for power in range(-6, 3))
HELD_OUT = 0.2

Kind = Literal["auto", "classes", "values"]


class Ridge(NamedTuple):
    """Predicts `bias` plus the standardised features times `weight` `[D]`."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def predict(self, features: Tensor) -> Tensor:
        """fp64 `[m]`."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias


def fit_ridge(features: Tensor, values: Tensor, penalties: Sequence[float]) -> list[Ridge]:
    """For each penalty the least mean squared error + penalty * |weight|^2, of standardised features `[n, D]`, fp64.

    scikit-learn's `Ridge` with alpha = n * penalty. One eigendecomposition serves all penalties.
    """
    x, y = features.double(), values.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * mean.abs() + 1e-12, scale, 1)
    x, bias = (x - mean) / scale, y.mean()
    variances, directions = torch.linalg.eigh(x.T @ x / len(x))
    along = directions.T @ (x.T @ (y - bias)) / len(x)
    return [
        Ridge(mean, scale, directions @ (along / (variances.clamp_min(0) + penalty)), bias, penalty)
        for penalty in penalties
    ]


def choose_ridge(features: Tensor, values: Tensor, seed: int = 0) -> Ridge:
    """The fit on everything with the penalty that does best on a held-out fifth."""
    alike = torch.zeros(len(values), dtype=torch.int64)
    fit, held = (part.to(values.device) for part in stratified(alike, HELD_OUT, seed))
    errors = [
        float((one.predict(features[held]) - values[held]).square().mean())
        for one in fit_ridge(features[fit], values[fit], PENALTIES)
    ]
    return fit_ridge(features, values, [PENALTIES[int(np.argmin(errors))]])[0]


def r2(predicted: Tensor, values: Tensor) -> float:
    """1 - squared error / squared deviation from the mean; 0 is what the mean itself reaches."""
    return float(1 - (predicted - values).square().sum() / (values - values.mean()).square().sum().clamp_min(1e-30))


def regress_rows(task: Task, data: DataSet, columns: Sequence[str], kind: Kind = "auto") -> list[Row]:
    """Rows of each of `columns` of the CSV file that the labels of `data` came from.

    "auto": whole numbers of at most 20 kinds are classes, all else is values. Raises UserError for columns that are
    not there or not of numbers, and for one that is the same everywhere.
    """
    rows = []
    for column in columns:
        train, val = _column(data, column)
        kinds = np.unique(train)
        whole = bool((train == np.rint(train)).all()) and len(kinds) <= MOST_CLASSES
        if kind == "classes" or (kind == "auto" and whole):
            rows += _as_classes(task, column, train, val)
        else:
            rows += _as_values(task, column, train, val)
    return rows


def _column(data: DataSet, column: str) -> tuple[np.ndarray, np.ndarray]:
    if data.table is None or data.rows is None:
        raise UserError("regress reads numbers from a CSV file: name that with --labels, its columns with --columns")
    values = data.table.numbers(column)
    train, val = (values[rows] for rows in data.rows)
    if len(np.unique(train)) < 2:
        raise UserError(f"{data.table.file}: column {column} is {train[0]:g} for all training images")
    return train, val


def _as_classes(task: Task, column: str, train: np.ndarray, val: np.ndarray) -> list[Row]:
    kinds = np.unique(np.concatenate([train, val]))
    labels, val_labels = (torch.from_numpy(np.searchsorted(kinds, part)).to(task.device) for part in (train, val))
    rows = []
    for name, x, x_val, _ in task.representations():
        fit = choose_logistic(x, labels, classes=len(kinds), seed=task.seed)
        setting = f"{len(kinds)} classes, C {fit.C:g}"
        rows.append(accuracy_row(f"regress {column}", name, fit.predict(x_val), val_labels, setting))
    return rows


def _as_values(task: Task, column: str, train: np.ndarray, val: np.ndarray) -> list[Row]:
    values, wanted = torch.from_numpy(train).to(task.device), torch.from_numpy(val)
    rows = []
    for name, x, x_val, _ in task.representations():
        fit = choose_ridge(x, values, task.seed)
        predicted = fit.predict(x_val).cpu()
        error = (predicted - wanted).abs()

        def r2_of(rows: Tensor, predicted: Tensor = predicted) -> float:
            return r2(predicted[rows], wanted[rows])

        def error_of(rows: Tensor, error: Tensor = error) -> float:
            return float(error[rows].mean())

        for metric, statistic in (("R2", r2_of), ("mean absolute error", error_of)):
            everything = statistic(torch.arange(len(wanted)))
            interval = bootstrap(statistic, len(wanted))
            setting = f"ridge, penalty {fit.penalty:g}"
            probe = f"regress {column}"
            rows.append(Row(probe, name, metric, everything, *interval, "bootstrap", setting, len(wanted)))
    return rows
