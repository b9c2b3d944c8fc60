"""How time is taken. The variants of a case are sampled in turn, so a disturbance of the machine hits them all.

CPU: wall time; a sample is as many calls as fill two milliseconds. CUDA: the calls of a sample are one captured graph.
They work on buffers that rotate past three times the L2, and events around the replay give GPU time without launch
overhead, which is reported apart. A whole step with its optimizer is not captured: events surround eager calls.
"""
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]
SAMPLE_S = 2e-3  # the least a CPU sample lasts: ten thousand times the clock's own cost
GRAPH_S = 2e-4  # the least a captured graph lasts: 400 times the resolution of an event
# A CPU call is warm after two calls that took WARM_S in all, or after one call of LONG_S.
WARM_S, LONG_S = 0.05, 1.0
MAX_BUFFERS = 64


class Sampler(Protocol):
    clock: str  # "wall", "graph" or "events"
    launch_s: float | None  # host time of one eager call, on CUDA

    def sample(self) -> float:
        """Seconds of one call."""


@dataclass
class Timing:
    """Samples of one variant, in seconds a call, in the order they were taken."""

    clock: str
    launch_s: float | None
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def summary(self) -> dict[str, Any]:
        names, levels = ("median", "p10", "p25", "p75", "p90"), (0.5, 0.1, 0.25, 0.75, 0.9)
        quantiles = dict(zip(names, np.quantile(self.samples, levels).tolist(), strict=True))
        return {**quantiles, "min": min(self.samples), "rounds": len(self.samples)}


def interleave(
    samplers: Mapping[str, Sampler],
    before: Mapping[str, Call] | None = None,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Sample every variant once a round, for about `seconds` a variant. Each round begins with another variant.

    `before` maps a variant to a call that comes before each of its samples, untimed.
    """
    timings = {name: Timing(sampler.clock, sampler.launch_s) for name, sampler in samplers.items()}
    names, end = list(samplers), time.perf_counter() + seconds * len(samplers)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() > end:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if before and name in before:
                    before[name]()
                timings[name].samples.append(samplers[name].sample())
    finally:
        if collecting:
            gc.enable()
    return timings


def build_sampler(
    make: Callable[[], Call],
    device: torch.device,
    *,
    first: Call | None = None,
    nbytes: int = 0,
    graph: bool = True,
) -> Sampler:
    """A sampler of the call that `make` returns, warmed up. `first`: what an earlier `make()` returned, if any.

    Each `make()` allocates its own buffers. `nbytes`, what a call touches, decides how many sets rotate on CUDA.
    """
    first = make() if first is None else first
    if device.type != "cuda":
        return WallSampler(first)
    if not graph:
        return EventSampler(first, device)
    buffers = min(MAX_BUFFERS, math.ceil(3 * l2_bytes(device) / nbytes)) if nbytes else 1
    return GraphSampler([first, *(make() for _ in range(buffers - 1))], device)


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


class WallSampler:
    clock, launch_s = "wall", None

    def __init__(self, call: Call):
        self.call = call
        warm, spent = [], 0.0
        while spent < WARM_S or (len(warm) < 2 and spent < LONG_S):
            start = time.perf_counter()
            call()
            warm.append(time.perf_counter() - start)
            spent += warm[-1]
        self.calls = max(1, math.ceil(SAMPLE_S / np.median(warm)))

    def sample(self) -> float:
        call, calls = self.call, range(self.calls)
        start = time.perf_counter()
        for _ in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


class EventSampler:
    """Events around eager calls: the time of a GPU that waits for its launches where they are slower than its work."""

    clock = "events"

    def __init__(self, call: Call, device: torch.device):
        self.call = call
        for _ in range(3):
            call()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        self.launch_s = time.perf_counter() - start
        torch.cuda.synchronize(device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        self.start.record()
        self.call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000


class GraphSampler:
    """One CUDA graph of calls over rotating buffers, replayed."""

    clock = "graph"

    def __init__(self, calls: list[Call], device: torch.device):
        torch.cuda.synchronize(device)
        side = torch.cuda.Stream(device)  # a capture must be warmed up on a stream that is not the default one
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for call in calls:
                for _ in range(2):
                    call()
            side.synchronize()
            begin = time.perf_counter()
            for call in calls:
                call()
            self.launch_s = (time.perf_counter() - begin) / len(calls)
            side.synchronize()
            eager = (time.perf_counter() - begin) / len(calls)
        torch.cuda.current_stream(device).wait_stream(side)
        turns = max(1, math.ceil(GRAPH_S / (eager * len(calls))))
        self.calls = len(calls) * turns
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(turns):
                for call in calls:
                    call()
        self.buffers = calls  # the graph holds addresses only
        self.graph.replay()
        torch.cuda.synchronize(device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000 / self.calls
