"""Exponential moving average of the target encoder's weights, every tensor at once.

    target = momentum * target + (1 - momentum) * source

computed in fp32 as torch.lerp computes it, from the nearer end: target + (1 - momentum) * (source - target), or below
momentum 0.5 source - momentum * (source - target). One rounding fewer than the formula, and exact where source ==
target, at momentum 1 and at 0. Bytes: 12 a parameter in fp32 (two reads, one write), 2 more for a bf16 copy.

The target should be fp32. A bf16 target at momentum 0.996 never moves: its spacing is 2^-8 of the value or more, the
step 2^-8 of the difference. An fp32 one at 0.9999 stops within about 2^-24 / (1 - momentum), 6e-4 of the value.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, describe, is_number
from .compat import StorageWeakRef, foreach_copy_, foreach_lerp_
from .dispatch import tl, triton, use_triton
from .registration import is_plain_eager, register
from .shipped import Shipped

CHUNK, NUM_WARPS = 4096, 8  # elements a program; 16-byte loads, four a thread and list in fp32: 3 TB/s on an H100
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def ema_update_ref(
    target: Sequence[Tensor], source: Sequence[Tensor], weight: float | Tensor, low_precision: Sequence[Tensor] = ()
) -> None:
    """One tensor after another, in fp32 (fp64 for fp64 tensors). `weight` is 1 - momentum."""
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(target, source, strict=True)):
            dtype = torch.promote_types(t.dtype, torch.float32)
            new = t.to(dtype).lerp(s.to(dtype), torch.as_tensor(weight, dtype=dtype, device=t.device))
            t.copy_(new)
            if low_precision:
                low_precision[i].copy_(new)


def _update_torch(target, source, low_precision, weight) -> None:
    if isinstance(weight, Tensor) or any(x.dtype != torch.float32 for x in (*target, *source)):
        ema_update_ref(target, source, weight, low_precision)
        return
    foreach_lerp_(target, source, weight)
    if low_precision:
        foreach_copy_(low_precision, target)


@triton.jit
def _lerp(old, new, weight):
    near = weight < 0.5
    return tl.where(near, old, new) + tl.where(near, weight, weight - 1) * (new - old)


@triton.jit
def _ema_kernel(
    table_ptr,  # int64 [programs, 4]: addresses of a chunk of target, source, low_precision; elements in it
    weight,  # fp32, 1 - momentum
    momentum_ptr,  # fp32 or fp64 [], instead of weight
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    LOW: tl.constexpr,  # None: no copy
    ON_DEVICE: tl.constexpr,  # momentum_ptr counts
    CHUNK: tl.constexpr,
):
    row_ptr = table_ptr + tl.program_id(0) * 4
    target_ptr = tl.load(row_ptr).to(tl.pointer_type(TARGET))
    source_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(SOURCE))
    count = tl.load(row_ptr + 3)  # negative: a tensor that does not begin at a multiple of 16 bytes
    if ON_DEVICE:
        weight = (1 - tl.load(momentum_ptr)).to(tl.float32)
    offsets = tl.arange(0, CHUNK)
    if count == CHUNK:  # without masks: masked loads from a table's pointers are scalar, even with hints
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
        old = tl.load(target_ptr + offsets).to(tl.float32)  # [CHUNK]
        new = _lerp(old, tl.load(source_ptr + offsets).to(tl.float32), weight)
        tl.store(target_ptr + offsets, new.to(TARGET))
        if LOW is not None:
            low_ptr = tl.multiple_of(tl.load(row_ptr + 2).to(tl.pointer_type(LOW)), 16)
            tl.store(low_ptr + offsets, new.to(LOW))
    else:
        inside = offsets < tl.abs(count)
        old = tl.load(target_ptr + offsets, mask=inside).to(tl.float32)
        new = _lerp(old, tl.load(source_ptr + offsets, mask=inside).to(tl.float32), weight)
        tl.store(target_ptr + offsets, new.to(TARGET), mask=inside)
        if LOW is not None:
            low_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(LOW))
            tl.store(low_ptr + offsets, new.to(LOW), mask=inside)


def shipped() -> list[Shipped]:
    """fp32 targets; momentum as a number or in either dtype on the device, a bf16 copy, a bf16 source."""
    fp32, bf16 = tl.float32, tl.bfloat16
    table = [(fp32, None, None), (fp32, None, "fp32"), (fp32, None, "fp64"), (fp32, bf16, None), (bf16, None, None)]
    rows = []
    for source, low, momentum in table:
        types = {"table_ptr": "i64", "weight": "fp32"}
        constexprs = dict(TARGET=fp32, SOURCE=source, LOW=low, ON_DEVICE=momentum is not None, CHUNK=CHUNK)
        if momentum is None:
            constexprs["momentum_ptr"] = None
        else:
            types["momentum_ptr"] = momentum
        rows.append(Shipped(_ema_kernel, types, constexprs, NUM_WARPS))
    return rows


class _Plan(NamedTuple):
    """What to launch for one set of lists. It holds their addresses, so it is valid while those stay the same."""

    launches: list[tuple[Tensor, dict]]  # table, constexprs; one a combination of dtypes
    strided: list[int]  # positions of tensors that are not contiguous


_plans: dict[tuple, _Plan] = {}
MAX_PLANS = 16
# A CUDA graph reads its tables at every replay, so they must outlive `_plans`. They are kept for as long as the memory
# that the graph updates: once that is freed, replaying would write to what is no longer ours.
_captured: list[tuple[StorageWeakRef, _Plan]] = []


def _plan_of(target: list[Tensor], source: list[Tensor], low_precision: list[Tensor]) -> _Plan:
    tensors = target + source + low_precision
    key = (
        len(target),
        *[x.data_ptr() for x in tensors],
        *[x.numel() for x in tensors],
        *[x.dtype for x in tensors],
        *[x.is_contiguous() for x in tensors],
    )
    plan = _plans.get(key)
    capturing = _is_capturing(target[0])
    if plan is None:
        if capturing:
            raise RuntimeError("ema_update_: call it once with these tensors before capturing a CUDA graph")
        _check(target, source, low_precision)
        plan = _make_plan(target, source, low_precision)
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan
    if capturing:
        memory = next((x for x in target if x.numel()), target[0]).untyped_storage()
        _captured[:] = [(kept, other) for kept, other in _captured if not kept.expired() and other is not plan]
        _captured.append((StorageWeakRef(memory), plan))
    return plan


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _make_plan(target: list[Tensor], source: list[Tensor], low_precision: list[Tensor]) -> _Plan:
    rows, strided = {}, []
    for i, lists in enumerate(zip(target, source, low_precision or [None] * len(target), strict=True)):
        tensors = [x for x in lists if x is not None]
        if not all(x.is_contiguous() for x in tensors):
            strided.append(i)
            continue
        starts = torch.arange(0, target[i].numel(), CHUNK)
        count = (target[i].numel() - starts).clamp(max=CHUNK)
        if any(x.data_ptr() % 16 for x in tensors):
            count = -count
        addresses = [0 * starts if x is None else x.data_ptr() + x.element_size() * starts for x in lists]
        dtypes = tuple(None if x is None else _TL[x.dtype] for x in lists)
        rows.setdefault(dtypes, []).append(torch.stack([*addresses, count], 1))
    launches = []
    for (t, s, low), parts in rows.items():
        table = torch.cat(parts)
        if len(table):
            launches.append((table.to(target[0].device), dict(TARGET=t, SOURCE=s, LOW=low)))
    return _Plan(launches, strided)


def _update_triton(target, source, low_precision, momentum, device_momentum) -> None:
    plan = _plan_of(target, source, low_precision)
    on_device = device_momentum is not None
    with torch.cuda.device_of(target[0]):
        for table, dtypes in plan.launches:
            if table.is_cuda:  # the plan may be dropped while this stream, not the table's own, still reads it
                table.record_stream(torch.cuda.current_stream())
            _ema_kernel[(table.shape[0],)](
                table, 1 - momentum, device_momentum, **dtypes, ON_DEVICE=on_device, CHUNK=CHUNK, num_warps=NUM_WARPS
            )
    if plan.strided:
        lists = [[x[i] for i in plan.strided] for x in (target, source, low_precision) if x]
        ema_update_ref(*lists[:2], 1 - (device_momentum if on_device else momentum), *lists[2:])


def _update(
    target: list[Tensor],
    source: list[Tensor],
    low_precision: list[Tensor],
    momentum: float,
    device_momentum: Tensor | None,
) -> None:
    if use_triton(target[0]):
        _update_triton(target, source, low_precision, momentum, device_momentum)
    else:
        _check(target, source, low_precision)
        with torch.no_grad():
            _update_torch(target, source, low_precision, 1 - (momentum if device_momentum is None else device_momentum))
    torch.autograd.graph.increment_version(target + low_precision)  # no kernel does, nor PyTorch's foreach ones on CUDA


_update_op = register(
    "ema_update_(Tensor(a!)[] target, Tensor[] source, Tensor(b!)[] low_precision, float momentum, "
    "Tensor? device_momentum) -> ()",
    _update,
    lambda *_: None,
)


def _check(target: list[Tensor], source: list[Tensor], low_precision: list[Tensor]) -> None:
    if len({x.data_ptr() for x in target if x.numel()}) < sum(x.numel() > 0 for x in target):
        raise ValueError("target: want every tensor once, got one twice (tied weights?)")
    written = {x.data_ptr() for x in target if x.numel()}
    for i, (t, s) in enumerate(zip(target, source, strict=True)):
        if t.dtype not in FLOATS:
            raise ValueError(f"target[{i}]: want a fp32, bf16 or fp16 tensor, got {describe(t)}")
        if t.device != target[0].device:
            raise ValueError(f"target[{i}]: want it on {target[0].device} as target[0], got {describe(t)}")
        if s.shape != t.shape or s.device != t.device or s.dtype not in FLOATS:
            raise ValueError(
                f"source[{i}]: want a fp32, bf16 or fp16 tensor {list(t.shape)} on {t.device} as target[{i}], "
                f"got {describe(s)}"
            )
        if low_precision:
            low = low_precision[i]
            if low.shape != t.shape or low.device != t.device or low.dtype not in FLOATS:
                raise ValueError(
                    f"low_precision[{i}]: want a fp32, bf16 or fp16 tensor {list(t.shape)} on {t.device} as "
                    f"target[{i}], got {describe(low)}"
                )
            if low.numel() and low.data_ptr() in written:
                raise ValueError(f"low_precision[{i}]: want memory of its own, got a target's or another copy's")
            written.add(low.data_ptr())


def _local(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Local shards of DTensors, plain tensors as they are. Collectives are never needed: the average is elementwise."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):  # a tensor is an iterable of its rows
        raise ValueError(f"{name}: want a list or another iterable of tensors, got {describe(tensors)}")
    tensors = list(tensors)
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}[{i}]: want a tensor, got {describe(x)}")
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


@torch.no_grad()
def ema_update_(
    target: Iterable[Tensor],
    source: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    low_precision: Iterable[Tensor] | None = None,
) -> None:
    """target = momentum * target + (1 - momentum) * source, in place, for every pair of tensors (see the module).

    target:        fp32, bf16 or fp16 tensors of any shapes on one device, in a list or any iterable such as
                   `model.parameters()`. DTensors stand for their local shards.
    source:        as many, of the same shapes (shards); fp32, bf16 or fp16, each by itself.
    momentum:      a number in [0, 1], or a 0-dim fp32 or fp64 tensor; one on the device is read when the kernel runs,
                   so a captured CUDA graph follows it. At 0.9999, 1 - momentum is off by 3e-4 of itself in fp32.
    low_precision: as many tensors of the same shapes, fp32, bf16 or fp16, in memory of their own, that receive the new
                   target, rounded.

    The arithmetic is fp32. Empty tensors are skipped. Raises ValueError.
    """
    target, source = _local("target", target), _local("source", source)
    low_precision = _local("low_precision", low_precision) if low_precision is not None else []
    if len(source) != len(target):
        raise ValueError(f"source: want {len(target)} tensors as target has, got {len(source)}")
    if low_precision and len(low_precision) != len(target):
        raise ValueError(f"low_precision: want {len(target)} tensors as target has, got {len(low_precision)}")
    device_momentum = None
    if isinstance(momentum, Tensor):
        if momentum.ndim or momentum.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"momentum: want a number or a 0-dim fp32 or fp64 tensor, got {describe(momentum)}")
        if target and momentum.device == target[0].device:
            device_momentum, momentum = momentum, 0.0
        elif momentum.device.type == "cpu":
            momentum = momentum.item()
        else:
            raise ValueError(f"momentum: want it on the device of target or the host, got {describe(momentum)}")
    if device_momentum is None and not (is_number(momentum) and 0 <= momentum <= 1):
        raise ValueError(f"momentum: want a number in [0, 1], got {describe(momentum)}")
    if target:
        update = _update if is_plain_eager() else _update_op
        update(target, source, low_precision, float(momentum), device_momentum)  # Triton specialises an int of 0 or 1
