"""`train.profile: N`: where N updates of a run spend their time, as a trace and as a table."""
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 3  # updates before: they compile, allocate, and fill the queues of the loader
ROWS = 40


@contextlib.contextmanager
def profiled(steps: int | None, folder: Path, report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Inside, call what it gives after every update. Writes `folder`/profile.json (for Perfetto or chrome://tracing)
    and profile.txt, PyTorch's operators by the time they take themselves; a shorter run gives what there is.

    A profiled update is a little slower than others.
    """
    if steps is None:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the library under it writes to stderr when it starts
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, order = [*activities, ProfilerActivity.CUDA], "self_device_time_total"

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / "profile.json"))
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        (folder / "profile.txt").write_text(table)
        report(f"profile     {folder / 'profile.txt'}, {folder / 'profile.json'}")

    stages = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    # acc_events: there is one cycle, whose events are all wanted; without it PyTorch warns that a next would drop them
    with profile(activities=activities, schedule=stages, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
