"""The curves of a run against its steps."""
import os
from pathlib import Path

from ijepa_fast.metrics import read_log

# Of a probe, by its key in the log: what it is called, and how its curve looks.
ACCURACIES = {"knn": ("k-NN (solid)", "s-"), "linear": ("linear (dotted)", "^:")}


def draw_curves(folder: Path) -> Path:
    """Write curves.png: loss, RankMe and the probes' accuracies, the schedules, and speed, against the step."""
    # Imported here: matplotlib takes a second that the first step of a run need not wait for.
    from matplotlib.figure import Figure

    steps, probes = read_log(folder)
    x = [row["step"] for row in steps]
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=120)
    loss, quality, rates, speed = figure.subplots(2, 2).flat
    for axis in (quality, rates, speed):
        axis.sharex(loss)

    values = [row["loss"] for row in steps]
    loss.plot(x, values, color="#9db7d5", linewidth=0.8, label="each update")
    loss.plot(x, smoothed(values), color="#1f4e8c", linewidth=1.6, label="smoothed")
    loss.set_title("loss (says little by itself: the targets move)")
    loss.legend(frameon=False)

    if probes:
        at = [row["step"] for row in probes]
        quality.plot(at, [row["rankme"] for row in probes], "o-", color="#1f4e8c", markersize=3)
        quality.set_ylabel("RankMe", color="#1f4e8c")
        accuracy = None
        for key, (name, style) in ACCURACIES.items():
            made = [row for row in probes if key in row]
            if made:
                accuracy = accuracy or quality.twinx()
                percent = [100 * row[key] for row in made]
                accuracy.plot([row["step"] for row in made], percent, style, color="#c2571a", markersize=3, label=name)
        if accuracy is not None:
            # The label tells the curves apart: a legend would lie on those of RankMe, which it does not know.
            names = " and ".join(str(line.get_label()) for line in accuracy.lines)
            accuracy.set_ylabel(f"{names}, %", color="#c2571a")
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


def smoothed(values: list[float | None]) -> list[float | None]:
    """Exponential means over about 25 values, or an eighth of fewer than 200. None has no mean and changes none.

    As Adam's they begin at zero and are divided by the weight they have got so far: the first value counts no more than
    another, and the curve's start does not hang on it.
    """
    share = 2 / (min(25, 1 + len(values) // 8) + 1)
    mean, weight, means = 0.0, 0.0, list[float | None]()
    for value in values:
        if value is None:
            means.append(None)
            continue
        mean += (value - mean) * share
        weight += (1 - weight) * share
        means.append(mean / weight)
    return means
