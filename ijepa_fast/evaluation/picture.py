"""One picture of an evaluation: accuracy against labels used, the confusion matrix, the worst-classified images."""
import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.data.decoder import Decoder
from ijepa_fast.data.reader import Reader
from ijepa_fast.evaluation.dataset import DataSet
from ijepa_fast.evaluation.features import decode
from ijepa_fast.evaluation.results import Row
from ijepa_fast.evaluation.suite import LAST, LAST_FOUR

COLUMNS, ROWS, PIXELS = 6, 4, 128  # of the contact sheet
NAMED = 30  # classes whose names fit beside a matrix
_BLUE, _ORANGE = "#1f4e8c", "#c2571a"


def draw(file: Path, rows: list[Row], data: DataSet, probabilities: Tensor, decoder: Decoder, *, title: str) -> None:
    """Write a PNG of `rows` (lowshot and logistic among them) and of logistic's `probabilities` of val `[m, classes]`.

    An image is the worse classified the more probable a wrong class is to the classifier.
    """
    # Imported here: matplotlib takes a second that other evaluations need not wait for.
    from matplotlib.figure import Figure

    labels = torch.from_numpy(data.val.labels)
    figure: Any = Figure(figsize=(16, 10), layout="constrained", dpi=110)
    figure.suptitle(title, parse_math=False)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35)).flat
    curve, matrix = left.subplots(2, 1, height_ratios=(1, 1.4))
    _draw_curve(curve, rows, len(data.train.ids), len(data.class_names))
    _draw_confusion(matrix, probabilities.argmax(1), labels, data.class_names)
    _draw_worst(right, probabilities, labels, data, decoder)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, file)


def _draw_curve(axis, rows: list[Row], everything: int, classes: int) -> None:
    for name, color in ((LAST, _BLUE), (LAST_FOUR, _ORANGE)):
        points = [(row.images, row) for row in rows if (row.probe, row.features) == ("lowshot", name) and row.interval]
        points += [(everything, row) for row in rows if (row.probe, row.features) == ("logistic", name)]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        x = [count for count, _ in points]
        values = np.array([[row.value, row.low or row.value, row.high or row.value] for _, row in points]) * 100
        below_above = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        axis.errorbar(x, values[:, 0], below_above, fmt="o-", color=color, capsize=3, markersize=4, label=name)
    axis.axhline(100 / classes, color="grey", linewidth=0.8, linestyle="--", label="chance")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("labels used")
    axis.set_ylabel("accuracy, %")
    axis.set_title("logistic regression on frozen features, 95 % intervals")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_confusion(axis, predicted: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> None:
    n = len(class_names)
    counts = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).double()
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_title("confusion, % of each class (logistic, last layer)")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if n > NAMED:
        return
    names = [name[:14] for name in class_names]
    axis.set_xticks(range(n), names, rotation=60, ha="right", fontsize=8, parse_math=False)
    axis.set_yticks(range(n), names, fontsize=8, parse_math=False)
    if n <= 15:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "white" if share > 55 else "black"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)


def _draw_worst(figure, probabilities: Tensor, labels: Tensor, data: DataSet, decoder: Decoder) -> None:
    predicted = probabilities.argmax(1)
    wrong = torch.where(predicted == labels, -1.0, probabilities.amax(1)).argsort(descending=True, stable=True)
    worst = [int(row) for row in wrong[: COLUMNS * ROWS] if predicted[row] != labels[row]]
    figure.suptitle(f"{len(worst)} worst-classified of {int((predicted != labels).sum())} wrong: true, then predicted")
    axes = list(figure.subplots(ROWS, COLUMNS).flat)
    with contextlib.closing(Reader(data.val.index, 1)) as reader:
        ids = data.val.ids[worst]
        pixels = decode(data.val, decoder, reader.read(ids), ids, PIXELS, None).cpu().numpy()
    for axis in axes:
        axis.axis("off")
    for axis, row, image in zip(axes, worst, pixels, strict=False):
        axis.imshow(image)
        true, guess = (data.class_names[int(which[row])][:14] for which in (labels, predicted))
        axis.set_title(f"{true}\n{guess} {float(probabilities[row].max()):.0%}", fontsize=8, parse_math=False)
