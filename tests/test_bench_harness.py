"""bench/harness/: what is timed, and what a record and its table say of it. No timing is asserted."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.harness.compare import Case, NotRun, Variant, assert_close, measure
from bench.harness.machine import Ceilings, folder_name
from bench.harness.rows import Record, table
from bench.harness.timing import Timing, interleave

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class Counted:
    """A call that counts how often it is made, and returns what it was given."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        return self.result


def is_one(result):
    assert result == 1, f"it is {result}"


def measured(variants, **fields):
    case = Case(variants, {}, torch.float32, check=is_one, seconds=0.0, **fields)
    return measure(case, Ceilings(CPU))


def test_only_what_its_gate_lets_through_is_sampled():
    right, wrong, gated, seen = Counted(1), Counted(2), Counted(1), []

    def absent():
        raise NotRun("no such library")

    variants = {
        "right": Variant(lambda: right),
        "wrong": Variant(lambda: wrong),
        "absent": Variant(absent),
        "gated": Variant(lambda: gated, gate=lambda: seen.append(right.calls)),
    }
    outcomes = measured(variants)
    assert outcomes["right"].fields["status"] == "timed"
    assert right.calls > 1
    assert wrong.calls == 1, "a call was sampled although its gate was red"
    assert outcomes["wrong"].timing is None
    assert outcomes["wrong"].fields == {"status": "gate red: it is 2"}
    assert isinstance(outcomes["wrong"].error, AssertionError)
    assert outcomes["absent"].fields == {"status": "not run: no such library"}
    assert outcomes["absent"].error is None
    assert seen == [1], "a variant was sampled before the gate of another"


def test_nothing_is_timed_without_a_gate():
    call = Counted(1)
    case = Case({"ours": Variant(lambda: call)}, {}, torch.float32)
    outcome = measure(case, Ceilings(CPU))["ours"]
    assert outcome.timing is None
    assert "no gate" in outcome.fields["status"]
    assert call.calls == 0


def test_share_is_the_lowest_time_over_the_median():
    ceilings = Ceilings(CPU)
    ceilings.measured["matmul float32 8x16 mlp 64"] = 1e9  # FLOP/s, as if measured
    variants = {"ours": Variant(lambda: Counted(1))}
    case = Case(variants, {}, torch.float32, check=is_one, flops=5e3, block=(8, 16, 64), seconds=0.0)
    fields = measure(case, ceilings)["ours"].fields
    assert fields["bound"] == "matmul"
    assert fields["floor_s"] == pytest.approx(5e-6)
    assert fields["share"] == pytest.approx(5e-6 / fields["seconds"]["median"])


def test_rounds_begin_with_another_variant_each_time():
    order = []

    class Sampler:
        clock, launch_s = "wall", None

        def __init__(self, name):
            self.name = name

        def sample(self):
            order.append(self.name)
            return 1.0

    timings = interleave({name: Sampler(name) for name in "abc"}, seconds=0.0, min_rounds=3)
    assert "".join(order) == "abcbcacab"
    order.clear()
    interleave({name: Sampler(name) for name in "ab"}, {"b": lambda: order.append("-")}, seconds=0.0, min_rounds=2)
    assert "".join(order) == "a-b-ba"
    assert all(timing.samples == [1.0] * 3 for timing in timings.values())


def test_quantiles_are_those_of_the_samples():
    summary = Timing("wall", None, [float(x) for x in range(11)]).summary()
    assert (summary["p10"], summary["median"], summary["p90"], summary["rounds"]) == (1.0, 5.0, 9.0, 11)


@pytest.mark.parametrize("actual", [[1.0, float("nan")], [1.0, 2.1], [1.0]])
def test_assert_close_refuses(actual):
    with pytest.raises(AssertionError):
        assert_close([torch.tensor(actual)], [torch.tensor([1.0, 2.0])], 1e-3)


def row(provider="ours", median=1.0, **fields):
    seconds = {"median": median, "p10": median, "p90": median}
    key = {"suite": "ops", "op": "ema", "case": "B16", "provider": provider}
    return {**key, "status": "timed", "seconds": seconds, **fields}


def test_the_record_is_whole_after_every_row(tmp_path):
    record = Record(tmp_path / "record.json")
    record.open_session({"device": "a"})
    for provider in ("ours", "eager"):
        record.add(row(provider))
        kept = json.loads((tmp_path / "record.json").read_text())
        assert kept["rows"][-1]["provider"] == provider
    again = Record(tmp_path / "record.json")
    again.open_session({"device": "a"})
    again.add(row("eager", 3.0))
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    kept = [(r["provider"], r["seconds"]["median"], r["session"]) for r in rows]
    assert kept == [("ours", 1.0, 0), ("eager", 3.0, 1)]


def test_a_second_run_marks_rows_and_replaces_none(tmp_path):
    first = Record(tmp_path / "record.json")
    first.open_session({})
    first.add(row(median=1.0))
    second = Record(tmp_path / "record.json", again=True)
    second.open_session({})
    second.add(row(median=1.1))
    (kept,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert kept["seconds"]["median"] == 1.0
    assert kept["again"]["differs"] == pytest.approx(0.1)
    assert "differs by 10%" in "\n".join(table([kept]))


def test_the_table_puts_the_worst_first_and_keeps_to_its_lines():
    rows = [row(f"p{i}", share=i / 100, bound="copy") for i in range(100, 0, -1)]
    lines = table(rows, max_lines=60)
    assert len(lines) == 60
    assert "p1 " in lines[1]
    assert "1% copy" in lines[1]
    assert lines[-1] == "... and 42 rows more, in the record"
    rows.append({**row("p0"), "status": "not run: GPU only"})
    del rows[-1]["seconds"]
    lines = table(rows, max_lines=60)
    assert len(lines) == 60
    assert lines[-2:] == ["... and 43 rows more, in the record", "ema: GPU only: B16 p0"]


def test_the_folder_is_named_after_the_processor():
    assert folder_name("Intel(R) Xeon(R) Processor, 2 cores") == "intel-xeon-processor-2-cores"
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


SUITE = """
import pytest, torch
from bench.harness import machine
from bench.harness.compare import Case, NotRun, Variant

machine.COPY_BYTES = 1 << 20  # this test is about rows: a gigabyte would only take time

def absent():
    raise NotRun("not installed")

def one(result):
    assert result == 1, "wrong"

def case():
    variants = {"ours": Variant(lambda: lambda: 1), "bad": Variant(lambda: lambda: 2), "absent": Variant(absent)}
    return Case(variants, {"n": 3}, torch.float32, check=one, seconds=0.0)

def broken():
    raise RuntimeError("no data")

@pytest.mark.quick
def test_bench_broken(bench):
    bench(broken)

@pytest.mark.parametrize("provider", ["ours", "bad", "absent"])
@pytest.mark.parametrize("size", [pytest.param("small", marks=pytest.mark.quick), "middle",
                                  pytest.param("large", marks=pytest.mark.gpu_only)])
def test_bench_sum(bench, size, provider):
    bench(case)
"""


@pytest.mark.long
def test_every_item_leaves_a_row(tmp_path):
    suite, out = tmp_path / "test_bench_demo.py", tmp_path / "record.json"
    suite.write_text(SUITE)
    options = ["--device", "cpu", "--threads", "1", "--quick", "--record", str(out)]
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-c", "pyproject.toml", str(suite)]
    # Under pytest-xdist the child would inherit that it is a worker, and pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [*command, "--benchmark-only", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    record = json.loads(out.read_text())
    assert [r["status"] for r in record["rows"] if r["op"] == "broken"] == ["error: no data"]
    status = {(r["case"], r["provider"]): r["status"] for r in record["rows"] if r["op"] == "sum"}
    assert status == {
        ("small", "ours"): "timed",
        ("small", "bad"): "gate red: wrong",
        ("small", "absent"): "not run: not installed",
        **{("middle", p): "not run: not part of --quick" for p in ("ours", "bad", "absent")},
        **{("large", p): "not run: GPU only" for p in ("ours", "bad", "absent")},
    }
    assert record["sessions"][0]["ceilings"]["copy"] > 0
    assert record["sessions"][0]["commit"]
    timed = next(r for r in record["rows"] if r["status"] == "timed")
    assert timed["seconds"]["rounds"] >= 3
    assert "2 failed, 1 passed, 7 skipped" in run.stdout
    for line in ("sum: GPU only: large", "sum: gate red: wrong: small bad"):
        assert line in run.stdout
