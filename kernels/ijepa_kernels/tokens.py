"""gather_tokens, apply_masks: take the tokens of a `Packed` out of dense features.

    out[t] = x[image of t's sequence, indices[t]]

Moves 2 * D elements a token (each row read once, written once) and no index of the size of the output: the released
helper repeats its index to int64 [B, K, D], 8 bytes for every element of 2 or 4 it moves.

The backward adds each token's gradient to its row, in the order of the tokens: deterministic, also where blocks
overlap and a row is taken several times. (The backward of `x[index]` is not, on a CPU with several threads.)
"""
from collections.abc import Sequence

from torch import Tensor

from .packed import Packed, check_masks, check_packed, check_tensor


def gather_tokens_ref(x: Tensor, packed: Packed) -> Tensor:
    return x.reshape(-1, x.shape[2]).index_select(0, packed.rows(x.shape[1]))


def gather_tokens(x: Tensor, packed: Packed) -> Tensor:
    """The rows of `x` that `packed` names, in its order.

    x:      floating `[B, N, D]`, any strides.
    packed: sequences over N patches of B images.

    Returns `[T, D]` in x's dtype; differentiable in x. Raises `ValueError` for a wrong rank, device or dtype, and on
    the CPU for an index out of range.
    """
    check_tensor("x", x, "B, N, D")
    check_packed(packed, x.device, x.shape[1], x.shape[0])
    return gather_tokens_ref(x, packed)


def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """Drop-in for the helper of the released I-JEPA and V-JEPA codes.

    x:      floating `[B, N, D]`, any strides.
    masks:  M integer tensors `[B, K]`, the patches to keep.
    concat: as in V-JEPA: True gives one `[M * B, K, D]`, mask-major, and wants one K; False a list of M `[B, K, D]`.
    """
    check_masks(masks)
    check_tensor("x", x, f"{masks[0].shape[0]}, N, D")
    lengths = [m.shape[1] for m in masks]
    if concat and len(set(lengths)) > 1:
        raise ValueError(f"masks: want one length to concatenate, got {lengths}; concat=False takes them")
    batch, _, dim = x.shape
    tokens = gather_tokens(x, Packed.from_masks(masks, max(lengths)))
    if concat:
        return tokens.view(len(masks) * batch, lengths[0], dim)
    parts = tokens.split([batch * k for k in lengths])
    return [part.view(batch, k, dim) for part, k in zip(parts, lengths, strict=True)]
