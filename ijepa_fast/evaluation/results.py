"""What probes report: rows with confidence intervals, one table of all of them, and the same as JSON."""
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ijepa_fast.durable import write_durably

Z = 1.959964  # of 95 %, two-sided
RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One number. `interval`: how `low` and `high` (95 %) were found, "" where there are none."""

    probe: str
    features: str  # "last layer", "last four layers", "patches", or "fine-tuned"
    metric: str  # "accuracy" (a share), "R2", "mean absolute error", or a name of `rank.spread`
    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""
    setting: str = ""  # what was chosen on the held-out part of train, or given
    images: int = 0  # evaluated


def accuracy_row(probe: str, features: str, predicted: Tensor, labels: Tensor, setting: str = "") -> Row:
    """The share of `labels` that `predicted` equals, with Wilson's interval."""
    right, n = int((predicted.cpu() == labels.cpu()).sum()), len(labels)
    return Row(probe, features, "accuracy", right / n, *wilson(right, n), "Wilson", setting, n)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share `right` of `n` (Wilson, "Probable Inference", 1927)."""
    p, z2 = right / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(statistic: Callable[[Tensor], float], n: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic(rows)` over `RESAMPLES` draws of n rows with replacement (Efron)."""
    generator = torch.Generator().manual_seed(seed)
    values = sorted(statistic(torch.randint(n, (n,), generator=generator)) for _ in range(RESAMPLES))
    return values[round(0.025 * (RESAMPLES - 1))], values[round(0.975 * (RESAMPLES - 1))]


def over_splits(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high): Student's 95 % interval of the mean over independent splits; None, None for one split."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, None, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = _student(n - 1) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution: a table, then the series of Abramowitz and Stegun, 26.7.5."""
    known = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    if freedom <= len(known):
        return known[freedom - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def table(rows: Sequence[Row], title: str) -> Table:
    """All rows, accuracies in per cent."""
    shown = Table(title=title, title_justify="left", caption=_caption(rows), caption_justify="left")
    for name in ("probe", "features", "setting"):
        shown.add_column(name)
    for name in ("result", "95 % interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.probe.split(" ")[0] != before.split(" ")[0]:
            shown.add_section()
        between = "" if row.low is None or row.high is None else f"{_number(row, row.low)} ... {_number(row, row.high)}"
        name = "" if row.metric == "accuracy" else f"{row.metric} "
        shown.add_row(row.probe, row.features, row.setting, f"{name}{_number(row, row.value)}", between)
        before = row.probe
    return shown


def _number(row: Row, value: float) -> str:
    if row.metric == "accuracy" or row.metric.startswith("share"):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if row.metric in ("RankMe", "LiDAR") else f"{value:.3g}"


def _caption(rows: Sequence[Row]) -> str:
    meanings = {
        "Wilson": "Wilson's score interval over the evaluated images",
        "bootstrap": f"bootstrap over the evaluated images ({RESAMPLES} resamples)",
        "Student": "Student's t over the splits, each evaluated on all of val",
    }
    used = [meanings[name] for name in meanings if any(row.interval == name for row in rows)]
    return f"Intervals: {'; '.join(used)}." if used else ""


def write_json(file: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """`about` (plain values) and all rows, as one JSON object."""
    write_durably(file, json.dumps({**about, "results": [asdict(row) for row in rows]}, indent=2) + "\n")
