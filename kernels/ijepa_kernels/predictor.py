"""predictor_tokens: the predictor's input, one sequence a target block: its context's tokens, then its mask tokens.

    tokens of target sequence s = [context[r] + pos_embed[i]  for row r, patch i of its context sequence]
                                + [mask_token + pos_embed[i]  for patch i of s]

Each row of the result is written once and read from one row of `context` (or the mask token) and one position. The
released code builds the same by repeating and concatenating whole batches, which writes every element three times, and
needs all blocks of a batch to be of one length.

The backward reads the gradient once: a context row sums its uses in the order of the target sequences, the mask token
sums the rows of each sequence, then the sequences. fp32 sums, no atomics, bitwise reproducible; but for the PyTorch
form on a GPU (IJEPA_KERNELS=torch, or no Triton), whose `index_add_` is made of float atomics.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, can_read, check_range, check_tensor, describe
from .dispatch import tl, triton, use_triton
from .packed import Packed, check_packed
from .registration import register
from .shipped import Shipped
from .tokens import BLOCK_TOKENS, gather_tokens, tile_columns


def predictor_tokens_ref(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_packed: Packed,
    target_packed: Packed,
    context_of: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`predictor_tokens` in plain PyTorch; here `mask_token [P]`, `pos_embed [N, P]`, `context_of [S_tgt]`."""
    source_rows, cu_seqlens, mask_rows = plan(context_packed, target_packed, context_of)
    pos_embed = pos_embed.float()
    visible = (context + pos_embed.index_select(0, context_packed.indices)).to(context.dtype)
    masked = (mask_token + pos_embed.index_select(0, target_packed.indices)).to(context.dtype)
    return torch.cat([visible, masked]).index_select(0, source_rows), cu_seqlens, mask_rows


def plan(context: Packed, target: Packed, context_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each output row comes from in [context rows ; target rows], int64 [T_out]; cu_seqlens; mask_rows."""
    total = sizes(context, target)[1]
    context_total, target_total = context.indices.shape[0], target.indices.shape[0]
    context_of = context_of.long()
    context_length, target_length = context.cu_seqlens.diff()[context_of], target.cu_seqlens.diff()
    cu_seqlens = sequence_ends(context, target, context_of)

    # Per sequence: what to add to an output row to get its source row, in its context part and in its mask part.
    to_context = context.cu_seqlens[:-1][context_of] - cu_seqlens[:-1]
    to_target = context_total + target.cu_seqlens[:-1] - (cu_seqlens[:-1] + context_length)
    parts = torch.stack([context_length, target_length], 1).flatten()
    shift = torch.stack([to_context, to_target], 1).flatten().long().repeat_interleave(parts, output_size=total)
    source_rows = shift + torch.arange(total, device=shift.device)

    token = torch.arange(target_total, device=shift.device)
    mask_rows = token + (context_total - to_target.long()).repeat_interleave(target_length, output_size=target_total)
    return source_rows, cu_seqlens, mask_rows


@triton.jit
def _predictor_tokens_fwd_kernel(
    context_ptr,  # [T_ctx, DIM]
    mask_token_ptr,  # [DIM], contiguous
    pos_embed_ptr,  # [N, DIM], contiguous
    context_indices_ptr,  # [T_ctx]
    context_cu_seqlens_ptr,  # [S_ctx+1]
    target_indices_ptr,  # [T_tgt]
    target_cu_seqlens_ptr,  # [S_tgt+1]
    context_of_ptr,  # [S_tgt]
    cu_seqlens_ptr,  # [S_tgt+1], of the result
    tokens_ptr,  # [T_out, DIM], contiguous
    mask_rows_ptr,  # [T_tgt]
    blocks_per_sequence,
    stride_context_row,
    stride_context_dim,
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
    visible = inside & (out_row - begin < context_length)
    masked = inside & (out_row - begin >= context_length)

    context_row = context_begin + out_row - begin
    target_row = tl.load(target_cu_seqlens_ptr + sequence) + out_row - begin - context_length
    index = tl.load(context_indices_ptr + context_row, mask=visible, other=0)
    index += tl.load(target_indices_ptr + target_row, mask=masked, other=0)
    tl.store(mask_rows_ptr + target_row, out_row.to(tl.int64), mask=masked)

    context_at = context_ptr + context_row.to(tl.int64) * stride_context_row
    position_at = pos_embed_ptr + index.to(tl.int64) * DIM
    tokens_at = tokens_ptr + out_row.to(tl.int64) * DIM
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        in_dim = column < DIM
        token = tl.load(mask_token_ptr + column, mask=in_dim, other=0).to(tl.float32)[None, :]
        value = tl.load(
            context_at[:, None] + column[None, :] * stride_context_dim, mask=visible[:, None] & in_dim[None, :], other=0
        ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        value = tl.where(visible[:, None], value, token)
        mask = inside[:, None] & in_dim[None, :]
        value += tl.load(position_at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
        tl.store(tokens_at[:, None] + column[None, :], value.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit
def predictor_tokens_bwd_context_kernel(
    grad_ptr,  # [T_out, DIM], contiguous
    context_cu_seqlens_ptr,  # [S_ctx+1]
    cu_seqlens_ptr,  # [S_tgt+1], of the result
    users_ptr,  # [S_ctx, uses], the target sequences of each context sequence, ascending
    grad_context_ptr,  # [T_ctx, DIM], contiguous
    uses,
    blocks_per_sequence,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // blocks_per_sequence
    begin = tl.load(context_cu_seqlens_ptr + sequence)
    first = begin + tl.program_id(0) % blocks_per_sequence * BLOCK_T
    end = tl.load(context_cu_seqlens_ptr + sequence + 1)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = row < end
    out_row = grad_context_ptr + row.to(tl.int64) * DIM
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = inside[:, None] & (column < DIM)[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for use in range(0, uses):
            user = tl.load(users_ptr + sequence * uses + use)
            grad_row = (tl.load(cu_seqlens_ptr + user) + row - begin).to(tl.int64) * DIM
            total += tl.load(grad_ptr + grad_row[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
        tl.store(out_row[:, None] + column[None, :], total.to(grad_context_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _predictor_tokens_bwd_mask_kernel(
    grad_ptr,  # [T_out, DIM], contiguous
    target_cu_seqlens_ptr,  # [S_tgt+1]
    cu_seqlens_ptr,  # [S_tgt+1], of the result
    partial_ptr,  # [S_tgt, DIM] fp32, the sum over the mask tokens of each sequence
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0)
    # The mask tokens are the last rows of a sequence.
    length = tl.load(target_cu_seqlens_ptr + sequence + 1) - tl.load(target_cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_dim = column < DIM
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for first in range(0, length, BLOCK_T):
        row = end - length + first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        grad_row = grad_ptr + row.to(tl.int64) * DIM
        mask = (row < end)[:, None] & in_dim[None, :]
        total += tl.load(grad_row[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(partial_ptr + sequence.to(tl.int64) * DIM + column, tl.sum(total, axis=0), mask=in_dim)


def shipped() -> list[Shipped]:
    """The predictor widths of the recipes, in bf16 and fp32, with fp32 parameters."""
    rows = []
    for dim in (192, 384):
        tile = {"DIM": dim, "BLOCK_T": BLOCK_TOKENS, "BLOCK_D": tile_columns(dim)}
        for dtype in ("bf16", "fp32"):
            forward = {"context_ptr": dtype, "mask_token_ptr": "fp32", "pos_embed_ptr": "fp32", "context_of_ptr": "i32"}
            forward |= {"tokens_ptr": dtype, "mask_rows_ptr": "i64"}
            constexprs = tile | {"stride_context_dim": 1}
            rows.append(Shipped(_predictor_tokens_fwd_kernel, forward, constexprs, divisible=("stride_context_row",)))
            backward = {"grad_ptr": dtype, "users_ptr": "i64", "grad_context_ptr": dtype}
            rows.append(Shipped(predictor_tokens_bwd_context_kernel, backward, tile))
            mask = {"grad_ptr": dtype, "partial_ptr": "fp32"}
            note = "16-byte loads; stores a row of partial sums a sequence, a column a thread"
            rows.append(Shipped(_predictor_tokens_bwd_mask_kernel, mask, tile, vector_bytes=4, note=note))
    return rows


def sequence_ends(context: Packed, target: Packed, context_of: Tensor) -> Tensor:
    """Of the result, int32 [S_tgt+1]."""
    length = context.cu_seqlens.diff().index_select(0, context_of) + target.cu_seqlens.diff()
    return F.pad(length.cumsum(0, dtype=torch.int32), (1, 0))


def sizes(context: Packed, target: Packed) -> tuple[int, int]:
    """How often each context is used, and T_out: from shapes alone, because every context is used equally often."""
    uses = target.image.shape[0] // max(context.image.shape[0], 1)
    return uses, context.indices.shape[0] * uses + target.indices.shape[0]


def _launch_forward(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_packed: Packed,
    target_packed: Packed,
    context_of: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    total, dim = sizes(context_packed, target_packed)[1], context.shape[1]
    cu_seqlens = sequence_ends(context_packed, target_packed, context_of)
    tokens = torch.empty(total, dim, dtype=context.dtype, device=context.device)
    mask_rows = torch.empty(target_packed.indices.shape[0], dtype=torch.int64, device=context.device)
    blocks = triton.cdiv(context_packed.max_seqlen + target_packed.max_seqlen, BLOCK_TOKENS)
    if total:
        with torch.cuda.device_of(context):
            _predictor_tokens_fwd_kernel[(target_packed.image.shape[0] * blocks,)](
                context,
                mask_token.contiguous(),
                pos_embed.contiguous(),
                *context_packed[:2],
                *target_packed[:2],
                context_of.int().contiguous(),
                cu_seqlens,
                tokens,
                mask_rows,
                blocks,
                *context.stride(),
                DIM=dim,
                BLOCK_T=BLOCK_TOKENS,
                BLOCK_D=tile_columns(dim),
            )
    return tokens, cu_seqlens, mask_rows


def _launch_backward(
    grad: Tensor, cu_seqlens: Tensor, context_packed: Packed, target_packed: Packed, context_of: Tensor
) -> tuple[Tensor, Tensor]:
    grad, dim, sequences = grad.contiguous(), grad.shape[1], target_packed.image.shape[0]
    grad_context = torch.empty(context_packed.indices.shape[0], dim, dtype=grad.dtype, device=grad.device)
    launch_context_gradient(grad, cu_seqlens, context_packed, target_packed, context_of, grad_context)
    partial = torch.empty(sequences, dim, dtype=torch.float32, device=grad.device)
    tile = {"DIM": dim, "BLOCK_T": BLOCK_TOKENS, "BLOCK_D": tile_columns(dim)}
    if partial.numel():
        with torch.cuda.device_of(grad):
            _predictor_tokens_bwd_mask_kernel[(sequences, triton.cdiv(dim, tile["BLOCK_D"]))](
                grad, target_packed.cu_seqlens, cu_seqlens, partial, **tile
            )
    return grad_context, partial.sum(0)


def launch_context_gradient(
    grad: Tensor,  # [T_out, DIM], contiguous
    cu_seqlens: Tensor,
    context_packed: Packed,
    target_packed: Packed,
    context_of: Tensor,
    grad_context: Tensor,  # [T_ctx, DIM], contiguous, filled
) -> None:
    if not grad_context.numel():
        return
    uses, dim = sizes(context_packed, target_packed)[0], grad.shape[1]
    blocks = triton.cdiv(context_packed.max_seqlen, BLOCK_TOKENS)
    with torch.cuda.device_of(grad):
        predictor_tokens_bwd_context_kernel[(context_packed.image.shape[0] * blocks,)](
            grad,
            context_packed.cu_seqlens,
            cu_seqlens,
            context_of.argsort(stable=True),  # sorted by context, so [S_ctx, uses]
            grad_context,
            uses,
            blocks,
            DIM=dim,
            BLOCK_T=BLOCK_TOKENS,
            BLOCK_D=tile_columns(dim),
        )


def _forward(context: Tensor, mask_token: Tensor, pos_embed: Tensor, *packs) -> tuple[Tensor, Tensor, Tensor]:
    """`packs`, here and below: the four fields of context_packed, those of target_packed, context_of."""
    body = _launch_forward if use_triton(context) else predictor_tokens_ref
    return body(context, mask_token, pos_embed, Packed(*packs[:4]), Packed(*packs[4:8]), packs[8])


def _backward(grad: Tensor, cu_seqlens: Tensor, *packs) -> tuple[Tensor, Tensor]:
    """The gradients of context, in its dtype, and of the mask token, in fp32."""
    context_packed, target_packed, context_of = Packed(*packs[:4]), Packed(*packs[4:8]), packs[8]
    if use_triton(grad):
        return _launch_backward(grad, cu_seqlens, context_packed, target_packed, context_of)
    source_rows, _, mask_rows = plan(context_packed, target_packed, context_of)
    total = context_packed.indices.shape[0]
    source = torch.zeros(total + target_packed.indices.shape[0], grad.shape[1], device=grad.device)
    source.index_add_(0, source_rows, grad.float())
    return source[:total].to(grad.dtype, copy=True), grad.index_select(0, mask_rows).sum(0, dtype=torch.float32)


def _forward_fake(context, mask_token, pos_embed, *packs):
    context_packed, target_packed = Packed(*packs[:4]), Packed(*packs[4:8])
    return (
        context.new_empty(sizes(context_packed, target_packed)[1], context.shape[1]),
        torch.empty_like(target_packed.cu_seqlens),
        torch.empty_like(target_packed.indices, dtype=torch.int64),
    )


def _backward_fake(grad, cu_seqlens, *packs):
    dim = grad.shape[1]
    return grad.new_empty(packs[0].shape[0], dim), grad.new_empty(dim, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    _, mask_token, _, *packs, context_of = inputs
    _, cu_seqlens, mask_rows = output
    ctx.mark_non_differentiable(cu_seqlens, mask_rows)
    ctx.save_for_backward(cu_seqlens, *packs[0:3], *packs[4:7], context_of)
    ctx.max_seqlens, ctx.mask_token_dtype = (packs[3], packs[7]), mask_token.dtype


def _autograd(ctx, grad, _grad_cu_seqlens, _grad_mask_rows):
    cu_seqlens, *tensors, context_of = ctx.saved_tensors
    packs = *tensors[:3], ctx.max_seqlens[0], *tensors[3:], ctx.max_seqlens[1]
    grad_context, grad_mask_token = _backward_op(grad, cu_seqlens, *packs, context_of)
    return grad_context, grad_mask_token.to(ctx.mask_token_dtype), *(None,) * 10


_PACKS = ", ".join(
    f"Tensor {name}_indices, Tensor {name}_cu_seqlens, Tensor {name}_image, SymInt {name}_max_seqlen"
    for name in ("context", "target")
)
_backward_op = register(
    f"predictor_tokens_backward(Tensor grad, Tensor cu_seqlens, {_PACKS}, Tensor context_of) "
    "-> (Tensor grad_context, Tensor grad_mask_token)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    f"predictor_tokens(Tensor context, Tensor mask_token, Tensor pos_embed, {_PACKS}, Tensor context_of) "
    "-> (Tensor tokens, Tensor cu_seqlens, Tensor mask_rows)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def _match_by_image(context: Packed, target: Packed) -> Tensor:
    """The context sequence of each target sequence, int64 [S_tgt], where every image has one context."""
    image, order = context.image.sort()
    return order[torch.searchsorted(image, target.image).clamp(max=max(image.numel() - 1, 0))]


def predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_packed: Packed,
    target_packed: Packed,
    context_of: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The predictor's packed input: per target sequence its context's tokens, then one mask token a target patch.

    context:        `[T_ctx, P]`, the context encoder's tokens at the predictor's width.
    mask_token:     P elements in any shape (`[1, 1, P]` in the models).
    pos_embed:      `[N, P]` or `[1, N, P]`.
    context_packed: the S_ctx sequences that `context` holds; target_packed: the S_tgt sequences to predict.
    context_of:     integer `[S_tgt]`, the context sequence that each target sequence is predicted from. None: every
                    image has one context sequence, and the two are matched by image. Each context must be used by
                    the same number of targets, S_tgt / S_ctx, so that the result's size is known on the host.

    Returns
    tokens:     `[T_out, P]` in context's dtype, T_out = T_ctx * (S_tgt / S_ctx) + T_tgt; differentiable in context,
                mask_token and pos_embed.
    cu_seqlens: int32 `[S_tgt + 1]`, the sequences of `tokens`.
    mask_rows:  int64 `[T_tgt]`, the rows of the mask tokens, in target's order.
    Raises `ValueError` for what does not fit.
    """
    check_tensor("context", context, "T_ctx, P")
    total, dim = context.shape
    if not isinstance(mask_token, Tensor) or mask_token.numel() != dim or mask_token.dtype not in FLOATS:
        raise ValueError(f"mask_token: want {dim} elements as context has columns, got {describe(mask_token)}")
    leading = "1, " if isinstance(pos_embed, Tensor) and pos_embed.ndim == 3 else ""
    check_tensor("pos_embed", pos_embed, f"{leading}N, {dim}", device=context.device)
    mask_token, pos_embed = mask_token.reshape(-1), pos_embed.reshape(-1, dim)
    check_tensor("mask_token", mask_token, f"{dim}", device=context.device)
    context_of = check_sequences(context_packed, target_packed, context_of, pos_embed.shape[0], context.device)
    if context_packed.indices.shape[0] != total:
        raise ValueError(f"context_packed: want {total} tokens as context has rows, got {len(context_packed.indices)}")
    arguments = *context_packed, *target_packed, context_of
    if not pos_embed.requires_grad or not torch.is_grad_enabled():
        return _forward_op(context, mask_token, pos_embed, *arguments)
    # Positions that learn (I-JEPA's do not) are added outside, by an op that has a gradient for them.
    at_context, at_target = (
        gather_tokens(pos_embed[None], packed._replace(image=torch.zeros_like(packed.image)))
        for packed in (context_packed, target_packed)
    )
    nowhere = torch.zeros_like(pos_embed).detach()
    context = (context + at_context).to(context.dtype)
    tokens, cu_seqlens, mask_rows = _forward_op(context, mask_token, nowhere, *arguments)
    return tokens.index_add(0, mask_rows, at_target.to(tokens.dtype)), cu_seqlens, mask_rows


def check_sequences(
    context_packed: Packed, target_packed: Packed, context_of: Tensor | None, num_patches: int, device: torch.device
) -> Tensor:
    """`context_of`, found by image where it is None. Raises `ValueError` for what does not fit."""
    check_packed(context_packed, device, num_patches, name="context_packed")
    check_packed(target_packed, device, num_patches, name="target_packed")
    contexts, sequences = context_packed.image.shape[0], target_packed.image.shape[0]
    if sequences % contexts if contexts else sequences:
        raise ValueError(f"target_packed: want as many sequences for each of {contexts} contexts, got {sequences}")
    matched = context_of is None
    if matched:
        context_of = _match_by_image(context_packed, target_packed)
    check_tensor("context_of", context_of, "S_tgt", (torch.int32, torch.int64), device)
    if context_of.shape[0] != sequences:
        raise ValueError(f"context_of: want {sequences} entries as target_packed has sequences, got {len(context_of)}")
    if can_read(context_of):
        _check_context_of(context_of, matched, context_packed, target_packed)
    return context_of


def _check_context_of(context_of: Tensor, matched: bool, context: Packed, target: Packed) -> None:
    contexts, sequences = context.image.shape[0], target.image.shape[0]
    check_range("context_of", "context sequences", context_of, contexts - 1)
    uses = context_of.bincount(minlength=contexts)
    if matched and not (torch.equal(context.image[context_of], target.image) and torch.equal(uses, uses.clamp(min=1))):
        raise ValueError("context_of: left out, so each image of target_packed wants one context in context_packed")
    if contexts and (uses != sequences // contexts).any():
        raise ValueError(
            f"context_of: want each context used by the same number of targets, {sequences // contexts}, "
            f"got {uses.min()} to {uses.max()}"
        )
