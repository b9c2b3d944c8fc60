"""bench/report.py: recorded JSON becomes RESULTS.md and its pictures, and says no more than the JSON does."""
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import pictures
from bench.report.goals import GOALS
from bench.report.report import ROOT, report

MACHINE = {
    "device": "Some(R) Processor, 2 cores",
    "type": "cpu",
    "threads": 2,
    "load": [0.1, 0.1, 0.1],
    "python": "3.11.1",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.3.5",
    "commit": "abc",
    "date": "2026-11-21T10:00:00+00:00",
    "ceilings": {"copy": 1e10, "matmul float32 8x16 mlp 64": 2e11},
}
PARTS = {"target": 0.2, "context": 0.2, "predictor": 0.2, "backward": 0.3, "optimizer+EMA": 0.1}


def row(suite, op, case, provider, median=None, status="timed", **fields):
    key = {"suite": suite, "op": op, "case": case, "provider": provider, "status": status, "session": 0}
    if median is not None:
        key["seconds"] = {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "min": median, "rounds": 9}
    return {**key, **fields}


def rows(scale=1.0):
    step = {"shapes": {"batch": 16, "collate": "truncate"}, "parts": PARTS, "share": 0.5, "bound": "matmul"}
    speed = {"images_per_s": 16.0, "tokens_per_s": 1600.0}
    profile = [{"name": "aten::mm", "calls": 3, "ms": 800.0, "percent": 80.0}]
    ratio = {"ours_is": {"median": 1.25, "p10": 1.2, "p90": 1.3}}
    copy = {"bytes": 1000, "flops": None, "floor_s": 1e-3, "bound": "copy", "share": 0.5}
    products = {"bytes": 100, "flops": 1e6, "floor_s": 5e-4, "bound": "matmul", "share": 0.5}
    return [
        row("step", "step", "S16-truncate", "ours", 1.0 * scale, **step, **speed, profile=profile),
        row("step", "step", "S16-truncate", "straight", 1.25, **step, **speed, **ratio),
        row("step", "step", "H14-truncate", "ours", status="not run: GPU only"),
        row("memory", "memory", "S16-truncate", "ours", 1.0, "observed", peak_bytes=3 << 20, persistent_bytes=1 << 20),
        row("ops", "ema", "B16", "ours", 2e-3, **copy),
        row("ops", "ema", "B16", "eager", 4e-3, **copy),
        row("attention", "attention", "64", "ours", 1e-3, **products),
        row("masks", "masks", "reference", "ours", 1e-3, note={"us/image": 7.8}),
        row("ops", "loss", "B16", "ours", status="gate red: it is wrong"),
    ]


def write(folder: Path, name: str, rows, **machine):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"sessions": [{**MACHINE, **machine}], "rows": rows}))


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "results" / "some-processor", "first.json", rows())
    return tmp_path / "results"


@pytest.fixture
def undrawn(monkeypatch):
    """For what is about the text alone: drawing takes most of a report's time."""
    monkeypatch.setattr(pictures, "draw", lambda *_: {})


def test_the_report_says_what_the_record_says(results, tmp_path):
    text = report(results, tmp_path)
    assert "No GPU record yet" in text
    assert "| S16-truncate | 16 | straight | 1.25 s (1.12 s to 1.38 s) | 1.25x (1.20 to 1.30) |" in text
    assert "| S16-truncate | ours | 200 ms | 200 ms | 200 ms | 300 ms | 100 ms |" in text
    assert "| S16-truncate | ours | 3 MiB | 1 MiB |  |" in text
    assert "| ema | B16 | eager | 4 ms (3.6 ms to 4.4 ms) |  | 50% copy |  |" in text
    assert "us/image 7.8" in text
    assert "| aten::mm | 3 | 800.00 | 80.0 |" in text
    assert "- step: GPU only: H14-truncate" in text
    assert "- loss: gate red: it is wrong: B16" in text
    assert "first record of this device" in text
    drawn = {path.stem: path.read_bytes() for path in results.rglob("*.png")}
    assert drawn.keys() == {"roofline", "step", "images"}
    for picture, content in drawn.items():
        assert f"![{picture}](results/some-processor/{picture}.png)" in text
        assert len(content) > 5000
    assert report(results, tmp_path) == text
    assert {path.stem: path.read_bytes() for path in results.rglob("*.png")} == drawn


@pytest.mark.long
def test_the_command_makes_the_committed_results_of_the_committed_records(tmp_path):
    """From any folder, without the package on the path."""
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    out = tmp_path / "RESULTS.md"
    command = [sys.executable, ROOT / "bench" / "report.py", "--results", tmp_path / "results", "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert out.read_text() == (ROOT / "bench" / "RESULTS.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_changes_are_against_the_record_before(results, tmp_path):
    later = "2026-11-22T10:00:00+00:00"
    write(results / "some-processor", "0-later.json", rows(scale=0.8), commit="def", date=later)
    text = report(results, tmp_path)
    assert "Against the record of 2026-11-21, commit `abc`" in text
    assert "| step S16-truncate ours | 1 s | 800 ms | -20% |" in text
    assert "ema B16 ours |" not in text.partition("Against the record")[2], "a row that did not move is listed"


def test_what_was_not_measured_again_stays(results, tmp_path):
    """Each row is that of the newest record that has it, in the text and in the pictures."""
    of_suite = {suite: [one for one in rows(scale=0.8) if one["suite"] == suite] for suite in ("step", "attention")}
    for day, suite in ((22, "step"), (23, "attention")):
        date = f"2026-11-{day}T10:00:00+00:00"
        write(results / "some-processor", f"{suite}.json", of_suite[suite], commit=suite, date=date)
    text = report(results, tmp_path)
    now, second, first = text.split("### Not measured again since ")
    assert "### Attention" in now
    assert "images.png" not in now
    assert second.startswith("2026-11-22, commit `step`")
    assert "| ours | 800 ms" in second
    assert "![images](results/some-processor/images.png)" in second
    assert first.startswith("2026-11-21, commit `abc`")
    assert "| ema | B16 | ours |" in first
    assert "![roofline]" in first
    assert "S16-truncate | 16 | ours" not in first
    assert "| S/16 step, times as fast as straight | at least 1.25 | 1.25 (earlier) | yes |" in now


@pytest.mark.usefixtures("undrawn")
def test_rows_that_two_runs_disagree_on_are_named(results, tmp_path):
    some = rows()
    for one, differs in zip(some, (0.08, 0.01), strict=False):
        one["again"] = {"median": one["seconds"]["median"] * (1 + differs), "differs": differs}
    write(results / "some-processor", "first.json", some)
    text = report(results, tmp_path)
    assert "Of 2 rows above 100 us, the medians of 1 differ by less than 5 %" in text
    assert "- step S16-truncate ours: 1 s, then 1.08 s" in text


@pytest.mark.usefixtures("undrawn")
def test_goals_are_met_missed_or_unmeasured(results, tmp_path):
    text = report(results, tmp_path)
    assert "| S/16 step, times as fast as straight | at least 1.25 | 1.25 | yes |" in text
    assert "| S/16 step, times as fast as tuned | at least 1 |  | not measured |" in text
    some = rows()
    some[1]["ours_is"]["median"] = 1.2
    some.append(row("data", "order_and_boxes", "in22k", "ours", 1e-3, note={"us/image": 21.0}))
    write(results / "some-processor", "first.json", some)
    text = report(results, tmp_path)
    assert "| S/16 step, times as fast as straight | at least 1.25 | 1.2 | **no** |" in text
    assert "| order and boxes, us an image | at most 20 | 21 | **no** |" in text


def items(suite):
    """(op, parameters) of every item of a suite, without a run of pytest: its ids are names and `pytest.param` ids."""
    module = importlib.import_module(f"bench.{suite.stem}")
    marks = getattr(module, "pytestmark", [])
    for name, function in vars(module).items():
        if name.startswith("test_bench_"):
            own = [*(marks if isinstance(marks, list) else [marks]), *getattr(function, "pytestmark", [])]
            axes = [list(mark.args[1]) for mark in own if mark.name == "parametrize"]
            for values in itertools.product(*axes):
                ids = [getattr(value, "id", None) or getattr(value, "values", [value])[0] for value in values]
                yield name.removeprefix("test_bench_"), frozenset("-".join(map(str, ids)).split("-"))


def test_every_goal_asks_for_a_row_that_the_suites_have():
    """A renamed case would leave its goal unmeasured for ever."""
    there = {item for suite in (ROOT / "bench").glob("test_bench_*.py") for item in items(suite)}
    for goal in GOALS:
        op, case, provider = goal.row
        case = frozenset(case.split("-"))
        assert {(op, case | {provider}), (op, case)} & there, goal.what


def test_without_a_record_it_says_so(tmp_path):
    text = report(tmp_path / "results", tmp_path)
    assert "No record at all yet" in text
    assert "No GPU record yet" in text


@pytest.mark.usefixtures("undrawn")
def test_a_busy_machine_is_owned_up_to(results, tmp_path):
    assert "busy" not in report(results, tmp_path)
    write(results / "some-processor", "first.json", rows(), load=[4.0, 4.0, 4.0])
    assert "**The machine was busy with other work**" in report(results, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_gpu_record_ends_the_excuse(results, tmp_path):
    write(results / "gpu", "first.json", rows(), device="GPU", type="cuda", clocks={"clocks.sm": "1980 MHz"})
    text = report(results, tmp_path)
    assert "No GPU record yet" not in text
    assert "1980 MHz" in text
