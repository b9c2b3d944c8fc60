"""Memory of a run: its peak, and advice where it runs out."""
import contextlib
import resource
from collections.abc import Iterator

import torch

from ijepa_fast.errors import UserError


@contextlib.contextmanager
def memory_advice(micro_batch: int) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU or the machine into a UserError with advice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory with optim.micro_batch={micro_batch}; lower it, for instance to {max(1, micro_batch // 2)} "
            f"(gradients accumulate over micro-batches, so the run computes the same)"
        ) from None


def peak_memory(device: torch.device, *, reserved: bool = False) -> int:
    """Bytes: the allocator's peak on CUDA, the process's resident peak on a CPU.

    `reserved`: with what the allocator keeps though no tensor holds it, as for captured graphs.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated)(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
