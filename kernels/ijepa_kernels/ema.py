"""Exponential moving average of the target encoder's weights, every tensor at once.

    target = momentum * target + (1 - momentum) * source

computed as torch.lerp computes it, `target + (1 - momentum) * (source - target)` in fp32: one rounding fewer, and exact
where source == target. Bytes: 12 a parameter in fp32 (two reads, one write), 2 more for a bf16 copy.

The target should be fp32. A bf16 target at momentum 0.996 never moves: its spacing is 2^-8 of the value, the step 2^-8
of the difference. An fp32 one at momentum 0.9999 stops within about 2^-24 / (1 - momentum), 6e-4 of the value.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import outside_dispatch, register
from .packed import describe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    torch._foreach_lerp_(target, source, weight)  # refuses mixed dtypes and a tensor for its weight
    if low_precision:
        torch._foreach_copy_(low_precision, target)


def _update(
    target: list[Tensor],
    source: list[Tensor],
    low_precision: list[Tensor],
    momentum: float,
    device_momentum: Tensor | None,
) -> None:
    _check(target, source, low_precision)
    with torch.no_grad():
        _update_torch(target, source, low_precision, 1 - (momentum if device_momentum is None else device_momentum))


_update_op = register(
    "ema_update_(Tensor(a!)[] target, Tensor[] source, Tensor(b!)[] low_precision, float momentum, "
    "Tensor? device_momentum) -> ()",
    _update,
    lambda *_: None,
)


def _check(target: list[Tensor], source: list[Tensor], low_precision: list[Tensor]) -> None:
    for i, (t, s) in enumerate(zip(target, source, strict=True)):
        if t.dtype not in DTYPES:
            raise ValueError(f"target[{i}]: want a fp32, bf16 or fp16 tensor, got {describe(t)}")
        if t.device != target[0].device:
            raise ValueError(f"target[{i}]: want it on {target[0].device} as target[0], got {describe(t)}")
        if s.shape != t.shape or s.device != t.device or s.dtype not in DTYPES:
            raise ValueError(
                f"source[{i}]: want a fp32, bf16 or fp16 tensor {list(t.shape)} on {t.device} as target[{i}], "
                f"got {describe(s)}"
            )
        if low_precision and (low_precision[i].shape != t.shape or low_precision[i].device != t.device):
            got = describe(low_precision[i])
            raise ValueError(f"low_precision[{i}]: want {list(t.shape)} on {t.device} as target[{i}], got {got}")


def _local(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Local shards of DTensors, plain tensors as they are. Collectives are never needed: the average is elementwise."""
    if not isinstance(tensors, (list, tuple)):
        raise ValueError(f"{name}: want a list of tensors, got {describe(tensors)}")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}[{i}]: want a tensor, got {describe(x)}")
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


@torch.no_grad()
def ema_update_(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    low_precision: Sequence[Tensor] | None = None,
) -> None:
    """target = momentum * target + (1 - momentum) * source, in place, for every pair of two lists (see the module).

    target:        list of fp32, bf16 or fp16 tensors, any shapes, one device. DTensors stand for their local shards.
    source:        as many, of the same shapes (shards); fp32, bf16 or fp16, each by itself.
    momentum:      a number in [0, 1], or a 0-dim fp32 or fp64 tensor; one on the device is read when the kernel runs,
                   so a captured CUDA graph follows it. At 0.9999, 1 - momentum is off by 3e-4 of itself in fp32.
    low_precision: as many tensors of the same shapes, usually bf16, that receive the new target, rounded.

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
        device_momentum, momentum = momentum, 0.0
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum: want a number in [0, 1], got {momentum}")
    if target:
        update = _update if outside_dispatch() else _update_op
        update(target, source, low_precision, momentum, device_momentum)
