"""Where AdamWEMA's kernel finds its tensors, and how it is known that they are still there.

A table is made of addresses, so it is good only while nothing has moved. Before every update all that the optimizer
holds is compared with what the tables were made for: the same objects at the same addresses. That is exact whatever
was done to them meanwhile, and in C: 0.1 us a tensor. A dict keyed by tensors calls their `__hash__`, in Python.
"""
from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat import StorageWeakRef
from .dispatch import tl

CHUNK = 1024  # elements a program, or at a time. Chunks of 4,096 take twice the registers, and leave one program an SM
FIELDS = 10  # of a row of a table; one more where scales are written
GIVEN = 8  # fp64 numbers a group that the host sends: see `adamw_begin`
RATES = 12  # fp32 numbers a group that the kernel reads, ten of them used: a row begins at a multiple of 16 bytes
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def local(x: Tensor) -> Tensor:
    """The shard of a DTensor, any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def is_capturing(tensors: list[Tensor]) -> bool:
    """Whether their device's current stream is being captured into a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def upload(values: list, device_tensor: Tensor) -> None:
    """Write numbers into a tensor on the device. The host waits for nobody: from memory that is pinned, and new."""
    host = torch.tensor(values, dtype=device_tensor.dtype, pin_memory=device_tensor.is_cuda)
    device_tensor.copy_(host.view(device_tensor.shape), non_blocking=True)


class Weight(NamedTuple):
    """A weight and what is updated with it."""

    w: Tensor
    m: Tensor
    v: Tensor
    target: Tensor | None
    copy: Tensor | None
    target_copy: Tensor | None
    scale: Tensor | None  # of each row of target_copy, which then is in e4m3
    group: int
    grad_dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]


class Launch(NamedTuple):
    """Weights that differ in nothing that the kernel is compiled for."""

    table: Tensor  # int64 [programs, FIELDS]
    constexprs: dict[str, Any]


class Tables:
    """All that the kernels read of one set of tensors, on their device. It stays where it is, so a graph may read it.

    key, owned: what must compare equal, and be the same objects, for the tables to be valid.
    steps:      fp32 [weights], the updates so far of each.
    """

    def __init__(self, key: Any, owned: list[Any], weights: list[Weight], steps: Tensor):
        self._key, self._owned = key, owned
        self._tensors = [x for weight in weights for x in weight.tensors if x is not None]
        self.sharded = any(hasattr(x, "to_local") for x in self._tensors)
        self.changed = [local(x) for x in self._tensors]  # by an update
        self._addresses = list(map(Tensor.data_ptr, self.changed))
        self.device = steps.device
        self.launches = [launch._replace(table=launch.table.to(self.device)) for launch in make_launches(weights)]
        self.steps = steps
        self.given = torch.zeros(len(key[1]), GIVEN, dtype=torch.float64, device=self.device)
        self.rates = torch.zeros(len(key[1]), RATES, dtype=torch.float32, device=self.device)
        self.grads = torch.zeros(len(weights), dtype=torch.int64, device=self.device)
        self._sent: list[int] | None = None
        self.memory = StorageWeakRef(next((x for x in self.changed if x.numel()), steps).untyped_storage())
        self.captured = False  # into a CUDA graph

    def buffers(self) -> list[Tensor]:
        """What the kernels read and is not the optimizer's."""
        return [self.given, self.rates, self.grads, self.steps, *(launch.table for launch in self.launches)]

    def hold(self, key: Any, owned: list[Any]) -> bool:
        """Whether they are valid for these, here and now."""
        if key != self._key or len(owned) != len(self._owned) or not all(map(operator.is_, owned, self._owned)):
            return False
        if self.sharded:
            self.changed = [local(x) for x in self._tensors]
        return list(map(Tensor.data_ptr, self.changed)) == self._addresses

    def send_grads(self, grads: list[Tensor]) -> None:
        """Their addresses, unless they were sent last time; an odd one is no multiple of 16."""
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses != self._sent:
            upload([address + (address % 16 != 0) for address in addresses], self.grads)
            self._sent = addresses


def tile_of(width: int) -> dict[str, int]:
    """How a program walks over its rows of `width` columns: BLOCK divides DIM, so that only rows can be cut."""
    block = min(CHUNK, width & -width)  # the largest power of two that divides it
    return dict(DIM=width, BLOCK=block, ROWS=CHUNK // block)


def make_launches(weights: Iterable[Weight]) -> list[Launch]:
    """The tables, on the host. Raises ValueError for tensors with gaps."""
    parts: dict[tuple, list[Tensor]] = {}
    for position, weight in enumerate(weights):
        tensors = [None if x is None else local(x) for x in weight.tensors]
        w, _, _, target, copy, target_copy, scale = tensors
        if any(x is not None and not x.is_contiguous() for x in tensors):
            raise ValueError(f"params: want contiguous tensors, targets and copies, got strides {w.stride()}")
        if not w.numel():
            continue
        copy_dtype, low_dtype = (None if x is None else _TL.get(x.dtype) for x in (copy, target_copy))
        constexprs = dict(GRAD=_TL[weight.grad_dtype], COPY=copy_dtype)
        if scale is None:  # in chunks of elements
            constexprs |= dict(TARGET=target is not None, TARGET_COPY=low_dtype)
            unit, units = 1, CHUNK
        else:  # in rows
            constexprs |= tile_of(w.shape[1])
            unit, units = w.shape[1], constexprs["ROWS"]
        firsts = torch.arange(0, w.numel() // unit, units)
        count = (w.numel() // unit - firsts).clamp(max=units)
        if any(x is not None and x.data_ptr() % 16 for x in tensors[:6]):
            count = -count
        starts = unit * firsts
        columns = [0 * starts if x is None else x.data_ptr() + x.element_size() * starts for x in tensors[:6]]
        columns += [torch.full_like(starts, position), starts, count, torch.full_like(starts, weight.group)]
        if scale is not None:
            columns.append(scale.data_ptr() + scale.element_size() * firsts)
        parts.setdefault(tuple(constexprs.items()), []).append(torch.stack(columns, 1))
    return [Launch(torch.cat(rows), dict(kind)) for kind, rows in parts.items()]
