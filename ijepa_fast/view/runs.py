"""Several runs in one picture: what the loss says beside what the probes say.

`python -m ijepa_fast.view runs runs/a runs/b`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.errors import UserError
from ijepa_fast.metrics import read_log
from ijepa_fast.view.curves import smoothed

COLOURS = ("#1f4e8c", "#c2571a", "#3d8b57", "#8a4fa3", "#a08a1c", "#4f9aa3")
# Columns of the log's probe rows, each with the scale of what is drawn and the panel's title.
PANELS = (
    ("rankme", 1, "RankMe"),
    ("relative_std", 1, "spread between images, relative"),
    ("knn", 100, "k-NN accuracy, %"),
    ("linear", 100, "linear accuracy, %"),
)


def draw_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write a PNG of the runs' smoothed loss and of what their probes measured, against the step.

    Raises UserError where a folder holds no log of a run, or one without an update.
    """
    # Imported here: matplotlib takes a second that `--help` need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained", dpi=120)
    loss, *others = figure.subplots(2, 3).flat
    *panels, legend = others
    for number, folder in enumerate(folders):
        steps, probes = read_log(folder)
        if not steps:
            raise UserError(f"{folder} holds the log of a run that has made no update yet")
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6}
        x = [row["step"] for row in steps]
        loss.plot(x, smoothed([row["loss"] for row in steps]), **style, label=str(folder))
        for axis, (column, scale, _) in zip(panels, PANELS, strict=True):
            if rows := [row for row in probes if column in row]:
                axis.plot([r["step"] for r in rows], [scale * r[column] for r in rows], "o-", markersize=3, **style)
    for axis, title in zip((loss, *panels), ("loss, smoothed", *(panel[2] for panel in PANELS)), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if not axis.has_data():
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    loss.set_ylim(bottom=0)
    legend.axis("off")
    names = legend.legend(*loss.get_legend_handles_labels(), loc="center left", frameon=False)
    for text in names.get_texts():
        text.set_parse_math(False)  # a folder's name is no formula, whatever dollars it holds
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return out


def draw(args: argparse.Namespace) -> None:
    print(draw_runs(args.runs, args.out))
