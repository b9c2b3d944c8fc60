"""How our attention kernels read and write heads: cut into two parts, powers of two as `tl.arange` wants them."""
from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import tl, triton

STRIDES = [f"stride_{x}_{of}" for x in "qkv" for of in ("token", "head")]  # arguments of the kernels
GRADS_STRIDE = "stride_grads_token"


def parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """The widths of the two parts of a head; 0 for a second part that is not needed."""
    # A part of 16 columns in fp32 is less than four warps of tf32 products can share: they all hold it, and spill.
    least = 32 if dtype == torch.float32 else 16
    first = max(least, 1 << (head_dim.bit_length() - 1))
    if head_dim <= first:
        return first, 0
    second = max(least, triton.next_power_of_2(head_dim - first))
    return (2 * first, 0) if second == first else (first, second)


@triton.jit
def load_rows(
    base,
    row,  # [R]
    stride,
    inside,  # [R]
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Both parts of some rows, [R, PART_0] and [R, PART_1]; rows that are not inside and columns past the end are 0."""
    column = tl.arange(0, PART_0)
    mask = inside[:, None]
    if PART_0 > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    x0 = tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
    if UPCAST:
        x0 = x0.to(tl.float32)
    x1 = x0
    if PART_1 > 0:
        column = PART_0 + tl.arange(0, PART_1)
        mask = inside[:, None]
        if PART_0 + PART_1 > HEAD_DIM:
            mask = mask & (column < HEAD_DIM)[None, :]
        x1 = tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        if UPCAST:
            x1 = x1.to(tl.float32)
    return x0, x1


@triton.jit
def store_rows(
    base,
    row,  # [R]
    stride,
    inside,  # [R]
    x0,  # [R, PART_0]
    x1,  # [R, PART_1]
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
):
    column = tl.arange(0, PART_0)
    mask = inside[:, None]
    if PART_0 > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    tl.store(base + row[:, None] * stride + column[None, :], x0.to(base.dtype.element_ty), mask=mask)
    if PART_1 > 0:
        column = PART_0 + tl.arange(0, PART_1)
        mask = inside[:, None]
        if PART_0 + PART_1 > HEAD_DIM:
            mask = mask & (column < HEAD_DIM)[None, :]
        tl.store(base + row[:, None] * stride + column[None, :], x1.to(base.dtype.element_ty), mask=mask)


@triton.jit
def inner(a0, a1, b0, b1, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both parts of the head: [A, B] in fp32."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if PART_1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(acc0, acc1, weights, x0, x1, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights x for both parts of the head; the weights are rounded to the dtype of x."""
    weights = weights.to(x0.dtype)
    acc0 = tl.dot(weights, x0, acc0, input_precision=PRECISION)
    if PART_1 > 0:
        acc1 = tl.dot(weights, x1, acc1, input_precision=PRECISION)
    return acc0, acc1


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy where its strides are not what the kernels read: the last 1, the others multiples of 8."""
    return x if x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    return [stride // 8 for x in tensors for stride in x.stride()[:2]]
