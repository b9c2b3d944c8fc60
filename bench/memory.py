"""The most memory that a call holds at once beyond what was there before it.

CUDA: PyTorch's allocator keeps that peak. CPU: its allocator tells the profiler of every block it hands out and takes
back, so the peak is that of all tensor storages together: saved activations, gradients, the buffers inside of ops and
of compiled code. Only the scratch space of the matrix libraries is not seen.
"""
from collections.abc import Callable, Iterable

import torch
from torch._C._profiler import _EventType


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return highest(size for _, size in sorted(_cpu_blocks(profile)))


def highest(changes: Iterable[int]) -> int:
    """The largest sum of the first so many `changes`, bytes taken (positive) and given back (negative) in turn."""
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _cpu_blocks(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Time and size of every block taken, or given back: then the size is negative."""
    blocks, pending = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            blocks.append((event.start_time_ns, event.extra_fields.alloc_size))
    return blocks
