"""One case of a benchmark: the same work by several providers, each checked before any is timed.

A variant's gate checks the result of the same call that is then sampled. A variant whose gate is red is not timed. All
others of the case are sampled in turn. Where a formula gives the fewest bytes that the op must move, a plain copy of as
many bytes is sampled with them: its time is the floor of the op.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bench.harness.machine import Ceilings, copy_call, settle
from bench.harness.timing import Call, Sampler, Timing, build_sampler, interleave


class NotRun(Exception):
    """A variant that cannot run here, with the reason that its row will give."""


@dataclass
class Variant:
    """One provider. `make()` builds inputs of its own (the same values every time) and returns the call to time."""

    make: Callable[[], Call]
    gate: Callable[[], None] | None = None  # instead of Case.check on the call's first result
    graph: bool = True  # whether a CUDA graph can capture the call
    before: Callable[[], object] = lambda: None  # called before each sample, untimed
    info: Callable[[Timing], dict[str, Any]] | None = None  # further fields of its row


@dataclass
class Case:
    variants: dict[str, Variant]
    shapes: dict[str, Any]
    dtype: torch.dtype
    check: Callable[[Any], None] | None = None  # raises AssertionError for a wrong result of a call
    nbytes: int | None = None  # the fewest bytes the op must move, by its own formula
    flops: float | None = None  # of real tokens only, no padding
    block: tuple[int, int, int] | None = None  # rows, dim, mlp_dim: the matrix products that set the FLOP/s ceiling
    seconds: float = 0.4  # of sampling, a variant
    host: bool = False  # runs on the CPU, whatever the device of the session
    note: Callable[[float], dict[str, float]] | None = None  # readable figures, from the median in seconds
    info: dict[str, Any] = field(default_factory=dict)  # further fields of every row


@dataclass
class Outcome:
    """The result of one variant: the fields of its row; without a time, the reason or the error is there."""

    fields: dict[str, Any]
    timing: Timing | None = None
    error: BaseException | None = None


def measure(case: Case, ceilings: Ceilings, *, pace: float = 1.0) -> dict[str, Outcome]:
    """Gate and then time every variant; `pace` scales the time spent. Each has an outcome, even if others fail."""
    device = torch.device("cpu") if case.host else ceilings.device
    matmul = case.flops / ceilings.matmul_rate(*case.block, case.dtype) if case.flops and case.block else None
    # All gates come before the first warm-up: the providers of a step share their weights, and a step may move them.
    calls, outcomes = attempt(case.variants, lambda name, variant: prove(name, case, variant))

    def sampler(name: str, call: Call) -> Sampler:
        variant = case.variants[name]
        return build_sampler(variant.make, device, first=call, nbytes=case.nbytes or 0, graph=variant.graph)

    samplers, failed = attempt(calls, sampler)
    before = {name: case.variants[name].before for name in samplers}
    outcomes |= failed
    if not samplers:
        return outcomes
    if case.nbytes:
        samplers["copy"] = build_sampler(lambda: copy_call(case.nbytes, device), device, nbytes=case.nbytes)
    settle(device, 0.2)
    timings = interleave(samplers, before, seconds=case.seconds * pace, min_rounds=5 if pace >= 1 else 3)
    floor = lowest_time(timings.pop("copy", None), matmul)
    for name, timing in timings.items():
        fields = {"status": "timed", "seconds": timing.summary(), "clock": timing.clock, **floor}
        if timing.launch_s is not None:
            fields["launch_us"] = 1e6 * timing.launch_s
        if floor:
            fields["share"] = floor["floor_s"] / timing.median
        if name != "ours" and "ours" in timings:
            fields["ours_is"] = ratio(timing, timings["ours"])
        if case.note is not None:
            fields["note"] = case.note(timing.median)
        if variant_info := case.variants[name].info:
            fields |= variant_info(timing)
        outcomes[name] = Outcome(fields, timing)
    return outcomes


def ratio(other: Timing, ours: Timing) -> dict[str, float]:
    """How many times as fast ours is, round by round: a machine that slows down slows both samples of a round."""
    rounds = np.array(other.samples) / np.array(ours.samples)
    return dict(zip(("median", "p10", "p90"), np.quantile(rounds, [0.5, 0.1, 0.9]).tolist(), strict=True))


def observe(case: Case, ceilings: Ceilings, *, pace: float = 1.0) -> dict[str, Outcome]:
    """Instead of `measure`, for peak memory: `make()` itself runs the gate and the call and returns a row's fields.

    Variants run one after the other. `pace` is ignored.
    """
    seen, outcomes = attempt(case.variants, lambda _, variant: variant.make())
    for name, fields in seen.items():
        timing = Timing("wall", None, [fields["seconds"]["median"]])
        outcomes[name] = Outcome({"status": "observed", **fields}, timing)
        if name != "ours" and "ours" in seen:
            outcomes[name].fields["ours_peak"] = seen["ours"]["peak_bytes"] / fields["peak_bytes"]
    return outcomes


def prove(name: str, case: Case, variant: Variant) -> Call:
    """Run the gate and return the call to time. AssertionError: the gate is red; ValueError: there is no gate."""
    if variant.gate is not None:
        variant.gate()
        return variant.make()
    if case.check is None:
        raise ValueError(f"{name} has no gate, and nothing is timed without one")
    call = variant.make()
    case.check(call())
    return call


def attempt(items: dict[str, Any], do: Callable[[str, Any], Any]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """`do` of every item: the results of those that succeed, and what to report of the others."""
    done, failed = {}, {}
    for name, item in items.items():
        try:
            done[name] = do(name, item)
        except NotRun as reason:
            failed[name] = Outcome({"status": f"not run: {reason}"})
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            failed[name] = Outcome({"status": "out of memory"})
        except Exception as error:
            kind = "gate red" if isinstance(error, AssertionError) else "error"
            failed[name] = Outcome({"status": f"{kind}: {_first_line(error)}"}, error=error)
    return done, failed


def lowest_time(copy: Timing | None, matmul: float | None) -> dict[str, Any]:
    """The least time a case can take on this machine, and what bounds it: a copy of its bytes, or its products."""
    bounds = {} if copy is None else {"copy": copy.median}
    if matmul is not None:
        bounds["matmul"] = matmul
    if not bounds:
        return {}
    bound = max(bounds, key=bounds.get)
    return {"floor_s": bounds[bound], "bound": bound}


def assert_close(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest magnitude in its expected one, and not a NaN anywhere."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected), f"{len(actual)} tensors where {len(expected)} are expected"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"tensor {i} is {list(a.shape)}, expected {list(e.shape)}"
        worst = (a.double() - e.to(a.device).double()).abs().max().item() if a.numel() else 0.0
        limit = tolerance * max(e.abs().max().item() if e.numel() else 0.0, 1e-30)
        assert worst <= limit, f"tensor {i} is off by {worst:.2e}, allowed {limit:.2e}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
