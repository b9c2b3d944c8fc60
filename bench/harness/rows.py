"""The record of a run, a JSON file that is complete after every row, and its table for the terminal."""
import json
import os
from pathlib import Path
from typing import Any

MAX_LINES, WIDTH = 60, 160
KEY = ("suite", "op", "case", "provider")


class Record:
    """`{"sessions": [machine and ceilings], "rows": [...]}` in a file that is replaced whole after every row.

    So a run that is cut off keeps its rows. A row that is measured again replaces the old one; each names its session.
    With `again`, the rows of a second run replace nothing: the first run's rows get the second median beside theirs.
    """

    def __init__(self, path: Path, *, again: bool = False):
        self.path, self.again = path, again
        self.data: dict[str, Any] = {"sessions": [], "rows": []}
        if path.exists():
            self.data = json.loads(path.read_text())

    def open_session(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Add a session. The caller may add to the returned dict; it is written with the next row."""
        session = {**machine, "ceilings": {}, "again": self.again}
        self.data["sessions"].append(session)
        return session

    def add(self, row: dict[str, Any]) -> None:
        rows, key = self.data["rows"], key_of(row)
        at = next((i for i, old in enumerate(rows) if key_of(old) == key), None)
        session = len(self.data["sessions"]) - 1
        if self.again and at is not None:
            if row["status"] == rows[at]["status"] == "timed":
                rows[at]["again"] = repeat(rows[at], row, session)
        elif at is not None:
            rows[at] = {**row, "session": session}
        else:
            rows.append({**row, "session": session})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def repeat(first: dict[str, Any], second: dict[str, Any], session: int) -> dict[str, Any]:
    """The second run's median of a row, and how far the two differ, relative to the smaller."""
    a, b = first["seconds"]["median"], second["seconds"]["median"]
    return {"median": b, "differs": max(a, b) / min(a, b) - 1, "session": session}


def table(rows: list[dict[str, Any]], max_lines: int = MAX_LINES) -> list[str]:
    """At most `max_lines` lines: rows farthest from their ceiling first, then rows without a figure and why."""
    timed = sorted((r for r in rows if "seconds" in r), key=lambda r: r.get("share", float("inf")))
    lines = [f"{'row':48s} {'provider':>15s} {'median':>10s} {'p10':>10s} {'p90':>10s} {'of ceiling':>10s}  note"]
    lines += [_timed_line(row) for row in timed]
    without = [line[:WIDTH] for line in left_out(rows)]
    room = max(max_lines - len(without), 2)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} rows more, in the record"]
    return [*lines, *without][:max_lines]


def left_out(rows: list[dict[str, Any]]) -> list[str]:
    """Rows without a figure, grouped by op and reason. Providers are named unless the whole case has no figure."""
    providers: dict[tuple[str, str], set[str]] = {}
    groups: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        providers.setdefault((row["op"], row["case"]), set()).add(row["provider"])
        if "seconds" not in row:
            reason = row["status"].removeprefix("not run: ")
            groups.setdefault((row["op"], reason), {}).setdefault(row["case"], set()).add(row["provider"])
    lines = []
    for (op, reason), cases in groups.items():
        names = []
        for case, some in cases.items():
            every = some == providers[op, case]
            names.append(case if every else f"{case} {'|'.join(sorted(some))}".strip())
        lines.append(f"{op}: {reason}: {', '.join(names)}".rstrip(": "))
    return lines


def _timed_line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    times = " ".join(f"{format_time(seconds.get(name, seconds['median'])):>10s}" for name in ("median", "p10", "p90"))
    share = f"{row['share']:.0%} {row['bound']}" if "share" in row else "-"
    notes = []
    if "images_per_s" in row:
        notes.append(f"{row['images_per_s']:.1f} images/s")
    if "peak_bytes" in row:
        notes.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB")
    if "ours_is" in row:
        notes.append(f"ours is {row['ours_is']['median']:.2f}x")
    notes += [f"{value:.3g} {name}" for name, value in row.get("note", {}).items()]
    if row.get("again", {}).get("differs", 0) >= 0.05 and seconds["median"] > 1e-4:
        notes.append(f"second run differs by {row['again']['differs']:.0%}")
    return f"{_name(row):48s} {row['provider']:>15s} {times} {share:>10s}  {', '.join(notes)}".rstrip()


def _name(row: dict[str, Any]) -> str:
    return f"{row['op']}[{row['case']}]" if row["case"] else row["op"]


def format_time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
