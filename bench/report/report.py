"""Makes bench/RESULTS.md and its pictures of the records: `python bench/report.py [--results bench/results]`.

For each device it shows the newest record, what changed since the one before, and of older ones the rows that were not
measured again. Nothing in RESULTS.md is written by hand.
"""
import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness.rows import format_time, key_of, left_out
from bench.report import pictures
from bench.report.goals import goal_lines

ROOT = Path(__file__).resolve().parents[2]
CHANGED = 0.05  # medians that differ by less count as equal: machines wander that much
SHORT_S = 1e-4  # medians below this are too noisy to compare at all
BUSY = 0.8  # a load average above this, on an idle machine, comes from other work
SUITES = {
    "step": "Whole step",
    "memory": "Peak memory of a step",
    "inputs": "Ops that make a transformer's input",
    "ops": "Ops on its output and weights",
    "fused": "Inside its blocks, and the optimizer",
    "linear": "Its linear layers on a CPU",
    "fp8": "The target encoder in e4m3",
    "attention": "Attention",
    "masks": "Masks",
    "data": "Data",
    "embed": "Embedding a folder",
    "tests": "Tests on the GPU",
}
INTRODUCTION = """\
# Results

Written by `python bench/report.py` from the records in `bench/results`. `make bench` measures on your machine;
`python bench/record.py --out bench/results` keeps what it measures. Times are medians, with the 10th and 90th
percentile of the samples in brackets. The providers of a case are sampled in turn in one process, each after its
correctness gate, so compare within a case: *ours is* gives how many times as fast ours is, the median over rounds.
*Of ceiling* is the least time that the case's own bytes or FLOPs allow on this machine, by a copy or by matrix products
measured in the same run, over the median; for a whole step that is its MFU. An op in place may pass 100 % on a CPU: a
copy there also reads the lines that it overwrites."""
Row = dict[str, Any]
Cells = tuple[object, ...]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of recorded JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md")
    args = parser.parse_args(argv)
    args.out.write_text(report(args.results, args.out.parent))
    print(f"wrote {args.out}")
    return 0


def report(results: Path, relative_to: Path) -> str:
    """RESULTS.md as text; draws the pictures of each device beside its records."""
    lines = [INTRODUCTION]
    devices = {folder: load(folder) for folder in sorted(results.glob("*/"))}
    devices = {folder: records for folder, records in devices.items() if records}
    if not any(record["sessions"][-1]["type"] == "cuda" for records in devices.values() for record in records):
        lines += ["", "**No GPU record yet**: no GPU was at hand. Nothing below says anything about one."]
    if not devices:
        lines += ["", "**No record at all yet.**"]
    for folder, records in devices.items():
        lines += device_section(records, folder, relative_to)
    return "\n".join(lines) + "\n"


def load(folder: Path) -> list[dict[str, Any]]:
    """The records of one device, oldest first."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((r for r in records if r["sessions"] and r["rows"]), key=lambda r: r["sessions"][-1]["date"])


def device_section(records: list[dict[str, Any]], folder: Path, relative_to: Path) -> list[str]:
    record = records[-1]
    machine, rows = record["sessions"][-1], record["rows"]
    older = not_measured_again(records)
    earlier = [row | {"earlier": True} for _, some in older for row in some]
    loads = [session["load"][0] for session in record["sessions"]]
    # Later parts begin with the load average that earlier parts caused.
    busy = machine["type"] == "cpu" and (loads[0] > BUSY or max(loads) > machine["threads"] + BUSY)
    lines = [
        "",
        f"## {machine['device']}",
        "",
        f"{machine['date'][:10]}, commit {commits(record)}, torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}, {machine['threads']} threads. Load average when the parts began: "
        f"{', '.join(f'{load:.1f}' for load in loads)}."
        + (" **The machine was busy with other work**: times are too long, and ratios are rough." if busy else "")
        + (f" Clocks: {', '.join(map(' '.join, machine['clocks'].items()))}." if machine.get("clocks") else ""),
        "",
        *ceilings(record["sessions"]),
        "",
        "### Goals",
        "",
        *table(("goal", "wanted", "measured", "met"), goal_lines(rows, earlier, machine["type"])),
    ]
    drawn = pictures.draw([*rows, *earlier], machine["device"], folder)
    for suite, title in SUITES.items():
        some = [row for row in rows if row["suite"] == suite]
        if some:
            lines += ["", f"### {title}", "", *SECTION.get(suite, timed_table)(some)]
            lines += [f"\n![{path.stem}]({path.relative_to(relative_to)})" for path in drawn.pop(suite, [])]
    if without := left_out(rows):
        lines += ["", "### Without a figure", "", *(f"- {line}" for line in without)]
    lines += [*repeated(rows), *changes(records)]
    for old, of_old in older:
        date = old["sessions"][-1]["date"][:10]
        lines += ["", f"### Not measured again since {date}, commit {commits(old)}"]
        for suite, title in SUITES.items():
            if some := [row for row in of_old if row["suite"] == suite]:
                lines += ["", f"**{title}**", "", *SECTION.get(suite, timed_table)(some)]
                lines += [f"\n![{path.stem}]({path.relative_to(relative_to)})" for path in drawn.pop(suite, [])]
    return lines


def not_measured_again(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Older records, newest first, each with the rows that no record after it has."""
    seen = {key_of(row) for row in records[-1]["rows"] if "seconds" in row}
    older = []
    for record in reversed(records[:-1]):
        rows = [row for row in record["rows"] if "seconds" in row and key_of(row) not in seen]
        if rows:
            older.append((record, rows))
            seen |= {key_of(row) for row in rows}
    return older


def table(header: Cells, rows: Iterable[Cells]) -> list[str]:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def ceilings(sessions: Iterable[dict[str, Any]]) -> list[str]:
    """Each ceiling, with its range over the sessions of the record."""
    measured: dict[str, list[float]] = {}
    for session in sessions:
        for name, rate in session["ceilings"].items():
            measured.setdefault(name, []).append(rate / 1e9)
    rows = []
    for name, rates in measured.items():
        low, high = f"{min(rates):.4g}", f"{max(rates):.4g}"
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        rows.append((name, f"{low if low == high else f'{low} to {high}'} {unit}"))
    return table(("ceiling", "measured"), rows)


def step_table(rows: list[Row]) -> list[str]:
    """Whole steps, then where their time goes, then what else the suite has."""
    whole = [row for row in rows if row["status"] == "timed" and "parts" in row]
    lines = table(
        ("case", "batch", "provider", "median", "ours is", "images/s", "tokens/s", "MFU"),
        [
            (
                *(row["case"], row["shapes"]["batch"], row["provider"], times(row), ours_is(row)),
                *(f"{row['images_per_s']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['share']:.0%}"),
            )
            for row in whole
        ],
    )
    if whole:
        parts = list(whole[0]["parts"])
        cells = [
            (row["case"], row["provider"], *(format_time(row["parts"].get(part, 0.0)) for part in parts))
            for row in whole
        ]
        lines += ["", *table(("case", "provider", *parts), cells)]
    for row in whole:
        if "profile" in row:
            cells = [(op["name"], op["calls"], f"{op['ms']:.2f}", f"{op['percent']:.1f}") for op in row["profile"]]
            lines += ["", f"Profile of {row['case']} {row['provider']}:", ""]
            lines += table(("op", "calls", "ms", "%"), cells)
    others = [row for row in rows if row["status"] == "timed" and "parts" not in row]
    return [*lines, "", *timed_table(others)] if others else lines


def memory_table(rows: list[Row]) -> list[str]:
    def mib(nbytes: int) -> str:
        return f"{nbytes / 2**20:.0f} MiB"

    seen = [row for row in rows if row["status"] == "observed"]
    cells = [
        (
            *(row["case"], row["provider"], mib(row["peak_bytes"]), mib(row["persistent_bytes"])),
            f"{row['ours_peak']:.2f} of it" if "ours_peak" in row else "",
        )
        for row in seen
    ]
    return table(("case", "provider", "peak", "of it from step to step", "ours takes"), cells)


def timed_table(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        if row["status"] == "timed":
            share = f"{row['share']:.0%} {row['bound']}" if "share" in row else ""
            note = ", ".join(f"{name} {value:.3g}" for name, value in row.get("note", {}).items())
            cells.append((row["op"], row["case"], row["provider"], times(row), ours_is(row), share, note))
    return table(("op", "case", "provider", "median", "ours is", "of ceiling", ""), cells)


def tests_table(rows: list[Row]) -> list[str]:
    return [f"- {row['op']}: {row.get('counts') or row['status']}" for row in rows]


SECTION = {"step": step_table, "memory": memory_table, "tests": tests_table}


def times(row: Row) -> str:
    seconds = row["seconds"]
    return f"{format_time(seconds['median'])} ({format_time(seconds['p10'])} to {format_time(seconds['p90'])})"


def ours_is(row: Row) -> str:
    ratio = row.get("ours_is")
    return f"{ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f})" if ratio else ""


def repeated(rows: list[Row]) -> list[str]:
    """What a second run of the same record said."""
    twice = [row for row in rows if "again" in row and row["seconds"]["median"] > SHORT_S]
    if not twice:
        return []
    apart = sorted((row for row in twice if row["again"]["differs"] >= CHANGED), key=lambda r: -r["again"]["differs"])
    lines = [
        "",
        "### Run twice",
        "",
        f"Of {len(twice)} rows above 100 us, the medians of {len(twice) - len(apart)} differ by less than 5 % between "
        f"two runs{'; these differ by more:' if apart else '.'}",
        "",
    ]
    for row in apart:
        first, second = row["seconds"]["median"], row["again"]["median"]
        lines.append(f"- {' '.join(key_of(row)[1:])}: {format_time(first)}, then {format_time(second)}")
    return lines


def changes(records: list[dict[str, Any]]) -> list[str]:
    """How the newest record's medians moved, each against the newest older record that has its row."""
    if len(records) == 1:
        return ["", "### Against the previous record", "", "This is the first record of this device."]
    now = {key_of(row): row for row in records[-1]["rows"] if row["status"] == "timed"}
    lines = []
    for record in reversed(records[:-1]):
        timed = [row for row in record["rows"] if row["status"] == "timed"]
        pairs = [(row, now.pop(key_of(row))) for row in timed if key_of(row) in now]
        if not pairs and record is not records[-2]:
            continue
        machine, moved = record["sessions"][-1], []
        for old, row in pairs:
            was, median = old["seconds"]["median"], row["seconds"]["median"]
            if max(was, median) > SHORT_S and abs(median / was - 1) >= CHANGED:
                change = f"{median / was - 1:+.0%}"
                moved.append((" ".join(key_of(row)[1:]), format_time(was), format_time(median), change))
        lines += ["", f"### Against the record of {machine['date'][:10]}, commit `{machine['commit']}`", ""]
        if moved:
            lines += table(("row", "before", "now", "change"), moved)
        else:
            lines.append("No median above 100 us moved by 5 % or more.")
    return lines


def commits(record: dict[str, Any]) -> str:
    """Of all its sessions, with the suites that each measured where there are several."""
    suites: dict[str, set[str]] = {}
    for row in record["rows"]:
        suites.setdefault(record["sessions"][row.get("session", -1)]["commit"], set()).add(row["suite"])
    if len(suites) < 2:
        return f"`{record['sessions'][-1]['commit']}`"
    return ", ".join(f"`{commit}` ({', '.join(sorted(some))})" for commit, some in suites.items())
