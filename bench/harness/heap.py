"""What the C library does with freed memory while a provider's step is timed: each has its own user's setting.

`kept`: as `ijepa_fast.train` sets it on a CPU. `returned`: glibc's way, where a step faults in again what the one
before gave back. The setting is the process's: whoever follows a provider of the other kind runs a step untimed first.
"""
import ctypes
from collections.abc import Callable

from ijepa_fast.malloc import LARGEST_MMAP_THRESHOLD, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

_now: str | None = None


def enter(setting: str, settle: Callable[[], object] = lambda: None) -> None:
    """Make `setting`, "kept" or "returned", the process's; where it was the other, run `settle` under it."""
    global _now
    if setting == _now:
        return
    _now = setting
    if setting == "kept":
        keep_freed_memory()
    elif mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        # Where glibc's own, growing thresholds end up after a step of tensors of up to 32 MB.
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
    settle()
