"""What the C library does with freed memory while a step is timed: for each provider as its user would have it.

`kept`: as `ijepa_fast.train` sets it on a CPU. `returned`: glibc's default, which hands freed memory back, so that the
next step has to fault it in again. The setting belongs to the process. After a change an untimed step comes first.
"""
import ctypes
from collections.abc import Callable

from ijepa_fast.malloc import LARGEST_MMAP_THRESHOLD, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

_now: str | None = None


def enter(setting: str, settle: Callable[[], object] = lambda: None) -> None:
    """Set the process to "kept" or "returned"; if that is a change, call `settle` under the new setting."""
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
