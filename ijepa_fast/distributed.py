"""The processes of a run: joining them, their collectives, errors that all of them raise, and leaving.

`join` meets the processes that torchrun (or `ijepa_fast.launch`) started and picks the strategy by which
`ijepa_fast.parallel` spreads the models:

- `single`: one process.
- `ddp`: every rank holds everything; gradients are averaged.
- `fsdp`: parameters, gradients and optimizer state are cut over all ranks (FSDP2, `fully_shard`).
- `hsdp`: the same within groups of `parallel.shard_size` ranks (a node), each group a replica.
"""
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ijepa_fast.config import Config
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.malloc import keep_freed_memory
from ijepa_fast.threads import torch_threads

# What `auto` shards on CUDA. A parameter with target, gradient and AdamW state takes 20 bytes: under ddp the huge takes
# 13 GB of every GPU before the first activation, and the giant 20.
_TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")
SHARDED = ("vit_huge", "vit_giant")


@dataclass(frozen=True)
class World:
    """This process's rank of `size`, its device, and for FSDP the `mesh`: [shard] or [replicate, shard]."""

    rank: int
    size: int
    device: torch.device
    strategy: str
    mesh: DeviceMesh | None = None
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all ranks, which takes its place; of a CUDA tensor the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; waits for all ranks, on the host."""
        return bool(self.largest(flag)[0])

    def largest(self, *values: float) -> list[float]:
        """The largest of each value on any rank; waits for all ranks, on the host."""
        if self.size == 1:
            return list(values)
        votes = torch.tensor(values, dtype=torch.float64)  # on the CPU, so by gloo: the device is not waited for
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return votes.tolist()

    def gather(self, x: Tensor) -> Tensor:
        """`x` of every rank (equal shapes) concatenated along dimension 0, in order of rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def gather_objects(self, x: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """`x` of every rank, in order of rank."""
        if self.size == 1:
            return [x]
        every = [None] * self.size
        dist.all_gather_object(every, x, group=group)
        return every

    @contextlib.contextmanager
    def raise_on_all_ranks(self, group: dist.ProcessGroup | None = None) -> Iterator[None]:
        """Around code without collectives: a UserError raised on one rank is raised on all, with the same message."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        problems = self.gather_objects(problem, group)
        if not any(problems):
            return
        first = next(rank for rank, message in enumerate(problems) if message)
        who = f"rank {first}: " if first else ""
        raise SharedError(f"{who}{problems[first]}")

    def long_timeout_group(self) -> dist.ProcessGroup | None:
        """A gloo group that waits up to a day; its default of half an hour is too short to index or to write a lot."""
        return dist.new_group(backend="gloo", timeout=timedelta(days=1)) if self.size > 1 else None

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        self.any(False)


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the processes torchrun started (if any), choose device and strategy, and pin torch's threads."""
    alone, local_size = _this_process(config.parallel.cpu_threads)
    rank, size, device = alone.rank, alone.size, alone.device
    strategy = _strategy(config, size, device)
    if strategy == "single":
        yield alone
        return
    if "RANK" not in os.environ:
        raise UserError(
            f"parallel.strategy={strategy} needs torchrun: torchrun --nproc-per-node=2 -m ijepa_fast.train ..."
        )
    shards = config.parallel.shard_size or local_size
    if strategy == "hsdp" and size % shards:
        raise UserError(f"parallel.shard_size={shards} does not divide the {size} processes")
    dist.init_process_group(_backends(device))
    _check_same_config(World(rank, size, device, strategy), config)
    mesh = None
    if strategy == "fsdp":
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    elif strategy == "hsdp":
        mesh = init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    yield World(rank, size, device, strategy, mesh, alone.local_rank)
    # Not after an error: it would wait for collectives that this rank takes no part in. Exiting closes its connections,
    # and the other ranks lose contact.
    dist.destroy_process_group()


def _place(rank: str, size: str) -> tuple[int, int]:
    """The values of two variables that torchrun sets: a rank, and of how many; (0, 1) where it did not start this."""
    values = []
    for name, default in ((rank, "0"), (size, "1")):
        if not (text := os.environ.get(name, default)).isdigit():
            raise UserError(f"{name}={text} is no number: start with torchrun, or unset it")
        values.append(int(text))
    if values[0] >= values[1]:
        raise UserError(f"{rank}={values[0]} is not below {size}={values[1]}: start with torchrun, or unset both")
    return values[0], values[1]


@contextlib.contextmanager
def join_replicas(cpu_threads: int | None = None) -> Iterator[World]:
    """The same without a config, for ranks that hold whole models each, as evaluation does."""
    alone, _ = _this_process(cpu_threads)
    if alone.size == 1:
        yield alone
        return
    dist.init_process_group(_backends(alone.device))
    yield dataclasses.replace(alone, strategy="ddp")
    dist.destroy_process_group()


def has_joined() -> bool:
    """Whether this process has joined others. From then on an error may be its own alone."""
    return dist.is_initialized()


def lost_contact(error: RuntimeError) -> str | None:
    """A sentence if the error says that ranks cannot reach each other, else None.

    NCCL and the rendezvous raise a type of their own, and may give a reason; gloo does neither.
    """
    sentence = "lost contact with another rank, whose own error comes first"
    if isinstance(error, dist.DistError):
        return f"{sentence}: {' '.join(str(error).split())}"
    return sentence if "gloo/transport" in str(error) else None


def _this_process(cpu_threads: int | None) -> tuple[World, int]:
    """Rank and device as torchrun's environment gives them, and how many processes this machine runs."""
    rank, size = _place("RANK", "WORLD_SIZE")
    local_rank, local_size = _place("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if size > 1 and (missing := [name for name in _TORCHRUN if name not in os.environ]):
        raise UserError(f"WORLD_SIZE={size}, but {', '.join(missing)} not set: start with torchrun, or unset it")
    # A float sum depends on how many threads share it, so their number is pinned: a run is exact only with it.
    torch.set_num_threads(torch_threads(cpu_threads, local_size)[0])
    device = _device(local_rank, local_size)
    if device.type == "cpu":
        keep_freed_memory()
    return World(rank, size, device, "single", local_rank=local_rank), local_size


def _backends(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes were started on this machine, which has {torch.cuda.device_count()} GPUs; "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _strategy(config: Config, size: int, device: torch.device) -> str:
    strategy = config.parallel.strategy
    if strategy == "auto":
        if size == 1:
            return "single"
        return "fsdp" if device.type == "cuda" and config.model.name in SHARDED else "ddp"
    if strategy == "single" and size > 1:
        raise UserError(f"parallel.strategy=single runs one process, but {size} were started; use auto, ddp or fsdp")
    return strategy


def _check_same_config(world: World, config: Config) -> None:
    """Ranks with different configs would average different things without an error."""
    first, *others = world.gather_objects(config.model_dump(mode="json"))
    for rank, other in enumerate(others, 1):
        for section, values in other.items():
            for key, value in values.items():
                if value != first[section][key]:
                    raise SharedError(
                        f"the ranks were started with different configs: {section}.{key} is {first[section][key]} on "
                        f"rank 0 and {value} on rank {rank}; give all the same"
                    )
