"""What one call takes, by PyTorch's allocator and profiler: its peak memory, and its time op by op."""
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `call` holds at once beyond what was there before it.

    CUDA: PyTorch's allocator keeps that peak. CPU: the allocator tells the profiler of every block it hands out and
    takes back, so the peak covers all tensor storages: saved activations, gradients, the buffers inside ops and
    compiled code. Only the scratch space of the matrix libraries is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return highest(size for _, size in sorted(_cpu_blocks(profile)))


def highest(changes: Iterable[int]) -> int:
    """The largest sum of the first so many `changes`, bytes taken (positive) and given back (negative) in turn."""
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def top_ops(call: Callable[[], object], device: torch.device, most: int = 15) -> list[dict[str, Any]]:
    """The `most` ops (on CUDA: kernels) that take the most time themselves: name, calls, ms, % of the total."""
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profile:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    spent = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in profile.key_averages()]
    total = sum(us for us, _ in spent) or 1.0
    spent.sort(key=lambda pair: pair[0], reverse=True)
    return [
        {"name": event.key, "calls": event.count, "ms": us / 1e3, "percent": 100 * us / total}
        for us, event in spent[:most]
    ]


def _cpu_blocks(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Time and size of every block taken, or given back: then the size is negative."""
    blocks, pending = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            blocks.append((event.start_time_ns, event.extra_fields.alloc_size))
    return blocks
