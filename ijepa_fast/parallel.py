"""Processes and devices: one process, or several under torchrun, with the same code.

`start` reads what torchrun puts into the environment. Gradients are averaged by DistributedDataParallel; the loss is
normalised by the global batch (objective), so world size and micro-batch do not change what a step computes.
"""
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.config import ParallelConfig
from ijepa_fast.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device
    ddp: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all ranks."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; waits for all ranks, on the host."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))  # a CPU tensor: goes through gloo, so the device is not waited for
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def gather(self, x: Tensor) -> Tensor:
        """`x` of every rank (equal shapes) concatenated along dimension 0, in order of rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over ranks."""
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if self.ddp else module

    @contextlib.contextmanager
    def accumulate(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, backward adds to local gradients and leaves the averaging to the step's last micro-batch."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                if self.ddp:
                    stack.enter_context(module.no_sync())
            yield


@contextlib.contextmanager
def start(config: ParallelConfig) -> Iterator[World]:
    """Join the processes torchrun started (if any), choose the device and pin torch's threads."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.strategy == "single" and size > 1:
        raise UserError(f"parallel.strategy=single runs one process, but {size} were started; use ddp or auto")
    # Sums of floats depend on the number of threads that share them, so it is pinned: part of a run's exactness.
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    ddp = config.strategy == "ddp" or size > 1
    if ddp and "RANK" not in os.environ:
        raise UserError("parallel.strategy=ddp needs torchrun: torchrun --nproc-per-node=2 -m ijepa_fast.train ...")
    if ddp:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device, ddp)
    finally:
        if ddp:
            dist.destroy_process_group()
