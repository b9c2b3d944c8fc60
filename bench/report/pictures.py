"""The pictures of a record: roofline of the ops, stacked bar of the step, images/s by model."""
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
PART_COLORS = ("#1f4e8c", "#4f86c6", "#9db7d5", "#c2571a", "#e3a77f")
PROVIDER_COLORS = {
    "ours": "#c2571a",
    "ours_graph": "#8a3a0f",
    "ours_fp8": "#d98c4a",
    "ours_compiled": "#e3a77f",
    "tuned": "#4f86c6",
    "straight": "#9db7d5",
    "released": "#7a7a7a",
}


def draw(rows: list[Row], device: str, folder: Path) -> dict[str, list[Path]]:
    """Write the pictures that the rows give into `folder`; their paths by suite. Those of older records are marked."""
    drawn: dict[str, list[Path]] = {}
    for suite, name, draw_one in (("ops", "roofline", roofline), ("step", "step", parts), ("step", "images", images)):
        figure = draw_one([row for row in rows if row["status"] == "timed"])
        if figure is not None:
            figure.suptitle(device, fontsize=10)
            path = folder / f"{name}.png"
            # Without its date and version, so that the same record draws the same file.
            figure.savefig(path, metadata={"Software": None})
            drawn.setdefault(suite, []).append(path)
    return drawn


def roofline(rows: list[Row]) -> Figure | None:
    """FLOP/s over FLOPs a byte; and for what a copy bounds, the share of a copy's speed."""
    products = [row for row in rows if row.get("bytes") and row.get("flops") and "floor_s" in row]
    moves = [row for row in rows if row.get("bound") == "copy" and row["suite"] in ("ops", "inputs")]
    if not products and not moves:
        return None
    figure, (left, right) = _figure(1, 2, height=max(4.0, 0.16 * len(moves) + 1.2))
    for row in products:
        intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"]
        left.plot(intensity, rate, "o", color=_color(row), markersize=5)
        left.plot(intensity, row["flops"] / row["floor_s"], "_", color="black", markersize=9)
    left.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s", title="FLOPs (-: the ceiling)")
    moves.sort(key=lambda row: (row["op"], row["case"], row["provider"]), reverse=True)
    right.barh(range(len(moves)), [100 * row["share"] for row in moves], color=[_color(row) for row in moves])
    names = [f"{row['op']} {row['case']} {row['provider']}{' (earlier)' * ('earlier' in row)}" for row in moves]
    right.set_yticks(range(len(moves)), names, fontsize=6)
    right.axvline(100, color="black", linewidth=0.8)
    right.set(xlabel="% of the speed of a copy of as many bytes", title="bound by a copy")
    return figure


def parts(rows: list[Row]) -> Figure | None:
    """Where the time of a step goes, provider by provider."""
    rows = [row for row in rows if "parts" in row]
    if not rows:
        return None
    figure, (axis,) = _figure(1, 1, height=0.32 * len(rows) + 1.6)
    rows.reverse()
    left = [0.0] * len(rows)
    for part, color in zip(rows[-1]["parts"], PART_COLORS, strict=True):
        widths = [1000 * row["parts"].get(part, 0.0) for row in rows]
        axis.barh(range(len(rows)), widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    names = [f"{row['case']} {row['provider']}{' (earlier)' * ('earlier' in row)}" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel="ms a step", title="parts of a step (medians)")
    axis.legend(frameon=False, ncols=len(PART_COLORS), loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8)
    return figure


def images(rows: list[Row]) -> Figure | None:
    """Images a second, truncated masks, by model and provider."""
    rows = [row for row in rows if "parts" in row and row["shapes"]["collate"] == "truncate"]
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = _figure(1, len(cases), height=3.4)
    for axis, case in zip(axes, cases, strict=True):
        some = {row["provider"]: row for row in rows if row["case"] == case}
        names = [name for name in providers if name in some]
        values = [some[name]["images_per_s"] for name in names]
        bars = axis.bar(range(len(names)), values, color=[_color(some[name]) for name in names])
        axis.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
        when = ", earlier" * any("earlier" in row for row in some.values())
        axis.set(title=f"{case}, batch {some[names[0]]['shapes']['batch']}{when}", ylabel="images/s")
    return figure


def _figure(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, height), layout="constrained", dpi=110)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _color(row: Row) -> str:
    return PROVIDER_COLORS.get(row["provider"], "#b8b8b8")
