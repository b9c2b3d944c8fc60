"""Checks of arguments: one clear ValueError with the op, the argument, what came and what was wanted.

Shapes and dtypes are checked in the public functions, where a compiler sees them too; values (`check_packed_values`)
inside the registered bodies, where the tensors are real.
"""
from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .dispatch import check_values_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, x: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """`shape` is written as in the docstrings, "B, N, D": its number of names is the rank, a digit a fixed size."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor [{shape}], got {type(x).__name__}")
    sizes = shape.split(", ") if shape else []
    if x.dim() != len(sizes) or any(s.isdigit() and int(s) != n for s, n in zip(sizes, x.shape, strict=True)):
        raise ValueError(f"{op}: {name} must have shape [{shape}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors must live where the first one does."""
    items = [(name, x) for name, x in tensors.items() if x is not None]
    first_name, first = items[0]
    for name, x in items[1:]:
        if x.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {x.device}")


def check_packed(op: str, name: str, packed, device: torch.device) -> None:
    """dtypes, ranks and device of a `Packed`; not its values."""
    for field, shape in (("indices", "T"), ("cu_seqlens", "S+1"), ("image", "S")):
        x = getattr(packed, field, None)
        check_tensor(op, f"{name}.{field}", x, shape, (torch.int32,))
        if x.device != device:
            raise ValueError(f"{op}: {name}.{field} must be on {device}, got {x.device}; see Packed.to")
    if packed.cu_seqlens.shape[0] != packed.image.shape[0] + 1:
        raise ValueError(f"{op}: {name}.cu_seqlens must have one more entry than {name}.image "
                         f"({packed.image.shape[0]}), got {packed.cu_seqlens.shape[0]}")


def check_packed_values(
    op: str,
    name: str,
    indices: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    image: Tensor,  # [S]
    num_patches: int,
    num_images: int,
) -> None:
    """Values of a packed selection, where `check_values_of` says so: in range, `cu_seqlens` rising from 0 to T."""
    if not check_values_of(indices):
        return
    check_range(op, f"{name}.indices", indices, num_patches)
    check_range(op, f"{name}.image", image, num_images)
    check_cu_seqlens(op, f"{name}.cu_seqlens", cu_seqlens, indices.shape[0])


def check_range(op: str, name: str, x: Tensor, stop: int) -> None:
    if x.numel():
        low, high = (int(v) for v in torch.aminmax(x))
        if low < 0 or high >= stop:
            raise ValueError(f"{op}: {name} must be in [0, {stop}), got {low if low < 0 else high}")


def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, total: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(f"{op}: {name} must run from 0 to {total}, the number of tokens, got {ends[0]} to {ends[-1]}")
    if any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"{op}: {name} must never decrease, got {ends if len(ends) < 20 else '(long)'}")
