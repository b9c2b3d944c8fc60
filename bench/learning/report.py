"""Makes bench/learning/README.md and its pictures of the records beside it."""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.report.pictures import PROVIDER_COLORS
from ijepa_fast.evaluation.results import over_splits

Record = dict[str, Any]
SHOWN = ("logistic last", "logistic last four", "k-NN")
PROVED = ("chosen last", "chosen last four", "linear last", "linear last four", *SHOWN)
NOTES = Path(__file__).parent / "notes.md"


def report(results: Path) -> Path:
    """Write README.md, and the curves of every proof, into the folder above `results`."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    records.sort(key=lambda record: record["provider"] != "ours")  # ours first, all else as the files are named
    final = [record for record in records if record["final"]]
    tried = [record for record in records if not record["final"]]
    lines = ["# What a recipe learns in a given time", ""]
    lines += ["Written by `python bench/learn.py` from the records in `results/`; only `notes.md` is by hand.", ""]
    if NOTES.exists():
        lines += [NOTES.read_text().strip(), ""]
    arms = by(sorted(final, key=lambda record: -(record["minutes"] or 0)), "arm")
    for (arm,), group in arms.items():
        reference = next(iter(arms.values()))[0]["config"]
        lines += [f"## The proof: {arm}", "", *proof(group, reference), ""]
        picture = results.parent / f"curves_{arm}.png"
        curves(group, picture)
        lines += [f"![Accuracy on the way]({picture.name})", ""]
    if tried:
        lines += ["## What was tried", "", *trials(tried), ""]
    out = results.parent / "README.md"
    out.write_text("\n".join(lines))
    return out


def proof(records: list[Record], reference: dict[str, Any]) -> list[str]:
    """Tables of all providers of an arm: mean over seeds, and Student's 95 % interval of it."""
    first = records[0]
    other = difference(first["config"], reference)
    lines = [
        f"Pretrained on all of train for {length(first)}, from the same weights; "
        f"probes fitted to train ({first['images']['train']} images) and scored on val ({first['images']['evaluated']} "
        f"images). In per cent, the mean over seeds with Student's 95 % interval; machine: "
        f"{first['machine']['device']}, torch {first['machine']['torch']}, commit {first['machine']['commit']}. "
        "*chosen* and *linear* are what `ijepa_fast.evaluate` reports: logistic regression whose penalty is chosen "
        "within train, and the paper's linear probe; *logistic* has a penalty of C = 0.1, as in the curves."
        + (f" Other keys than in the first proof: {other}." if other else ""),
        "",
        "| features | seeds | updates | " + " | ".join(PROVED) + " | RankMe |",
        "|---|---|---|" + "---|" * len(PROVED) + "---|",
        f"| 16 x 16 pixels | | | {first['pixels chosen']:.1f} | | | | {first['pixels']:.1f} | | | |",
    ]
    groups = {provider: group for (provider,), group in by(records, "provider").items()}
    start = [record["points"][0] for record in next(iter(groups.values()))]
    lines.append(row("random weights", start))
    lines += [row(provider, [r["points"][-1] for r in group]) for provider, group in groups.items()]
    return [*lines, "", *differences(groups)]


def differences(groups: dict[str, list[Record]]) -> list[str]:
    """A table of what pretraining adds, and of how far the first provider is ahead of each other."""
    lines = ["In points, seed by seed:", "", "| difference | seeds | " + " | ".join(PROVED) + " |"]
    lines.append("|---|---|" + "---|" * len(PROVED))
    for provider, group in groups.items():
        pairs = [(record["points"][-1], record["points"][0]) for record in group]
        lines.append(difference_row(f"{provider} - random weights", pairs))
    ends = {key: {record["seed"]: record["points"][-1] for record in group} for key, group in groups.items()}
    (leader, first), *others = ends.items()
    for provider, theirs in others:
        pairs = [(first[seed], theirs[seed]) for seed in first if seed in theirs]
        lines.append(difference_row(f"{leader} - {provider}", pairs))
    return lines


def difference_row(name: str, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    cells = [name, str(len(pairs))]
    return "| " + " | ".join(cells + [interval([a[c] - b[c] for a, b in pairs], "+") for c in PROVED]) + " |"


def interval(values: list[float], sign: str = "") -> str:
    """The mean over seeds, with Student's 95 % interval where there are two."""
    mean, low, high = over_splits(values)
    return f"{mean:{sign}.1f}" if low is None else f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


PIXELS_ARE = "The same classifier on 16 x 16 pixels: {:.1f} %."


def row(name: str, points: list[dict[str, float]]) -> str:
    cells = [name, str(len(points)), f"{sum(p['updates'] for p in points) / len(points):.0f}"]
    cells += [interval([point[column] for point in points]) for column in (*PROVED, "rankme")]
    return "| " + " | ".join(cells) + " |"


def length(record: Record) -> str:
    if record["minutes"] is None:
        return f"{record['planned_updates']:,} updates each"
    return f"{record['minutes']:g} minutes each ({record['clock']})"


def trials(records: list[Record]) -> list[str]:
    """A table of all experiments by which the recipe was chosen."""
    first = records[0]
    lines = [
        f"Probes fitted to four fifths of train and scored on the fifth held out ({first['images']['evaluated']} "
        f"images: one seed's interval is about 3.7 points either way); val was not read. Means over seeds, before -> "
        f"after. *Other keys*: where the config differs from that of the first row. "
        f"{PIXELS_ARE.format(first['pixels'])}",
        "",
        "| arm | other keys | seeds | minutes | updates | logistic last | last four | k-NN | RankMe | std | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = by(sorted(records, key=lambda record: record["machine"]["date"]), "arm", "provider")
    reference = next(iter(groups.values()))[0]["config"]
    for (arm, provider), group in groups.items():
        begin, end = [r["points"][0] for r in group], [r["points"][-1] for r in group]
        cells = [arm if provider == "ours" else f"{arm}, {provider}", difference(group[0]["config"], reference)]
        minutes, planned = mean(p["minutes"] for p in end), group[0]["minutes"]
        stopped = f" of {planned:g}" if planned and minutes < planned else ""  # its schedule had not ended
        cells += [str(len(group)), f"{minutes:.1f}{stopped}", f"{mean(p['updates'] for p in end):.0f}"]
        for column, digits in ((SHOWN[0], 1), (SHOWN[1], 1), (SHOWN[2], 1), ("rankme", 1), ("std", 2)):
            before, after = (mean(p[column] for p in points) for points in (begin, end))
            cells.append(f"{before:.{digits}f} -> {after:.{digits}f}")
        lines.append("| " + " | ".join([*cells, f"{mean(p['loss'] for p in end):.3f}"]) + " |")
    return lines


def by(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def difference(config: dict[str, Any], reference: dict[str, Any]) -> str:
    """`section.key=value` of what differs, the seed aside, and keys that the reference's version did not have."""
    changed = [
        f"{section}.{key}={value}"
        for section, keys in config.items()
        for key, value in keys.items()
        if value != reference.get(section, {}).get(key, value) and (section, key) != ("train", "seed")
    ]
    return ", ".join(changed)


def curves(records: list[Record], out: Path) -> None:
    """Logistic regression and k-NN against what was equal, minutes or updates: a line a seed, and the baselines."""
    equal = "updates" if records[0]["minutes"] is None else "minutes"
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, ("logistic last", "k-NN"), strict=True):
        for provider, group in by(records, "provider").items():
            for i, record in enumerate(group):
                done, values = ([point[key] for point in record["points"]] for key in (equal, column))
                label = provider[0] if i == 0 else None
                axis.plot(done, values, "o-", ms=3, lw=1, color=PROVIDER_COLORS[provider[0]], label=label)
        if column == "logistic last":
            axis.axhline(records[0]["pixels"], color="black", lw=0.8, ls="--", label="16 x 16 pixels")
        axis.set(xlabel=f"{equal} of pretraining", title={"logistic last": "logistic regression"}.get(column, column))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on val, %")
    axes[0].legend(fontsize=8)
    figure.savefig(out, metadata={"Software": None})
