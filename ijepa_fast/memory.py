"""Memory: its peak, advice where it runs out, and not giving it back between steps."""
import contextlib
import ctypes
import resource
from collections.abc import Iterator

import torch

from ijepa_fast.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # that it takes


@contextlib.contextmanager
def memory_advice(micro_batch: int) -> Iterator[None]:
    """Turn an out-of-memory error, of a GPU or of the machine, into advice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory with optim.micro_batch={micro_batch}; lower it, for instance to {max(1, micro_batch // 2)} "
            f"(gradients accumulate over micro-batches, so the run computes the same)"
        ) from None


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, up to 32 MB a block, for its next step.

    glibc hands the free end of its heap back to the kernel, which zeroes every page again when the next step touches
    it: 4 to 12 % of a ViT-S/16 step at batch 16 on two cores of an EPYC. Other C libraries have no such setting, and
    are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)  # where it arrives by itself, until a setting stops it
        mallopt(M_TRIM_THRESHOLD, -1)
