"""Checks of arguments that the ops share. A `ValueError` names the argument, what came and what was wanted."""
from __future__ import annotations

import numbers
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """What an argument is, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__


def check_tensor(
    name: str,
    x: Tensor,
    shape: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise `ValueError` unless `x` is as said; the digits in a shape like "B, 196, D" are fixed sizes."""
    sizes = shape.split(", ")
    fits = (
        isinstance(x, Tensor)
        and x.ndim == len(sizes)
        and all(n == int(size) for n, size in zip(x.shape, sizes, strict=True) if size.isdigit())
        and x.dtype in dtypes
        and device in (None, x.device)
    )
    if not fits:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        where = "" if device is None else f" on {device}"
        raise ValueError(f"{name}: want a {wanted} [{shape}] tensor{where}, got {describe(x)}")


def is_number(value: object) -> bool:
    """A Python or NumPy number, or a compiler's symbol for one; no tensor."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))


def check_int(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is an integer."""
    if not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise ValueError(f"{name}: want an int, got {describe(value)}")


def check_masks(masks: Sequence[Tensor]) -> None:
    """Raise `ValueError` unless `masks` is a non-empty list of integer `[B, K]` tensors of one B and device."""
    if not isinstance(masks, (list, tuple)) or not masks:
        raise ValueError(f"masks: want a non-empty list of integer [B, K] tensors, got {describe(masks)}")
    for i, m in enumerate(masks):
        check_tensor(f"masks[{i}]", m, "B, K", (torch.int64, torch.int32), None if i == 0 else masks[0].device)
        if m.shape[0] != masks[0].shape[0]:
            raise ValueError(f"masks[{i}]: want {masks[0].shape[0]} rows as masks[0] has, got {m.shape[0]}")


def can_read(x: Tensor) -> bool:
    """Whether to look at the values of an index tensor: there are any, and it costs nothing or was asked for.

    A subclass (fake, functional) and a tensor under `torch.compile` have no values.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    return x.device.type == "cpu" or os.environ.get("IJEPA_KERNELS_CHECK") == "1"


def check_range(name: str, what: str, values: Tensor, high: int) -> None:
    """Raise `ValueError` unless all values are in [0, high]."""
    if values.numel():
        smallest, largest = (bound.item() for bound in values.aminmax())
        if smallest < 0 or largest > high:
            raise ValueError(f"{name}: want {what} in [0, {high}], got {smallest} to {largest}")
