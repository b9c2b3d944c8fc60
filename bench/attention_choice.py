"""Where `varlen_attention` takes our kernel by itself: the table MEASURED_FASTER, made of what was measured.

    python bench/attention_choice.py            prints it, from the records in bench/results
    python bench/attention_choice.py --write    and puts it into kernels/ijepa_kernels/attention_backends.py

A head dim is in the table of a chip where our kernel beat every library that was there in every case with gradients:
each case by the newest record that has it, and where none has by the sweep of tiles, at the tiles that we ship.
Where a record has the backward of `attention_short`, it prints the line SHORT_BACKWARD of `attention_triton` too.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ijepa_kernels import attention_triton  # noqa: E402
from ijepa_kernels.attention_backends import BACKENDS  # noqa: E402

RESULTS, TABLE = ROOT / "bench/results", ROOT / "kernels/ijepa_kernels/attention_backends.py"
SWEEP = "sweeps/attention_tiles.json"
LIBRARIES = [name for name, backend in BACKENDS.items() if backend.call is not None]
CLEARLY = 1.05  # times as fast; machines wander by less
MAJOR = {"NVIDIA H100 80GB HBM3": 9}  # of the compute capability, which records did not name at first


class Measured(NamedTuple):
    case: str  # as context80-truncate
    head_dim: int
    date: str
    faster: dict[str, float]  # library -> how many times as fast our kernel was


def of_record(record: dict[str, Any]) -> list[Measured]:
    """Its cases of attention with gradients, in bf16."""
    found: dict[str, Measured] = {}
    rows = [r for r in record["rows"] if r["op"] == "attention" and r["status"] == "timed" and r["dtype"] == "bfloat16"]
    ours = {r["case"]: r["seconds"]["median"] for r in rows if r.get("backend") == "triton"}
    for row in rows:
        case, date = row["case"], record["sessions"][row["session"]]["date"][:10]
        if case in ours and row["provider"] in LIBRARIES and not case.startswith("dense"):
            measured = found.setdefault(case, Measured(case, row["shapes"]["head_dim"], date, {}))
            measured.faster[row["provider"]] = row["seconds"]["median"] / ours[case]
    return list(found.values())


def of_sweep(sweep: dict[str, Any]) -> list[Measured]:
    """The same of a sweep, which timed forward and backward apart, and on whose tiles those that we ship are."""
    forward, backward = (str(tuple(tiles[16])) for tiles in (attention_triton.FORWARD, attention_triton.BACKWARD))
    found = []
    for row in sweep["rows"]:
        if forward not in row["fwd"] or backward not in row["bwd"]:
            continue
        ours = row["fwd"][forward] + row["bwd"][backward]
        lib = row["lib"]
        theirs = {name: lib[name] + lib[f"{name} bwd"] for name in LIBRARIES if f"{name} bwd" in lib}
        (head_dim,) = re.findall(r"\d+", row["shape"][0])
        faster = {name: seconds / ours for name, seconds in theirs.items()}
        found.append(Measured("-".join(row["shape"]), int(head_dim), sweep["date"], faster))
    return found


def measurements(folder: Path) -> tuple[str, int, list[Measured]] | None:
    """The name of a GPU, its major compute capability, and each case as it was measured last."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    records = [r for r in records if r["sessions"] and r["sessions"][-1]["type"] == "cuda"]
    if not records:
        return None
    records.sort(key=lambda record: record["sessions"][-1]["date"])
    sweep = folder / SWEEP
    cases = of_sweep(json.loads(sweep.read_text())) if sweep.exists() else []
    for record in records:
        cases += of_record(record)
    session = records[-1]["sessions"][-1]
    if "capability" not in session and session["device"] not in MAJOR:
        sys.exit(f"{folder}: no record names the compute capability of {session['device']}: measure once more")
    major = session["capability"][0] if "capability" in session else MAJOR[session["device"]]
    return session["device"], major, list({measured.case: measured for measured in cases}.values())


def line(device: str, major: int, cases: list[Measured]) -> str:
    """The table's line for a GPU; empty where our kernel is not clearly the fastest at any head dim."""
    slowest: dict[int, float] = {}
    for measured in cases:
        least = min(measured.faster.values(), default=0.0)
        slowest[measured.head_dim] = min(least, slowest.get(measured.head_dim, least))
    taken = sorted(head_dim for head_dim, least in slowest.items() if least >= CLEARLY)
    if not taken:
        return ""
    there = [measured for measured in cases if measured.head_dim in taken]
    ratios = [ratio for measured in there for ratio in measured.faster.values()]
    beside = " and ".join(sorted({name for measured in there for name in measured.faster}))
    head_dims = ", ".join(map(str, taken)) + "," * (len(taken) == 1)
    return (
        f"        # {device}, {max(measured.date for measured in there)}, beside {beside}: "
        f"{min(ratios):.1f} to {max(ratios):.1f} times as fast\n"
        f"        ({major}, ({head_dims})),\n"
    )


def table(results: Path) -> str:
    gpus = [gpu for folder in sorted(results.iterdir()) if folder.is_dir() and (gpu := measurements(folder))]
    return (
        "MEASURED_FASTER = frozenset(\n"
        "    (head_dim, torch.bfloat16, major)\n"
        "    for major, head_dims in (  # major compute capability\n"
        f"{''.join(line(*gpu) for gpu in gpus)}"
        "    )\n"
        "    for head_dim in head_dims\n"
        ")\n"
    )


def short_backward(results: Path) -> str:
    """The head dims at which it beat the other backward in every case of every GPU; empty where none has timed it."""
    newest: dict[tuple[str, str], tuple[str, int, float]] = {}
    for path in results.glob("*/*.json"):
        record = json.loads(path.read_text())
        rows = [r for r in record["rows"] if r["op"] == "attention" and r["status"] == "timed"]
        ours = {r["case"]: r["seconds"]["median"] for r in rows if r["provider"] == "ours"}
        for row in rows:
            if row["provider"] == "short" and row["case"] in ours:
                date, faster = record["sessions"][row["session"]]["date"], ours[row["case"]] / row["seconds"]["median"]
                key, measured = (path.parent.name, row["case"]), (date, row["shapes"]["head_dim"], faster)
                newest[key] = max(measured, newest.get(key, measured))
    if not newest:
        return ""
    slower = {head_dim for _, head_dim, faster in newest.values() if faster < CLEARLY}
    taken = ", ".join(map(str, sorted({head_dim for _, head_dim, _ in newest.values()} - slower)))
    return f"SHORT_BACKWARD: frozenset[int] = frozenset({{{taken}}})\n".replace("{}", "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TABLE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    text = table(args.results)
    print(text, end="")
    print(short_backward(args.results), end="")
    if args.write:
        TABLE.write_text(re.sub(r"MEASURED_FASTER = frozenset\(.*?\n\)\n", text, TABLE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
