"""Puts the harness under pytest: options, the `bench` fixture, and the list of what was not run.

A row of the benchmark is a test item with a parameter `provider`. The first item of a case measures all its providers
in turn; every item then reports its own. pytest-benchmark gets the samples through a clock that replays them, since on
a GPU time is taken by events and not between two calls of a timer.
"""
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.harness import heap
from bench.harness.compare import Case, Outcome, attempt, measure
from bench.harness.machine import Ceilings, cores, describe, settle
from bench.harness.rows import Record, left_out, table

QUICK_PACE = 0.25


class ReplayClock:
    """A timer for pytest-benchmark that replays times measured before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("ijepa benchmarks")
    group.addoption("--quick", action="store_true", help="two minutes: the marked cases only, fewer samples")
    group.addoption("--released", type=Path, metavar="CHECKOUT", help="a checkout of the released I-JEPA code to time")
    group.addoption("--device", default=None, help="cpu or cuda; left out: cuda where there is one")
    group.addoption("--threads", type=int, default=cores(), help="torch's own threads (default: the machine's cores)")
    group.addoption("--compile", action="store_true", help="torch.compile on a CPU too, where it takes minutes")
    group.addoption("--record", type=Path, metavar="FILE", help="write every row into this JSON file")
    group.addoption("--again", action="store_true", help="a second run: compare its rows with those in --record")
    group.addoption("--profile", action="store_true", help="add to every step's row where its time goes, op by op")
    group.addoption("--budget", type=float, metavar="S", help="start no further case after this many seconds")


def pytest_configure(config):
    config.stash[SESSION] = Session(config)


def pytest_collection_modifyitems(config, items):
    session = config.stash[SESSION]
    # The providers of a case run one after the other, whatever the order of the parameters.
    first = {}
    for place, item in enumerate(items):
        first.setdefault((item.path, *identity(item)[:3]), place)
    items.sort(key=lambda item: first[item.path, *identity(item)[:3]])
    for item in items:
        if "bench" not in item.fixturenames:
            continue
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if session.device.type == "cpu" and item.get_closest_marker("gpu_only"):
            session.leave_out(item, "GPU only")
        elif config.getoption("quick") and not item.get_closest_marker("quick"):
            session.leave_out(item, "not part of --quick")


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if session.rows:
        terminalreporter.section("of the ceiling, worst first")
        for line in table([row for row in session.rows if "seconds" in row]):
            terminalreporter.line(line)
    if lines := left_out(session.rows):
        terminalreporter.section("not run")
        for line in lines:
            terminalreporter.line(line)
    if session.ceilings.measured:
        terminalreporter.section("ceilings of this machine, measured in this session")
        for name, rate in session.ceilings.measured.items():
            unit, scale = ("GB/s", 1e9) if name == "copy" else ("TFLOP/s", 1e12)
            terminalreporter.line(f"{name}: {rate / scale:.4g} {unit}")


class Session:
    """What the cases of one run share."""

    def __init__(self, config):
        name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.device = config, torch.device(name)
        self.pace = QUICK_PACE if config.getoption("quick") else 1.0
        self.ceilings = Ceilings(self.device)
        self.rows: list[dict] = []
        self.measured: tuple[str, dict[str, Outcome], Case | Outcome] | None = None  # the last case
        self.started = None
        path = config.getoption("record")
        self.record = Record(path, again=config.getoption("again")) if path else None

    def start(self) -> None:
        """Before the first case: pin the threads, settle the clocks, record what the machine is."""
        if self.started is not None:
            return
        self.started = time.monotonic()
        torch.set_num_threads(self.config.getoption("threads"))
        if self.device.type == "cpu":
            heap.enter("kept")
        settle(self.device)
        if self.record is not None:
            self.record.open_session(describe(self.device))["ceilings"] = self.ceilings.measured
        self.ceilings.copy_bandwidth()

    def leave_out(self, item, reason: str) -> None:
        item.add_marker(pytest.mark.skip(reason=f"not run: {reason}"))
        item.stash[REASON] = reason

    def out_of_time(self) -> bool:
        budget = self.config.getoption("budget")
        return budget is not None and time.monotonic() - self.started > budget

    def report(self, item, fields: dict) -> None:
        suite, op, case, provider = identity(item)
        row = {"suite": suite, "op": op, "case": case, "provider": provider, **fields}
        self.rows.append(row)
        if self.record is not None:
            self.record.add(row)


SESSION = pytest.StashKey[Session]()
REASON = pytest.StashKey[str]()


def identity(item) -> tuple[str, str, str, str]:
    """suite, op, case and provider of an item: test_bench_ops.py::test_bench_ema[vit_base-ours] and so on."""
    suite, op = item.path.stem.removeprefix("test_bench_"), item.originalname.removeprefix("test_bench_")
    params = item.callspec.id.split("-") if hasattr(item, "callspec") else []
    provider = str(item.callspec.params.get("provider", "ours")) if params else "ours"
    if provider in params:
        params.remove(provider)
    return suite, op, "-".join(params), provider


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Items left out at collection get a row too."""
    if REASON in item.stash:
        session = item.config.stash[SESSION]
        session.start()
        session.report(item, {"status": f"not run: {item.stash[REASON]}"})


class Bench:
    """The fixture: `bench(build)` measures the case `build()` makes, once for its providers, and reports a row."""

    def __init__(self, session: Session, item, benchmark):
        self.session, self.item, self.benchmark = session, item, benchmark
        self.device, self.ceilings = session.device, session.ceilings
        self.compiled = self.device.type == "cuda" or session.config.getoption("compile")
        self.released, self.profile = (session.config.getoption(name) for name in ("released", "profile"))

    def __call__(self, build, how=measure) -> None:
        suite, op, name, provider = identity(self.item)
        key = f"{suite} {op} {name}".strip()
        session = self.session
        if session.measured is None or session.measured[0] != key:
            session.measured = None  # frees the last case's tensors before this one's are made
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # what was compiled for other shapes must not make this case's dynamic
            if session.out_of_time():
                self._skip("out of time")
            built, failed = attempt({"case": build}, lambda _, build: build())
            if failed:  # the case itself cannot be made: so it is for every provider
                session.measured = key, {}, failed["case"]
            else:
                case = built["case"]
                session.measured = key, how(case, session.ceilings, pace=session.pace), case
                case.variants = {}
        _, outcomes, case = session.measured
        outcome, about = outcomes.get(provider, case), {}
        if isinstance(case, Case):
            about = {"shapes": case.shapes, "dtype": str(case.dtype).removeprefix("torch.")}
            about |= {"bytes": case.nbytes, "flops": case.flops, **case.info}
        self.report(key, {**about, **outcome.fields}, outcome.timing.samples if outcome.timing else [], outcome.error)

    def report(self, group: str, fields: dict, samples: list[float], error: BaseException | None = None) -> None:
        """Record a row and give pytest-benchmark its samples; without any, skip the item or fail it with `error`."""
        self.session.report(self.item, fields)
        if error is not None:
            raise error
        if not samples:
            self._skip(fields["status"].removeprefix("not run: "), reported=True)
        self.benchmark.group = group
        self.benchmark.extra_info.update(fields)
        remaining = iter(samples)

        def tick() -> None:
            CLOCK.now += next(remaining)

        self.benchmark.pedantic(tick, rounds=len(samples))

    def _skip(self, reason: str, *, reported: bool = False) -> None:
        if not reported:
            self.session.report(self.item, {"status": f"not run: {reason}"})
        self.benchmark.skipped = True
        pytest.skip(f"not run: {reason}")


@pytest.fixture
def bench(request, benchmark) -> Bench:
    session = request.config.stash[SESSION]
    session.start()
    return Bench(session, request.node, benchmark)
