"""Where the time of one call goes, by PyTorch's profiler: for the record of a step that misses its goal."""
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity


def top_ops(call: Callable[[], object], device: torch.device, most: int = 15) -> list[dict[str, Any]]:
    """The `most` ops (on CUDA: kernels) with the largest time of their own: name, calls, ms, share of all in %."""
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
