"""How many threads torch gets on a CPU: what this process may use, and what its user asked for."""
import contextlib
import os
from pathlib import Path

from ijepa_fast.errors import UserError


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may run on: its affinity, less where a cgroup's quota of CPU time is smaller."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *_quotas(cgroup)]))


def _quotas(cgroup: Path) -> list[int]:
    """Whole cores that the quotas of cgroup v2 or v1 allow, rounded up; none where there is no quota."""
    pairs = []
    with contextlib.suppress(OSError):
        pairs.append((cgroup / "cpu.max").read_text().split())  # "max 100000" or "150000 100000"
    with contextlib.suppress(OSError):
        v1 = cgroup / "cpu"
        pairs.append([(v1 / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")])
    return [-(-int(quota) // int(period)) for quota, period in pairs if quota.isdigit() and int(period)]


def torch_threads(asked: int | None, processes: int) -> tuple[int, str]:
    """The number for each of `processes` on this machine, and what it comes from. `asked`: parallel.cpu_threads."""
    if asked is not None:
        return asked, "parallel.cpu_threads"
    words = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    # torchrun sets it to 1 for several processes where the user did not: that says nothing of what was meant.
    if words and not (words == "1" and processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        if not words.isdigit() or not 1 <= int(words) <= 1024:
            raise UserError(f"OMP_NUM_THREADS={words} is no number of threads, from 1 to 1024")
        return int(words), "OMP_NUM_THREADS"
    cores = usable_cores()
    return max(1, cores // processes), f"{cores} usable cores" + (f", {processes} processes" if processes > 1 else "")
