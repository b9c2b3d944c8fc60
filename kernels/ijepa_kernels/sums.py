"""column_sum: the sum over the rows of a matrix, in fp32: the gradient of a linear layer's bias.

    out[d] = sum of x[t, d] over t

Bytes an element in bf16: 2, each read once. PyTorch's own sums took 5.7 ms of a step of the huge model on an H100; the
bytes alone take 2. Two stages, without atomics and so bitwise reproducible: each program sums some of the rows of some
columns, then the same kernel sums what they left, a few hundred rows at most.

Where the pass that makes the gradient can sum it too, that is cheaper still: see `bias_gelu` and `add_layer_norm`.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_tensor
from .dispatch import tl, triton, use_triton
from .registration import is_plain_eager, register
from .shipped import Shipped

DTYPES = (*FLOATS, torch.float64)  # the last on a CPU alone
# Programs of the first stage: eight on each of the 132 multiprocessors of an H100, each with 4 or 8 KB of bf16 on its
# way: 3 TB/s times a latency of 700 ns are 16 KB a multiprocessor. Reckoned, not measured.
PROGRAMS, TILE, LARGEST_BLOCK, MOST_ROWS, NUM_WARPS = 1056, 4096, 256, 32, 4
# Of the second stage: columns and rows of a tile. Narrow: there is but one row of programs to fill a chip with.
LAST_BLOCK, LAST_ROWS = 32, 128


def _block(dim: int) -> int:
    """Columns of a tile: a power of two that divides the width where there is one, so that no lane idles.

    Even 64 of bf16 are a cache line.
    """
    divisor = dim & -dim
    return min(divisor if divisor >= 64 else 1 << (dim - 1).bit_length(), LARGEST_BLOCK)


def _rows(block: int) -> int:
    return min(MOST_ROWS, TILE // block)


def blocks_of(dim: int) -> int:
    """Tiles beside each other that cover a row."""
    return -(-dim // _block(dim))


def shares_of(num_rows: int, dim: int) -> int:
    """Programs that share the rows of each block of columns; as many rows of partial sums are left."""
    return min(-(-num_rows // _rows(_block(dim))), max(1, PROGRAMS // blocks_of(dim)))


def column_sum_ref(x: Tensor) -> Tensor:
    """`column_sum` as plain, differentiable PyTorch, in at least fp32."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


@triton.jit(do_not_specialize=["num_rows"])
def _column_sum_kernel(
    x_ptr,  # [T, DIM], contiguous
    out_ptr,  # fp32 [programs of a block of columns, DIM]
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
    # In strides, so that programs that run at the same time read what lies together.
    for first in range(share * ROWS, num_rows, tl.num_programs(0) // blocks * ROWS):
        row = first + tl.arange(0, ROWS)  # [ROWS]
        mask = (row < num_rows)[:, None] & in_dim[None, :]
        offset = (row.to(tl.int64) * DIM)[:, None] + column[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    tl.store(out_ptr + share * DIM + column, tl.sum(total, 0), mask=in_dim)


def shipped() -> list[Shipped]:
    """Every model's width, what its queries, keys and values have together, and the widest MLP; in fp32 at one.

    The second stage differs in the width alone.
    """
    options = {"vector_bytes": 4, "note": "16-byte loads; stores one row, one or two sums a thread"}
    table = [(dim, "bf16") for dim in (192, 384, 576, 768, 1024, 1152, 1280, 1408, 2304, 3072, 3840, 4224, 6144)]
    rows = [(dim, dtype, _block(dim), _rows(_block(dim))) for dim, dtype in (*table, (1280, "fp32"))]
    rows += [(dim, "fp32", LAST_BLOCK, LAST_ROWS) for dim in (192, 1280, 3840)]
    return [
        Shipped(
            _column_sum_kernel,
            dict(x_ptr=dtype, out_ptr="fp32"),
            dict(DIM=dim, BLOCK=block, ROWS=height),
            NUM_WARPS,
            **options,
        )
        for dim, dtype, block, height in rows
    ]


def _launch(x: Tensor) -> Tensor:
    num_rows, dim = x.shape
    if not x.numel():
        return torch.zeros(dim, dtype=torch.float32, device=x.device)
    block, shares = _block(dim), shares_of(num_rows, dim)
    out = torch.empty(dim, dtype=torch.float32, device=x.device)
    partial = out if shares == 1 else torch.empty(shares, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _column_sum_kernel[(shares * blocks_of(dim),)](
            x.contiguous(), partial, num_rows, DIM=dim, BLOCK=block, ROWS=_rows(block), num_warps=NUM_WARPS
        )
        if shares > 1:
            _column_sum_kernel[(triton.cdiv(dim, LAST_BLOCK),)](
                partial, out, shares, DIM=dim, BLOCK=LAST_BLOCK, ROWS=LAST_ROWS, num_warps=NUM_WARPS
            )
    return out


def _sum(x: Tensor) -> Tensor:
    return _launch(x) if x.dtype != torch.float64 and use_triton(x) else column_sum_ref(x)


def _setup_context(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _gradient(ctx, grad):
    return grad.expand(ctx.shape)  # autograd rounds it to x's dtype


_op = register(
    "column_sum(Tensor x) -> Tensor",
    _sum,
    lambda x: x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)),
    setup_context=_setup_context,
    backward=_gradient,
)


class _Eager(torch.autograd.Function):
    """The op without its registration, whose cost it spares."""

    @staticmethod
    def forward(ctx, x):
        _setup_context(ctx, (x,), None)
        return _sum(x)

    backward = staticmethod(_gradient)


def column_sum(x: Tensor) -> Tensor:
    """The sum over the rows of x.

    x: [T, D] fp32, bf16 or fp16 (fp64 on a CPU).

    Returns fp32 [D] (fp64 of fp64), summed in that dtype. Differentiable. Under `torch.compile` it is plain PyTorch,
    which the compiler fuses with what makes x. Raises ValueError.
    """
    check_tensor("x", x, "T, D", DTYPES)
    if torch.compiler.is_compiling():
        return column_sum_ref(x)
    if not is_plain_eager():
        return _op(x)
    return _Eager.apply(x) if torch.is_grad_enabled() and x.requires_grad else _sum(x)
