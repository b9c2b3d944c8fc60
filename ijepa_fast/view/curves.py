"""The curves of a run against its steps."""
import os
from pathlib import Path

from ijepa_fast.metrics import read_log


def draw_curves(folder: Path) -> Path:
    """Write curves.png: loss, RankMe and k-NN, the schedules, and speed, against the step."""
    # Imported here: matplotlib takes a second that the first step of a run need not wait for.
    from matplotlib.figure import Figure

    steps, probes = read_log(folder)
    x = [row["step"] for row in steps]
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=120)
    loss, quality, rates, speed = figure.subplots(2, 2).flat

    values = [row["loss"] for row in steps]
    loss.plot(x, values, color="#9db7d5", linewidth=0.8, label="each update")
    loss.plot(x, smoothed(values), color="#1f4e8c", linewidth=1.6, label="smoothed")
    loss.set_title("loss (says little by itself: the targets move)")
    loss.legend(frameon=False)

    if probes:
        at = [row["step"] for row in probes]
        quality.plot(at, [row["rankme"] for row in probes], "o-", color="#1f4e8c", markersize=3)
        quality.set_ylabel("RankMe", color="#1f4e8c")
        if "knn" in probes[0]:
            accuracy = quality.twinx()
            accuracy.plot(at, [100 * row["knn"] for row in probes], "s-", color="#c2571a", markersize=3)
            accuracy.set_ylabel("k-NN accuracy, %", color="#c2571a")
    else:
        quality.text(0.5, 0.5, "no probe was made", ha="center", transform=quality.transAxes)
    quality.set_title("target features")

    rates.plot(x, [row["lr"] for row in steps], color="#1f4e8c")
    rates.set_ylabel("learning rate", color="#1f4e8c")
    momentum = rates.twinx()
    momentum.plot(x, [row["momentum"] for row in steps], color="#c2571a")
    momentum.set_ylabel("EMA momentum", color="#c2571a")
    momentum.ticklabel_format(useOffset=False)
    rates.set_title("schedules")

    speed.plot(x, [row["images/s"] for row in steps], color="#1f4e8c", linewidth=0.8)
    speed.set_ylim(bottom=0)
    speed.set_title("images/s")
    for axis in (loss, quality, rates, speed):
        axis.set_xlabel("step")
        axis.spines[["top"]].set_visible(False)
        axis.grid(alpha=0.25)
    path = folder / "curves.png"
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)
    return path


def smoothed(values: list[float], span: int = 25) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        before = smoothed[-1] if smoothed else value
        smoothed.append(before + (value - before) * 2 / (span + 1))
    return smoothed
