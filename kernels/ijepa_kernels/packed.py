"""`Packed`: which patches of which images a set of sequences looks at.

I-JEPA never shows a whole image to the context encoder, and every image keeps another number of patches. Instead of
padding, the sequences lie one behind the other in one `[T, ...]` tensor, and a `Packed` says where each begins
(`cu_seqlens`, as in FlashAttention), which patch a row is and which image it comes from.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import can_read, check_int, check_masks, check_range, check_tensor, describe

_ALIGN = 16  # int32 elements, 64 bytes: Triton compiles another variant of a kernel for pointers off 16 bytes


class Packed(NamedTuple):
    """S sequences of patches, T patches in all. A tuple of tensors, so it passes through `torch.compile` as it is.

    indices:    int32 [T], patch index in [0, N), row-major over the grid of patches, ascending inside a sequence.
    cu_seqlens: int32 [S + 1], sequence s is the rows cu_seqlens[s] : cu_seqlens[s + 1]; it may be empty.
    image:      int32 [S], the image of the batch that sequence s looks at, in any order.
    max_seqlen: an upper bound of the lengths that is constant over a run. As a Python int it is a guard of
                `torch.compile`: the batch's own maximum would compile again at every step.
    """

    indices: Tensor
    cu_seqlens: Tensor
    image: Tensor
    max_seqlen: int

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor], max_seqlen: int) -> Packed:
        """From index masks as I-JEPA's collator makes them: M integer tensors `[B, K]`, K may differ between them.

        Sequences are mask-major (mask 0 of every image, then mask 1, ...), the row order of `torch.cat` over
        `torch.gather(x, 1, mask)`.
        """
        check_masks(masks)
        check_int("max_seqlen", max_seqlen)
        longest = max(m.shape[1] for m in masks)
        if longest > max_seqlen:
            raise ValueError(f"masks: want at most max_seqlen = {max_seqlen} columns, got {longest}")
        device, batch = masks[0].device, masks[0].shape[0]
        indices = torch.cat([m.reshape(-1) for m in masks]).to(torch.int32)
        ends, start = [torch.zeros(1, dtype=torch.int32, device=device)], 0
        for m in masks:
            ends.append(start + m.shape[1] * torch.arange(1, batch + 1, dtype=torch.int32, device=device))
            start += m.numel()
        image = torch.arange(batch, dtype=torch.int32, device=device).repeat(len(masks))
        return cls(indices, torch.cat(ends), image, max_seqlen)

    @classmethod
    def dense(cls, batch: int, num_patches: int, device: torch.device | str | None = None) -> Packed:
        """Every patch of every image, one sequence an image."""
        indices = torch.arange(num_patches, dtype=torch.int32, device=device).repeat(batch)
        cu_seqlens = num_patches * torch.arange(batch + 1, dtype=torch.int32, device=device)
        return cls(indices, cu_seqlens, torch.arange(batch, dtype=torch.int32, device=device), num_patches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on `device`, moved with one copy. `non_blocking` goes through pinned memory and does not wait."""
        device = torch.device(device)
        if device.type == self.indices.device.type and device.index in (None, self.indices.device.index):
            return self
        # Indices last: the others' places are then the same in every batch. To a compiler they are a view's offset,
        # which it would compare with the number of tokens.
        parts = (self.cu_seqlens, self.image, self.indices)
        sizes = [part.numel() for part in parts]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGN) * _ALIGN)
        pin = non_blocking and device.type == "cuda" and self.indices.device.type == "cpu"
        buffer = torch.empty(starts[-1], dtype=torch.int32, device=self.indices.device, pin_memory=pin)
        for part, start, size in zip(parts, starts, sizes, strict=False):
            buffer[start : start + size] = part
        there = buffer.to(device, non_blocking=non_blocking)
        cu_seqlens, image, indices = (there[i : i + size] for i, size in zip(starts, sizes, strict=False))
        return Packed(indices, cu_seqlens, image, self.max_seqlen)

    def rows(self, num_patches: int) -> Tensor:
        """int64 `[T]`: each token's row in a dense `[B, num_patches, ...]` flattened to `[B * num_patches, ...]`."""
        image = self.image.long().repeat_interleave(self.cu_seqlens.diff(), output_size=self.indices.numel())
        return image * num_patches + self.indices


def check_packed(
    packed: Packed,
    device: torch.device,
    num_patches: int,
    num_images: int | None = None,
    name: str = "packed",
    padded: bool = False,
) -> None:
    """Raise `ValueError` unless `packed` is well formed, on `device`, and inside the grid and the batch.

    Values are read where that costs nothing, on the CPU; on another device they are read, and waited for, under
    `IJEPA_KERNELS_CHECK=1` only. `num_images` None leaves `image` unbounded. `padded`: there may be more rows than the
    sequences have.
    """
    if not isinstance(packed, (tuple, list)) or len(packed) != 4:
        raise ValueError(f"{name}: want a Packed(indices, cu_seqlens, image, max_seqlen), got {describe(packed)}")
    indices, cu_seqlens, image, max_seqlen = packed
    check_int(f"{name}.max_seqlen", max_seqlen)
    check_tensor(f"{name}.indices", indices, "T", (torch.int32,), device)
    check_tensor(f"{name}.image", image, "S", (torch.int32,), device)
    check_tensor(f"{name}.cu_seqlens", cu_seqlens, "S+1", (torch.int32,), device)
    for field, value in zip(Packed._fields, packed[:3], strict=False):
        if not value.is_contiguous():
            raise ValueError(f"{name}.{field}: want a contiguous tensor, got strides {list(value.stride())}")
    if cu_seqlens.shape[0] != image.shape[0] + 1:
        raise ValueError(
            f"{name}.cu_seqlens: want one entry more than image has sequences, "
            f"{image.shape[0] + 1}, got {cu_seqlens.shape[0]}"
        )
    if not torch.compiler.is_compiling() and not image.shape[0] and indices.shape[0]:
        raise ValueError(f"{name}.indices: want no token where there is no sequence, got {indices.shape[0]}")
    if not can_read(indices):
        return
    ends, total = cu_seqlens, indices.shape[0]
    if ends[0] != 0 or (ends[-1] > total if padded else ends[-1] != total):
        raise ValueError(f"{name}.cu_seqlens: want it to go from 0 to {total}, the tokens, got {ends[0]} to {ends[-1]}")
    check_range(f"{name}.cu_seqlens", "lengths (0 to max_seqlen)", ends.diff(), max_seqlen)
    check_range(f"{name}.indices", "patches", indices, num_patches - 1)
    if num_images is not None:
        check_range(f"{name}.image", "images", image, num_images - 1)
