"""Masks padded to one of a few sizes, so that a captured CUDA graph can compute the step of any batch.

A graph computes as many tokens at every replay as when it was captured. So a few more sequences, of no image, are
listed behind those of a batch: contexts, and the target blocks that are predicted from them, as many for each as there
are for the others. They share among them the tokens that the batch lacks to the next size.

This changes no number of the others: a token attends to its own sequence alone, everything else in the models works on
single tokens, and the loss counts the rows of real sequences only, so that no gradient comes from padding.
"""
from typing import NamedTuple

import torch
from ijepa_kernels import Packed
from torch import Tensor

from ijepa_fast.masks import Masks

# Sizes, from nothing to the most tokens that a batch can have. Half of one of them is wasted in the mean, of the 10 to
# 15 that contexts mostly have; and each size that occurs is captured once.
SIZES = 32
COVERED_SIZES = 16  # of the rows that the target encoder's last block finishes, row 0 again where there are no more


class Padded(NamedTuple):
    """What `ijepa_loss` reads of masks, as tensors whose shapes `size` says."""

    context: Packed
    target: Packed  # the predictor's
    context_of: Tensor  # int32 [S_tgt]
    covered: Tensor  # int64 [R]: the rows of the target encoder's features, image * N + patch, that are computed
    compared: Packed  # of the real sequences, with padding behind them: which of `covered` each predicted row is

    @property
    def size(self) -> tuple[int, ...]:
        """Equal for batches that one graph computes."""
        return tuple(len(x) for x in (*self.tensors(), self.covered))

    def tensors(self) -> list[Tensor]:
        """All int32 that differs between batches; the lengths of `compared` are the first of `target`."""
        return [*self.context[:3], *self.target[:3], self.context_of, self.compared.indices]

    def clone(self) -> "Padded":
        """In memory of its own, where another batch of this size is to be written: its `tensors()` and `covered`."""
        context, target = (
            Packed(packed.indices.clone(), packed.cu_seqlens.clone(), packed.image.clone(), packed.max_seqlen)
            for packed in (self.context, self.target)
        )
        sequences = len(self.compared.image)
        compared = Packed(
            self.compared.indices.clone(),
            target.cu_seqlens[: sequences + 1],
            torch.zeros_like(self.compared.image),
            target.max_seqlen,
        )
        return Padded(context, target, self.context_of.clone(), self.covered.clone(), compared)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Padded":
        packs = (packed.to(device, non_blocking) for packed in (self.context, self.target, self.compared))
        context, target, compared = packs
        pinned = [x.pin_memory() if non_blocking else x for x in (self.context_of, self.covered)]
        context_of, covered = (x.to(device, non_blocking=non_blocking) for x in pinned)
        return Padded(context, target, context_of, covered, compared)


def pad(masks: Masks, patches: int) -> Padded:
    """Masks on the host of a (micro-)batch that has `patches` patches in all."""
    context, target, context_of, covered = masks
    assert covered is not None
    contexts, targets = len(context.image), len(target.image)
    uses = targets // contexts
    missing_context, step_context = _missing(context)
    missing_target, step_target = _missing(target)
    # As many whatever is missing, and enough for the most.
    fillers = max(-(-step_context // context.max_seqlen), -(-step_target // (uses * target.max_seqlen)))
    filler_of = contexts + torch.arange(fillers, dtype=torch.int32).repeat_interleave(uses)
    step = -(-patches // COVERED_SIZES)
    rows = min(-(-len(covered.rows) // step) * step, patches)
    return Padded(
        context=_extend(context, _share(missing_context, fillers)),
        target=_extend(target, _share(missing_target, fillers * uses)),
        context_of=torch.cat([context_of, filler_of]),
        covered=torch.nn.functional.pad(covered.rows, (0, rows - len(covered.rows))),
        compared=target._replace(
            indices=torch.nn.functional.pad(covered.target, (0, missing_target)),
            image=torch.zeros_like(target.image),  # to the loss the covered rows are the patches of one image
        ),
    )


def _missing(packed: Packed) -> tuple[int, int]:
    """Tokens to the next size, and from one size to the next."""
    step = -(-len(packed.image) * packed.max_seqlen // SIZES)
    return -len(packed.indices) % step, step


def _share(tokens: int, sequences: int) -> list[int]:
    """Lengths of sequences that have so many tokens in all."""
    short, longer = divmod(tokens, sequences)
    return [short + (i < longer) for i in range(sequences)]


def _extend(packed: Packed, lengths: list[int]) -> Packed:
    """With sequences of these lengths behind the others: the first patches of image 0, which are always there."""
    more = [torch.arange(length, dtype=torch.int32) for length in lengths]
    ends = packed.cu_seqlens[-1] + torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    return Packed(
        torch.cat([packed.indices, *more]),
        torch.cat([packed.cu_seqlens, ends.int()]),
        torch.cat([packed.image, packed.image.new_zeros(len(lengths))]),
        packed.max_seqlen,
    )
