"""predictor_rows: what was computed once for a token, laid out in every sequence of `predictor_tokens` that has it.

    rows of target sequence s = [x[r]            for row r of its context sequence]
                                + [x[T_ctx + i]  for patch i of s]

A token enters the predictor with nothing but its content and its position. So what a layer makes of each token by
itself, a norm or a projection, is one row a context token, whatever the number of targets that are predicted from it,
and one row a patch for the mask tokens, whatever the number of blocks that cover it: `x` holds the T_ctx rows of the
contexts, then N of the patches. Bytes: each row of the result is written once; `x`, a fraction of it, is read.

The backward reads the gradient once: a context row sums its uses in the order of the target sequences, a patch those of
all blocks that cover it. fp32 sums, no atomics, bitwise reproducible; but for the PyTorch form on a GPU
(IJEPA_KERNELS=torch, or no Triton), whose `index_add_` is made of float atomics.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import tl, triton, use_triton
from .packed import Packed
from .predictor import (
    check_sequences,
    launch_context_gradient,
    plan,
    predictor_tokens_bwd_context_kernel,
    sequence_ends,
    sizes,
)
from .registration import register
from .shipped import Shipped
from .tokens import BLOCK_TOKENS, tile_columns

BLOCK_USES = 16  # of a patch that are summed at a time; not measured yet


def predictor_rows_ref(x: Tensor, context_packed: Packed, target_packed: Packed, context_of: Tensor) -> Tensor:
    """`predictor_rows` in plain PyTorch."""
    source_rows, _, _ = plan(context_packed, target_packed, context_of)
    return x.index_select(0, _rows_of_x(source_rows, context_packed, target_packed))


def _rows_of_x(source_rows: Tensor, context: Packed, target: Packed) -> Tensor:
    """The row of x that each row of the result is, int64 [T_out]; `source_rows` counts mask tokens, not patches."""
    total = context.indices.shape[0]
    distinct = torch.cat([torch.arange(total, device=source_rows.device), total + target.indices])
    return distinct.index_select(0, source_rows)


@triton.jit
def _predictor_rows_fwd_kernel(
    x_ptr,  # [T_ctx+N, DIM], contiguous
    context_cu_seqlens_ptr,  # [S_ctx+1]
    target_indices_ptr,  # [T_tgt]
    target_cu_seqlens_ptr,  # [S_tgt+1]
    context_of_ptr,  # [S_tgt]
    cu_seqlens_ptr,  # [S_tgt+1], of the result
    out_ptr,  # [T_out, DIM], contiguous
    mask_rows_ptr,  # [T_tgt], the rows of the result that stand for mask tokens
    num_context_rows,
    blocks_per_sequence,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // blocks_per_sequence
    begin = tl.load(cu_seqlens_ptr + sequence)
    first = begin + tl.program_id(0) % blocks_per_sequence * BLOCK_T
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if first >= end:
        return
    out_row = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = out_row < end
    context_sequence = tl.load(context_of_ptr + sequence)
    context_begin = tl.load(context_cu_seqlens_ptr + context_sequence)
    context_length = tl.load(context_cu_seqlens_ptr + context_sequence + 1) - context_begin
    masked = inside & (out_row - begin >= context_length)

    target_row = tl.load(target_cu_seqlens_ptr + sequence) + out_row - begin - context_length
    patch = tl.load(target_indices_ptr + target_row, mask=masked, other=0)
    tl.store(mask_rows_ptr + target_row, out_row.to(tl.int64), mask=masked)
    row = tl.where(masked, num_context_rows + patch, context_begin + out_row - begin)
    x_at = x_ptr + row.to(tl.int64) * DIM
    out_at = out_ptr + out_row.to(tl.int64) * DIM
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = inside[:, None] & (column < DIM)[None, :]
        tl.store(out_at[:, None] + column[None, :], tl.load(x_at[:, None] + column[None, :], mask=mask), mask=mask)


@triton.jit
def _predictor_rows_bwd_patch_kernel(
    grad_ptr,  # [T_out, DIM], contiguous
    rows_ptr,  # [T_tgt], the rows of the mask tokens, sorted by patch
    starts_ptr,  # [N+1], where in `rows` those of each patch begin
    grad_patch_ptr,  # [N, DIM], contiguous
    DIM: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    patch = tl.program_id(0)
    start = tl.load(starts_ptr + patch)
    end = tl.load(starts_ptr + patch + 1)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_dim = column < DIM
    total = tl.zeros([BLOCK_U, BLOCK_D], dtype=tl.float32)
    for first in range(start, end, BLOCK_U):
        use = first + tl.arange(0, BLOCK_U)  # [BLOCK_U]
        row = tl.load(rows_ptr + use, mask=use < end, other=0)
        mask = (use < end)[:, None] & in_dim[None, :]
        total += tl.load(grad_ptr + (row * DIM)[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    value = tl.sum(total, axis=0).to(grad_patch_ptr.dtype.element_ty)
    tl.store(grad_patch_ptr + patch.to(tl.int64) * DIM + column, value, mask=in_dim)


def shipped() -> list[Shipped]:
    """Queries, keys and values of the recipes' predictors, in bf16 and fp32."""
    rows = []
    for dim in (576, 1152):
        tile = {"DIM": dim, "BLOCK_T": BLOCK_TOKENS, "BLOCK_D": tile_columns(dim)}
        for dtype in ("bf16", "fp32"):
            forward = {"x_ptr": dtype, "context_of_ptr": "i32", "out_ptr": dtype, "mask_rows_ptr": "i64"}
            rows.append(Shipped(_predictor_rows_fwd_kernel, forward, tile))
            context = {"grad_ptr": dtype, "users_ptr": "i64", "grad_context_ptr": dtype}
            rows.append(Shipped(predictor_tokens_bwd_context_kernel, context, tile))
            patch = {"grad_ptr": dtype, "rows_ptr": "i64", "starts_ptr": "i32", "grad_patch_ptr": dtype}
            constexprs = {"DIM": dim, "BLOCK_U": BLOCK_USES, "BLOCK_D": tile_columns(dim)}
            note = "16-byte loads; stores one row, a column a thread"
            narrow = {"bf16": 2, "fp32": 4}[dtype]
            rows.append(Shipped(_predictor_rows_bwd_patch_kernel, patch, constexprs, vector_bytes=narrow, note=note))
    return rows


def _launch_forward(x: Tensor, context: Packed, target: Packed, context_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, dim, total = x.contiguous(), x.shape[1], sizes(context, target)[1]
    cu_seqlens = sequence_ends(context, target, context_of)
    out = torch.empty(total, dim, dtype=x.dtype, device=x.device)
    mask_rows = torch.empty(target.indices.shape[0], dtype=torch.int64, device=x.device)
    blocks = triton.cdiv(context.max_seqlen + target.max_seqlen, BLOCK_TOKENS)
    if total:
        with torch.cuda.device_of(x):
            _predictor_rows_fwd_kernel[(target.image.shape[0] * blocks,)](
                x,
                context.cu_seqlens,
                target.indices,
                target.cu_seqlens,
                context_of.int().contiguous(),
                cu_seqlens,
                out,
                mask_rows,
                context.indices.shape[0],
                blocks,
                DIM=dim,
                BLOCK_T=BLOCK_TOKENS,
                BLOCK_D=tile_columns(dim),
            )
    return out, cu_seqlens, mask_rows


def _launch_backward(
    grad: Tensor, cu_seqlens: Tensor, mask_rows: Tensor, context: Packed, target: Packed, context_of: Tensor, rows: int
) -> Tensor:
    grad, dim, total = grad.contiguous(), grad.shape[1], context.indices.shape[0]
    grad_x = torch.empty(rows, dim, dtype=grad.dtype, device=grad.device)
    launch_context_gradient(grad, cu_seqlens, context, target, context_of, grad_x[:total])
    if grad_x[total:].numel():
        patch, order = target.indices.sort(stable=True)
        every_patch = torch.arange(rows - total + 1, dtype=torch.int32, device=grad.device)
        starts = torch.searchsorted(patch, every_patch, out_int32=True)
        block = tile_columns(dim)
        with torch.cuda.device_of(grad):
            _predictor_rows_bwd_patch_kernel[(rows - total, triton.cdiv(dim, block))](
                grad,
                mask_rows.index_select(0, order),
                starts,
                grad_x[total:],
                DIM=dim,
                BLOCK_U=BLOCK_USES,
                BLOCK_D=block,
            )
    return grad_x


def _forward(x: Tensor, *packs) -> tuple[Tensor, Tensor, Tensor]:
    """`packs`, here and below: the four fields of context_packed, those of target_packed, context_of.

    With the result its cu_seqlens and the rows of its mask tokens, which the kernel's backward reads.
    """
    context, target, context_of = Packed(*packs[:4]), Packed(*packs[4:8]), packs[8]
    if use_triton(x):
        return _launch_forward(x, context, target, context_of)
    source_rows, cu_seqlens, mask_rows = plan(context, target, context_of)
    return x.index_select(0, _rows_of_x(source_rows, context, target)), cu_seqlens, mask_rows


def _backward(grad: Tensor, cu_seqlens: Tensor, mask_rows: Tensor, *rest) -> Tensor:
    *packs, rows = rest
    context, target, context_of = Packed(*packs[:4]), Packed(*packs[4:8]), packs[8]
    if use_triton(grad):
        return _launch_backward(grad, cu_seqlens, mask_rows, context, target, context_of, rows)
    # On a CPU index_add_ goes through the rows in order, whatever the number of threads.
    source_rows, _, _ = plan(context, target, context_of)
    total = torch.zeros(rows, grad.shape[1], device=grad.device)
    return total.index_add_(0, _rows_of_x(source_rows, context, target), grad.float()).to(grad.dtype)


def _forward_fake(x, *packs):
    context, target = Packed(*packs[:4]), Packed(*packs[4:8])
    return (
        x.new_empty(sizes(context, target)[1], x.shape[1]),
        torch.empty_like(target.cu_seqlens),
        torch.empty_like(target.indices, dtype=torch.int64),
    )


def _backward_fake(grad, cu_seqlens, mask_rows, *rest):
    return grad.new_empty(rest[-1], grad.shape[1])


def _setup_context(ctx, inputs, output):
    x, *packs, context_of = inputs
    _, cu_seqlens, mask_rows = output
    ctx.mark_non_differentiable(cu_seqlens, mask_rows)
    ctx.save_for_backward(cu_seqlens, mask_rows, *packs[0:3], *packs[4:7], context_of)
    ctx.max_seqlens, ctx.rows = (packs[3], packs[7]), x.shape[0]


def _autograd(ctx, grad, _grad_cu_seqlens, _grad_mask_rows):
    cu_seqlens, mask_rows, *tensors, context_of = ctx.saved_tensors
    packs = *tensors[:3], ctx.max_seqlens[0], *tensors[3:], ctx.max_seqlens[1]
    return _backward_op(grad, cu_seqlens, mask_rows, *packs, context_of, ctx.rows), *(None,) * 9


_PACKS = ", ".join(
    f"Tensor {name}_indices, Tensor {name}_cu_seqlens, Tensor {name}_image, SymInt {name}_max_seqlen"
    for name in ("context", "target")
)
_backward_op = register(
    f"predictor_rows_backward(Tensor grad, Tensor cu_seqlens, Tensor mask_rows, {_PACKS}, Tensor context_of, "
    "SymInt rows) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    f"predictor_rows(Tensor x, {_PACKS}, Tensor context_of) -> (Tensor out, Tensor cu_seqlens, Tensor mask_rows)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def predictor_rows(
    x: Tensor, context_packed: Packed, target_packed: Packed, context_of: Tensor | None = None
) -> Tensor:
    """The rows of `x` in the order in which `predictor_tokens` lists the tokens that they belong to.

    x:          `[T_ctx + N, C]`, a row for each token of `context_packed`, then a row for each of N patches.
    The others: as in `predictor_tokens`.

    Returns `[T_out, C]` in x's dtype; differentiable in x, once. Raises `ValueError` for what does not fit.
    """
    check_tensor("x", x, "T_ctx + N, C")
    patches = x.shape[0] - context_packed.indices.shape[0]
    if not torch.compiler.is_compiling() and patches < 0:
        raise ValueError(f"x: want the {len(context_packed.indices)} rows of context_packed and N, got {x.shape[0]}")
    context_of = check_sequences(context_packed, target_packed, context_of, patches, x.device)
    return _forward_op(x, *context_packed, *target_packed, context_of)[0]
