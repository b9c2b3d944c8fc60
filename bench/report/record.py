"""Runs the benchmark suites and records what they measure: `python bench/record.py --out FOLDER --part all`.

Every part is a process of its own, so a fault on a GPU ends one part and not the record. It gets `--minutes`; a case
that has not begun by then is recorded as not run. Rows are written one by one to FOLDER/<device>/<date>-<commit>.json;
another part on the same day and commit adds to that file. `--twice` runs each part once more, and every row then tells
how far its second median is from its first. `python bench/report.py` makes RESULTS.md of what is in bench/results.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.harness.machine import ROOT, commit, describe, device_name, folder_name
from bench.harness.rows import Record, table

PARTS = {
    "tests": [],
    "sanitizer": [],  # the same tests, those of the kernels' reads and writes, under compute-sanitizer
    "ops": ["ops", "fused", "linear", "fp8", "inputs", "masks"],
    "attention": ["attention"],
    "step": ["step", "data"],
    "memory": ["memory"],
    "embed": ["embed"],
}
MINUTES = 9
GRACE_S = 60  # of these, for the last case to end
SANITIZED = "(writes_ or every_dtype or head_dims_of_other) and not cuda-torch"  # of tests/kernels; a minute on an H100


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the record is written")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="the marked cases only, fewer samples")
    parser.add_argument("--released", type=Path, metavar="CHECKOUT", help="a checkout of the released I-JEPA code")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too, where it takes minutes")
    parser.add_argument("--profile", action="store_true", help="add to every step where its time goes, op by op")
    parser.add_argument("--only", metavar="EXPRESSION", help="the cases that pytest -k picks, as `H14 and ragged`")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of a part, at most; default: {MINUTES}")
    parser.add_argument("--twice", action="store_true", help="run again, and mark the rows that differ")
    args = parser.parse_args(argv)
    if args.minutes * 60 <= GRACE_S:
        most = GRACE_S / 60
        parser.error(f"--minutes: want more than {most:g}, the time that the last case may take, got {args.minutes:g}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{commit().removesuffix('+')}.json"
    path = args.out.resolve() / folder_name(device_name(device)) / name
    options = ["--quick"] * args.quick + ["--profile"] * args.profile + ["--compile"] * args.compile
    options += ["--released", str(args.released.resolve())] if args.released else []
    options += ["-k", args.only] if args.only else []
    failed = False
    for part in PARTS if args.part == "all" else [args.part]:
        for again in (False, True) if args.twice and PARTS[part] else (False,):
            started = time.monotonic()
            run = [*options, *["--again"] * again]
            ok = run_part(part, path, run, args.minutes) if PARTS[part] else run_tests(part, path, args.minutes)
            failed |= not ok
            print(f"{part}{' again' * again}: {'done' if ok else 'with failures'}, {time.monotonic() - started:.0f} s")
    print("\n".join(table(json.loads(path.read_text())["rows"])))
    print(f"record: {path}")
    return int(failed)


def run_part(part: str, path: Path, options: list[str], minutes: float) -> bool:
    files = [f"bench/test_bench_{suite}.py" for suite in PARTS[part]]
    budget = str(60 * minutes - GRACE_S)
    options = ["--benchmark-only", "-q", "--record", str(path), "--budget", budget, *options]
    code = _pytest(*files, *options, minutes=minutes)
    if code == 5 and "-k" in options:  # no case of this part was asked for
        return True
    if code not in (0, 1):  # neither passed nor failed: it was killed, or died
        row = {"suite": part, "op": "process", "case": "", "provider": "ours"}
        Record(path).add({**row, "status": f"error: exit code {code}"})
    return code == 0


def run_tests(part: str, path: Path, minutes: float) -> bool:
    """`pytest -m gpu`: a row for each test that did not pass, and one with the counts."""
    record, sanitized = Record(path), part == "sanitizer"
    row = {"suite": "tests", "op": "sanitizer" if sanitized else "gpu", "case": "", "provider": "ours"}
    tool = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or (sanitized and tool is None):
        record.open_session(describe(torch.device("cpu")))
        why = "compute-sanitizer is not installed" if torch.cuda.is_available() else "GPU only"
        record.add({**row, "status": f"not run: {why}"})
        return True
    record.open_session(describe(torch.device("cuda")))
    report = path.with_suffix(".xml")
    options = ["-m", "gpu", "-q", "--junitxml", str(report)]
    if sanitized:  # a cache of freed memory would hide what lies outside of a tensor
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "IJEPA_KERNELS_CHECK": "1"}
        under = [str(tool), "--tool", "memcheck", "--error-exitcode", "9"]
        ok = _pytest("tests/kernels", "-k", SANITIZED, *options, minutes=minutes, under=under, settings=settings) == 0
    else:
        ok = _pytest("tests", *options, minutes=minutes) == 0
    counts: dict[str, int] = {}
    for test in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        kind = next((kinds[child.tag] for child in test if child.tag in kinds), "passed")
        counts[kind] = counts.get(kind, 0) + 1
        if kind != "passed":
            name = f"{test.get('classname')}.{test.get('name')}"
            why = next((child.get("message") or "" for child in test if child.tag in kinds), "").replace(f"{ROOT}/", "")
            record.add({**row, "op": name, "status": f"{kind}: {why.splitlines()[0][:150] if why else ''}"})
    report.unlink(missing_ok=True)
    counted = "counted" if ok or not sanitized or counts.get("failed") else "error: compute-sanitizer found faults"
    record.add({**row, "status": counted if counts else "error: no report", "counts": counts})
    return ok


def _pytest(
    *arguments: str, minutes: float, under: Sequence[str] = (), settings: Mapping[str, str] | None = None
) -> int | str:
    """The exit code of pytest, run in the repository and killed after `minutes` so that the next part still runs."""
    command = [*under, sys.executable, "-m", "pytest", *arguments]
    environment = os.environ | dict(settings or {})
    try:
        return subprocess.run(command, cwd=ROOT, timeout=60 * minutes, env=environment).returncode
    except subprocess.TimeoutExpired:
        return f"none, stopped after {minutes:g} minutes"
