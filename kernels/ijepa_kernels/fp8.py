"""Matrix products in 8 bits: matrices rounded to e4m3, with a scale for each row or one for all of it, and linear
layers of two of these.

    scale = max |row or matrix| / 448;    values = x / scale, rounded to e4m3 (4 significant bits from 2^-6 to 448)
    linear(x, w) = (x.values @ w.values^T) * x.scale * w.scale^T + bias, the product summed in fp32

A rounding is off by 2^-4 of a value at most, 2^-10 of its scale for values below 2^-14 of the largest of the row, or
matrix. A floating-point format needs few scales: one a row helps where rows differ by a factor of 1,000 or more. For
forwards without gradients: I-JEPA's target encoder. The format: Micikevicius et al., "FP8 Formats for Deep Learning"
(arXiv 2209.05433). A GPU has products of e4m3 from compute capability 8.9 on; a CPU computes the same in fp32.
"""
from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check_tensor, describe
from .compat import scaled_mm
from .dispatch import INTERPRETED, tl, triton, use_triton
from .registration import is_plain_eager, register
from .shipped import Shipped

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
TINY = 1e-30  # in the place of the largest value where all are 0: 448 / TINY is still an fp32 number
FIRST_ARCH = 89
# Older row-wise products of PyTorch (not cuBLAS's, which Hopper takes) read out of bounds at other numbers of rows:
# pytorch/pytorch#133334.
ROW_MULTIPLE = 256
# Columns rounded up to a power of two -> rows a program, warps: 8 elements a thread, 16 in wide rows. Not yet measured.
TILES = {256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8), 4096: (1, 8), 8192: (1, 16)}
Scales = Literal["row", "tensor"]  # one for each row, or one for the whole matrix


class Quantized(NamedTuple):
    """A matrix of `rows` rows, quantised; `values * scale` is what it stands for.

    values: e4m3 [M, D], M >= rows: on a GPU rounded up to a multiple of 256; what the spare rows hold is undefined.
    scale:  fp32 [M, 1], or [1, 1] where the whole matrix has one
    """

    values: Tensor
    scale: Tensor
    rows: int

    def dequantized(self) -> Tensor:
        """fp32 [rows, D]."""
        return (self.values[: self.rows].float() * self.scale[: self.rows]).contiguous()


def padded_rows(x: Tensor) -> int:
    """Rows to allocate for x's on its device."""
    return x.shape[0] if x.is_cpu else -(-x.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE


def empty_quantized(x: Tensor, scales: Scales = "row") -> tuple[Tensor, Tensor]:
    """Values and scale for x, not filled."""
    rows = padded_rows(x)
    scale = x.new_empty(rows if scales == "row" else 1, 1, dtype=torch.float32)
    return x.new_empty(rows, x.shape[1], dtype=E4M3), scale


def round_within(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scale of fp32 `x` [T, D], given the most that a row's magnitudes can be, or those of all, `largest`
    [T, 1] or [1, 1]."""
    largest = largest.clamp(min=TINY)
    return (x * (LARGEST / largest)).to(E4M3), largest / LARGEST


@triton.jit
def to_e4m3(x, EXACT: tl.constexpr):
    """fp32 to e4m3, to nearest, ties to even.

    Triton's interpreter forgets the carry of a rounding, and what is not a number. There `EXACT` rounds before it:
    below 2^-6 by adding the fp32 number whose last place is e4m3's, above in integers.
    """
    if EXACT:
        small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: fp32 numbers there are 2^-9 apart
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        rounded = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True)).to(tl.float8e4nv)
        nan = tl.full(x.shape, 0x7F, tl.uint8)
        return tl.where(x != x, nan, rounded.to(tl.uint8, bitcast=True)).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def store_e4m3(values_ptr, scale_ptr, row, offset, mask, inside, x, largest, EXACT: tl.constexpr):
    """Store rows `x` [ROWS, BLOCK], and their scales at the rows `inside`; `largest` bounds their magnitudes, [ROWS],
    or [1], the same in all."""
    largest = tl.maximum(largest, 1e-30)
    tl.store(values_ptr + offset, to_e4m3(x * (448.0 / largest)[:, None], EXACT), mask=mask)
    tl.store(scale_ptr + row, largest / 448.0, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x_ptr,  # [T, DIM], as all others contiguous
    values_ptr,  # e4m3 [M, DIM]
    scale_ptr,  # fp32 [M, 1]
    num_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)
    inside = row < num_rows
    mask = inside[:, None] & (column < DIM)[None, :]
    offset = (row * DIM)[:, None] + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    store_e4m3(values_ptr, scale_ptr, row, offset, mask, inside, x, tl.max(tl.abs(x), 1), EXACT)


def shipped() -> list[Shipped]:
    """The widths of every model's weights, fp32 as trained, and in bf16 as shards are gathered."""
    rows = []
    for dim in (192, 384, 768, 1024, 1280, 1408, 5120, 6144):
        for dtype in ("fp32", "bf16"):
            types = dict(x_ptr=dtype, values_ptr="fp8e4nv", scale_ptr="fp32")
            tile_rows, warps = _tile(dim)
            constexprs = dict(DIM=dim, BLOCK=_block(dim), ROWS=tile_rows, EXACT=False)
            rows.append(Shipped(_quantize_rows_kernel, types, constexprs, warps, vector_bytes=8, first_arch=FIRST_ARCH))
    return rows


def _block(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 256)


def _tile(dim: int) -> tuple[int, int]:
    """Rows of a program, and its warps."""
    return TILES[_block(dim)]


def _launch_quantize(x: Tensor, values: Tensor, scale: Tensor) -> None:
    num_rows, dim = x.shape
    rows, warps = _tile(dim)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(triton.cdiv(num_rows, rows),)](
            x, values, scale, num_rows, DIM=dim, BLOCK=_block(dim), ROWS=rows, EXACT=INTERPRETED, num_warps=warps
        )


def runs_kernel(x: Tensor) -> bool:
    return x.shape[1] <= max(TILES) and use_triton(x)


def _quantize_(x: Tensor, values: Tensor, scale: Tensor) -> None:
    if x.numel() and runs_kernel(x):
        _launch_quantize(x.contiguous(), values, scale)
    elif x.numel():
        wide, some = x.float(), slice(x.shape[0])
        values[some], scale[some] = round_within(wide, wide.abs().amax(1, keepdim=True))


_quantize_op = register(
    "quantize_rows_(Tensor x, Tensor(a!) values, Tensor(b!) scale) -> ()", _quantize_, lambda x, values, scale: None
)


def _quantize_tensor_(x: Tensor, values: Tensor, scale: Tensor) -> None:
    if x.numel():
        largest = torch.linalg.vector_norm(x, torch.inf, (0, 1), keepdim=True, dtype=torch.float32).clamp_(min=TINY)
        values[: x.shape[0]].copy_(x * (LARGEST / largest))
        torch.div(largest, LARGEST, out=scale)


_quantize_tensor_op = register(
    "quantize_tensor_(Tensor x, Tensor(a!) values, Tensor(b!) scale) -> ()",
    _quantize_tensor_,
    lambda x, values, scale: None,
)


def check_no_gradient(*tensors: Tensor | None) -> None:
    """Raise ValueError where a gradient would be lost: nothing here has one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("rounding to e4m3 has no gradient: call it under torch.no_grad()")


def _output(x: Tensor, out: Quantized | None, scales: Scales) -> Quantized:
    """What to write `x` to. Raises ValueError, also for what is wrong with x."""
    check_tensor("x", x, "T, D")
    check_no_gradient(x)
    if out is None:
        return Quantized(*empty_quantized(x, scales), x.shape[0])
    wanted = (x.shape[0], x.shape[1:], x.device, len(out.values) if scales == "row" else 1)
    if (out.rows, out.values.shape[1:], out.values.device, len(out.scale)) != wanted:
        raise ValueError(f"out: want one for {describe(x)}, one scale a {scales}, got {out.rows} rows of "
                         f"{describe(out.values)} with scales {describe(out.scale)}")
    return out


def quantize_rows(x: Tensor, out: Quantized | None = None) -> Quantized:
    """`x` rounded to e4m3, with a scale for each row.

    x:   [T, D] fp32, bf16 or fp16. A row with an infinity or a NaN in it becomes NaN.
    out: what to write over, the result of such a call with another x of this shape.

    Raises ValueError.
    """
    out = _output(x, out, "row")
    (_quantize_ if is_plain_eager() else _quantize_op)(x, out.values, out.scale)
    return out


def quantize_tensor(x: Tensor, out: Quantized | None = None) -> Quantized:
    """As `quantize_rows`, with one scale for all of `x`, which all becomes NaN by an infinity or a NaN.

    Plain PyTorch, without a wait for the device: it is meant for weights, once an update.
    """
    out = _output(x, out, "tensor")
    (_quantize_tensor_ if is_plain_eager() else _quantize_tensor_op)(x, out.values, out.scale)
    return out


def fp8_linear(x: Quantized, weight: Quantized, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    """`F.linear` of two quantised matrices, without a gradient.

    x:         T rows of D columns.
    weight:    N rows of D columns, with scales of the kind that x has; on a GPU N and D are multiples of 16.
    bias:      [N] in `out_dtype`, or None.
    out_dtype: bf16; on a CPU also fp32 or fp16.

    Returns [T, N]. Raises ValueError.
    """
    for name, matrix in (("x", x), ("weight", weight)):
        if not isinstance(matrix, Quantized) or matrix.values.dtype != E4M3 or matrix.values.ndim != 2:
            raise ValueError(f"{name}: want a Quantized, as quantize_rows makes it, got {describe(matrix)}")
    if x.values.shape[1] != weight.values.shape[1] or x.values.device != weight.values.device:
        raise ValueError(f"weight: want {x.values.shape[1]} columns as x has, and on its device, "
                         f"got {describe(weight.values)}")
    both = x, weight
    # A single row may be either.
    if not all(len(m.scale) == 1 for m in both) and not all(len(m.scale) == len(m.values) for m in both):
        raise ValueError(f"weight: want scales of one kind, for each row of both factors or one for each factor, got "
                         f"{describe(x.scale)} of x and {describe(weight.scale)} of weight")
    on_cpu = x.values.is_cpu
    if out_dtype not in (FLOATS if on_cpu else (torch.bfloat16,)):
        raise ValueError(f"out_dtype: want bfloat16, which products of e4m3 have, got {out_dtype}")
    if bias is not None:
        check_tensor("bias", bias, f"{weight.rows}", (out_dtype,), x.values.device)
    if on_cpu:
        wide = None if bias is None else bias.float()
        return F.linear(x.dequantized(), weight.dequantized(), wide).to(out_dtype)
    if weight.rows % 16 or weight.values.shape[1] % 16:
        raise ValueError(f"weight: want multiples of 16 rows and columns, got {describe(weight.values)}")
    out = scaled_mm(x.values, weight.values[: weight.rows], x.scale, weight.scale[: weight.rows], bias, out_dtype)
    return out[: x.rows]
