"""predictor_tokens: the predictor's input, one sequence a target block: its context's tokens, then its mask tokens.

    tokens of target sequence s = [context[r] + pos_embed[i]  for row r, patch i of its context sequence]
                                + [mask_token + pos_embed[i]  for patch i of s]

Each row of the result is written once and read from one row of `context` (or the mask token) and one position. The
released code builds the same by repeating and concatenating whole batches, which writes every element three times, and
needs all blocks of a batch to be of one length.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import FLOATS, Packed, can_read, check_packed, check_range, check_tensor, describe


def predictor_tokens_ref(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_packed: Packed,
    target_packed: Packed,
    context_of: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mask_token [P]`, `pos_embed [N, P]`, `context_of [S_tgt]`; the rest as in `predictor_tokens`."""
    source_rows, cu_seqlens, mask_rows = _plan(context_packed, target_packed, context_of)
    visible = context + pos_embed.index_select(0, context_packed.indices).to(context.dtype)
    masked = (mask_token + pos_embed.index_select(0, target_packed.indices)).to(context.dtype)
    return torch.cat([visible, masked]).index_select(0, source_rows), cu_seqlens, mask_rows


def _plan(context: Packed, target: Packed, context_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each output row comes from in [context rows ; target rows], int64 [T_out]; cu_seqlens; mask_rows.

    Reads no length from the device: the sizes follow from the shapes because every context is used equally often.
    """
    uses = target.image.numel() // max(context.image.numel(), 1)
    context_total, target_total = context.indices.numel(), target.indices.numel()
    total = context_total * uses + target_total
    context_of = context_of.long()
    context_length = context.cu_seqlens.diff()[context_of]
    target_length = target.cu_seqlens.diff()
    length = context_length + target_length
    cu_seqlens = F.pad(length.cumsum(0, dtype=torch.int32), (1, 0))

    # Per sequence: what to add to an output row to get its source row, in its context part and in its mask part.
    to_context = context.cu_seqlens[:-1][context_of] - cu_seqlens[:-1]
    to_target = context_total + target.cu_seqlens[:-1] - (cu_seqlens[:-1] + context_length)
    parts = torch.stack([context_length, target_length], 1).flatten()
    shift = torch.stack([to_context, to_target], 1).flatten().long().repeat_interleave(parts, output_size=total)
    source_rows = shift + torch.arange(total, device=shift.device)

    token = torch.arange(target_total, device=shift.device)
    mask_rows = token + (context_total - to_target.long()).repeat_interleave(target_length, output_size=target_total)
    return source_rows, cu_seqlens, mask_rows


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
    check_tensor("pos_embed", pos_embed, f"1, N, {dim}" if pos_embed.ndim == 3 else f"N, {dim}", device=context.device)
    mask_token, pos_embed = mask_token.reshape(-1), pos_embed.reshape(-1, dim)
    check_tensor("mask_token", mask_token, f"{dim}", device=context.device)
    check_packed(context_packed, context.device, pos_embed.shape[0], name="context_packed")
    check_packed(target_packed, context.device, pos_embed.shape[0], name="target_packed")
    if context_packed.indices.shape[0] != total:
        raise ValueError(f"context_packed: want {total} tokens as context has rows, got {len(context_packed.indices)}")
    contexts, sequences = context_packed.image.shape[0], target_packed.image.shape[0]
    if sequences % contexts if contexts else sequences:
        raise ValueError(f"target_packed: want as many sequences for each of {contexts} contexts, got {sequences}")
    matched = context_of is None
    if matched:
        context_of = _match_by_image(context_packed, target_packed)
    check_tensor("context_of", context_of, f"{sequences}", (torch.int32, torch.int64), context.device)
    if can_read(context_of):
        _check_context_of(context_of, matched, context_packed, target_packed)
    return predictor_tokens_ref(context, mask_token, pos_embed, context_packed, target_packed, context_of)


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
