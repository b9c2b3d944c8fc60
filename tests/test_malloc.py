import ctypes
import subprocess
import sys

import pytest

HEAP = """
import ctypes, sys
from ijepa_fast.malloc import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
if sys.argv[1] == "kept":
    keep_freed_memory()
libc.free(libc.malloc(30 << 20))  # from here on blocks of this size come from the heap by default too
blocks = [libc.malloc(30 << 20) for _ in range(8)]
full = libc.sbrk(0)
for block in reversed(blocks):
    libc.free(block)
print(full - libc.sbrk(0))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="about a setting of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_for_the_next_step(kept):
    """How far the heap's end comes back when 240 MiB at its end are freed."""
    command = [sys.executable, "-c", HEAP, "kept" if kept else "returned"]
    returned = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert returned == 0 if kept else returned > 100 << 20
