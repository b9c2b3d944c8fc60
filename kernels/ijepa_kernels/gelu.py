"""bias_gelu: what stands between an MLP's two matrix products, bias and exact GELU (arXiv 1606.08415), in one pass.

    out = h * Phi(h),  h = x + bias,  Phi the normal distribution's cumulative function
    grad_x = grad * (Phi(h) + h * phi(h)),  phi its density;  grad_bias = sum of grad_x over the rows

Bytes an element in bf16: 4 forward and 6 backward, as PyTorch's GELU has. What is spared is the pass over grad_x that
sums it for the bias: leave the bias out of the matrix product in front, and the backward has its gradient for free (in
two stages: partial sums of programs, then their sum, without atomics). Only x is kept; Phi is computed again.

Phi by Abramowitz and Stegun, formula 7.1.26: with t = 1 / (1 + 0.3275911 |h| / sqrt(2)) the tail beyond |h| is
t (a1 + ... + a5 t^4) exp(-h^2 / 2) / 2, off by 7.5e-8 at most, about one fp32 rounding of 1. It has the density's
exponential in it, and no cancellation where h is far below 0: at -5 it is off by 0.16 % of itself, 1 + erf in fp32 by
4 %. CUDA's erf has two branches, each longer: the kernel would be bound by arithmetic, not by memory.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import FLOATS, check_tensor
from .compat import gelu_backward
from .dispatch import tl, triton, use_triton
from .registration import is_plain_eager, register
from .shipped import Shipped

DTYPES = (*FLOATS, torch.float64)  # the last on a CPU alone
# Elements of a tile, of at most 1,024 columns; fewer in the backward, which holds sums too. At 5,120 both
# directions together move 2.9 TB/s on an H100.
TILE, BACKWARD_TILE, WIDE_BACKWARD_TILE, NUM_WARPS = 4096, 2048, 1024, 4  # wide: in fp32, where 2,048 spill on sm_100
BACKWARD_PROGRAMS = 1056  # eight on each of the 132 multiprocessors of an H100


def _block(dim: int) -> int:
    """Columns of a tile: a power of two that divides the width where there is one, so that no lane idles."""
    divisor = dim & -dim
    return min(divisor, 1024) if divisor >= 128 else min(1 << (dim - 1).bit_length(), 1024)


def _backward_rows(dim: int, dtype: torch.dtype) -> int:
    return (WIDE_BACKWARD_TILE if dtype == torch.float32 else BACKWARD_TILE) // _block(dim)


def blocks_of(x: Tensor) -> int:
    """Tiles beside each other that cover a row."""
    return -(-x.shape[1] // _block(x.shape[1]))


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bias_gelu` as plain, differentiable PyTorch, in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return F.gelu(h).to(x.dtype)


def _backward_torch(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    grad_x = gelu_backward(grad.to(dtype), h)
    return grad_x.to(x.dtype), x.new_empty(0) if bias is None else grad_x.sum(0)


@triton.jit
def tail_and_density(h):
    """1 - Phi(|h|), and exp(-h^2 / 2)."""
    density = tl.exp(-0.5 * h * h)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(h))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return 0.5 * poly * density, density


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # [T, DIM], as all others contiguous
    bias_ptr,  # [DIM], or None
    out_ptr,  # [T, DIM]
    num_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) // blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < DIM)[None, :]
    offset = (row * DIM)[:, None] + column[None, :]
    h = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + column, mask=column < DIM, other=0).to(tl.float32)[None, :]
    tail, _ = tail_and_density(h)
    out = h * tl.where(h < 0, tail, 1 - tail)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_bwd_kernel(
    grad_ptr,  # [T, DIM], as all others contiguous
    x_ptr,  # [T, DIM]
    bias_ptr,  # [DIM], or None
    grad_x_ptr,  # [T, DIM]
    partial_ptr,  # fp32 [programs of a block, DIM], or None without a bias
    num_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    share = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_dim = column < DIM
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_dim, other=0).to(tl.float32)[None, :]
    for first in range(share * ROWS, num_rows, tl.num_programs(0) // blocks * ROWS):
        row = first + tl.arange(0, ROWS)  # [ROWS]
        mask = (row < num_rows)[:, None] & in_dim[None, :]
        offset = (row.to(tl.int64) * DIM)[:, None] + column[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
        h = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)
        if bias_ptr is not None:
            h += bias
        tail, density = tail_and_density(h)
        grad *= tl.where(h < 0, tail, 1 - tail) + h * density * 0.3989422804014327
        tl.store(grad_x_ptr + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        tl.store(partial_ptr + share * DIM + column, tl.sum(total, 0), mask=in_dim)


def shipped() -> list[Shipped]:
    """The hidden widths of every model, 16 bits; in fp32, and without a bias, at one."""
    rows = []
    table = [(dim, "bf16", True) for dim in (768, 1536, 3072, 4096, 5120, 6144)]
    for dim, dtype, with_bias in (*table, (5120, "fp32", True), (5120, "bf16", False)):
        tile = dict(DIM=dim, BLOCK=_block(dim), ROWS=TILE // _block(dim))
        bias, absent = ({"bias_ptr": "fp32"}, {}) if with_bias else ({}, {"bias_ptr": None})
        types = dict(x_ptr=dtype, out_ptr=dtype) | bias
        rows.append(Shipped(_bias_gelu_fwd_kernel, types, tile | absent, NUM_WARPS))
        types = dict(grad_ptr=dtype, x_ptr=dtype, grad_x_ptr=dtype) | bias
        rows_back = _backward_rows(dim, torch.float32 if dtype == "fp32" else torch.bfloat16)
        if with_bias:
            types["partial_ptr"] = "fp32"
        else:
            absent["partial_ptr"] = None
        rows.append(Shipped(_bias_gelu_bwd_kernel, types, tile | {"ROWS": rows_back} | absent, NUM_WARPS))
    return rows


def _launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    num_rows, dim = x.shape
    block = _block(dim)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        bias = None if bias is None else bias.contiguous()
        rows = TILE // block
        grid = (triton.cdiv(num_rows, rows) * blocks_of(x),)
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[grid](
                x.contiguous(), bias, out, num_rows, DIM=dim, BLOCK=block, ROWS=rows, num_warps=NUM_WARPS
            )
    return out


def _launch_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, dim = x.shape
    block = _block(dim)
    blocks, rows = blocks_of(x), _backward_rows(dim, x.dtype)
    shares = min(triton.cdiv(num_rows, rows), max(1, BACKWARD_PROGRAMS // blocks))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = None
    if bias is not None:
        bias, partial = bias.contiguous(), torch.empty(shares, dim, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            _bias_gelu_bwd_kernel[(shares * blocks,)](
                *(grad.contiguous(), x.contiguous(), bias, grad_x, partial, num_rows),
                DIM=dim,
                BLOCK=block,
                ROWS=rows,
                num_warps=NUM_WARPS,
            )
    return grad_x, x.new_empty(0) if partial is None else partial.sum(0)


def _runs_kernel(x: Tensor) -> bool:
    return x.dtype != torch.float64 and use_triton(x)


def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return _launch_forward(x, bias) if _runs_kernel(x) else bias_gelu_ref(x, bias)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (_launch_backward if _runs_kernel(x) else _backward_torch)(grad, x, bias)


def _backward_fake(grad, x, bias):
    if bias is None:
        return x.new_empty(x.shape), x.new_empty(0)
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, grad):
    if grad is None:
        return None, None
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = backward(grad.contiguous(), x, bias)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype)


_backward_op = register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor grad_x, Tensor grad_bias)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    _forward,
    lambda x, bias: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=lambda ctx, grad: _gradients(ctx, _backward_op, grad),
)


class _Eager(torch.autograd.Function):
    """The op without its registration, whose cost it spares."""

    @staticmethod
    def forward(ctx, x, bias):
        _setup_context(ctx, (x, bias), None)
        return _forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, _backward, grad)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The exact GELU of `x + bias`.

    x:    [T, D] fp32, bf16 or fp16 (fp64 on a CPU).
    bias: [D] of any floating dtype, added to every row, or None.

    Returns [T, D] in x's dtype; the arithmetic is fp32. Differentiable once, in both. Under `torch.compile` it is plain
    PyTorch, which the compiler fuses with what is around it. Raises ValueError.
    """
    check_tensor("x", x, "T, D", DTYPES)
    if bias is not None:
        check_tensor("bias", bias, f"{x.shape[1]}", DTYPES, x.device)
    if torch.compiler.is_compiling():
        return bias_gelu_ref(x, bias)
    if not is_plain_eager():
        return _forward_op(x, bias)
    return _Eager.apply(x, bias) if torch.is_grad_enabled() else _forward(x, bias)
