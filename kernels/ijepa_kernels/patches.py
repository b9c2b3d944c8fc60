"""gather_patches, embed_patches: from uint8 images to the patches, or the tokens, that a `Packed` names.

    gather_patches:  out[t, c, i, j] = (images[b, y * p + i, x * p + j, c] / 255 - mean[c]) / std[c]
    embed_patches:   out[t] = sum_cij weight[:, c, i, j] * patch[t, c, i, j] + bias + pos_embed[indices[t]]

with b the image of t's sequence, (y, x) = divmod(indices[t], W // p). Only the patches asked for are read, as uint8,
and normalised in fp32: C * p * p * (1 + out) bytes a token, where the eager chain (to float, normalise, Conv2d over
the whole image, gather) moves the whole image three times over in floats, and the context keeps a third of it.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import FLOATS, Packed, check_packed, check_tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def gather_patches_ref(
    images: Tensor,
    packed: Packed,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """`[T, C*p*p rounded up to a multiple of 8]`, zeros in the columns beyond C*p*p."""
    p, total = patch_size, packed.indices.numel()
    # A patch is gathered as the p (uint8) or C * p (float) short rows of p pixels that lie together in memory: on a
    # CPU 6 times faster than indexing a strided [B, gh, gw, C, p, p] view, and no slower than a reshape when dense.
    if images.dtype == torch.uint8:
        batch, height, width, channels = images.shape
        grid_w, leading, row = width // p, 1, p * channels
    else:
        batch, channels, height, width = images.shape
        grid_w, leading, row = width // p, channels, p
    cell = packed.rows((height // p) * grid_w)
    image = cell.div((height // p) * grid_w, rounding_mode="floor")
    y = packed.indices.div(grid_w, rounding_mode="floor").long()
    first = (image * leading * height + y * p) * grid_w + packed.indices.remainder(grid_w)
    offset = torch.arange(leading, device=images.device)[:, None] * (height * grid_w)
    offset = offset + torch.arange(p, device=images.device) * grid_w
    rows = (first[:, None] + offset.flatten()).flatten()
    pixels = images.reshape(batch * leading * height * grid_w, row).index_select(0, rows)

    columns = channels * p * p
    out = torch.empty(total, -(-columns // 8) * 8, dtype=dtype, device=images.device)
    out[:, columns:] = 0
    patches = out[:, :columns].view(total, channels, p * p)
    if images.dtype != torch.uint8:
        patches.copy_(pixels.view(total, channels, p * p))
        return out
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)[:, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None]
    exact = patches if dtype == torch.float32 else torch.empty(total, channels, p * p, device=images.device)
    exact.copy_(pixels.view(total, p * p, channels).transpose(1, 2))
    exact.mul_(scale).add_(shift)
    if exact is not patches:
        patches.copy_(exact)
    return out


def gather_patches(
    images: Tensor,
    packed: Packed,
    *,
    patch_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The patches that `packed` names, normalised, as rows in the column order of a `Conv2d` weight `[D, C, p, p]`.

    images: uint8 `[B, H, W, C]`, divided by 255 and normalised with `mean` and `std` (C numbers each, in [0, 1]); or
            float `[B, C, H, W]`, taken as normalised. Any strides. H and W are multiples of `patch_size`.
    packed: sequences over N = (H / p) * (W / p) patches of B images.
    dtype:  floating dtype of the result; the arithmetic is fp32.

    Returns `[T, C*p*p]`. Where C*p*p is no multiple of 8 (588 at patch 14) the rows are stored with zeros up to one, so
    that each starts at 16 bytes, and the result is the view without them. Not differentiable in `images`.
    Raises `ValueError` for what does not fit.
    """
    channels = _check(images, packed, patch_size, mean, std, dtype)
    return gather_patches_ref(images, packed, patch_size, mean, std, dtype)[:, : channels * patch_size**2]


def embed_patches_ref(
    images: Tensor,
    packed: Packed,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    patches = gather_patches_ref(images, packed, patch_size, mean, std, dtype)
    weight = weight.to(dtype).flatten(1)
    weight = F.pad(weight, (0, patches.shape[1] - weight.shape[1]))
    # Bias and position are where the matrix product starts to accumulate: no pass over the result afterwards.
    start = (bias.float() + pos_embed.float()).to(dtype).index_select(0, packed.indices)
    return start.addmm_(patches, weight.t())


def embed_patches(
    images: Tensor,
    packed: Packed,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Patch embedding plus position of the patches that `packed` names: `Conv2d` with stride p, without the rest.

    images, packed, patch_size, mean, std: as for `gather_patches`.
    weight:    `[D, C, p, p]`, bias `[D]`: those of the `Conv2d`.
    pos_embed: `[N, D]` or `[1, N, D]`.
    dtype:     of the matrix product's inputs and of the result; None takes the weight's. The product accumulates in
               fp32 or wider.

    Returns `[T, D]`, differentiable in weight, bias and pos_embed. Raises `ValueError` for what does not fit.
    """
    check_tensor("weight", weight, "D, C, p, p")
    dtype = weight.dtype if dtype is None else dtype
    channels = _check(images, packed, patch_size, mean, std, dtype)
    dim, num_patches = weight.shape[0], _num_patches(images, patch_size)
    check_tensor("weight", weight, f"{dim}, {channels}, {patch_size}, {patch_size}", device=images.device)
    check_tensor("bias", bias, f"{dim}", device=images.device)
    pos_shape = f"{num_patches}, {dim}"
    check_tensor("pos_embed", pos_embed, f"1, {pos_shape}" if pos_embed.ndim == 3 else pos_shape, device=images.device)
    pos_embed = pos_embed.reshape(num_patches, dim)
    return embed_patches_ref(images, packed, weight, bias, pos_embed, patch_size, mean, std, dtype)


def _num_patches(images: Tensor, patch_size: int) -> int:
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
    return (height // patch_size) * (width // patch_size)


def _check(
    images: Tensor, packed: Packed, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> int:
    """Everything that both ops take; returns the number of channels."""
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        check_tensor("images", images, "B, H, W, C", (torch.uint8,))
        _, height, width, channels = images.shape
        if len(mean) != channels or len(std) != channels or min(std, default=1) <= 0:
            raise ValueError(
                f"mean, std: want {channels} numbers each, one a channel of images [B, H, W, C], std positive, "
                f"got {mean} and {std}"
            )
    else:
        check_tensor("images", images, "B, C, H, W")
        _, channels, height, width = images.shape
    if images.requires_grad:
        raise ValueError("images: want a tensor that requires no gradient, these ops have none for it")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: want float32, bfloat16 or float16, got {dtype}")
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images: want sides divisible by patch_size = {patch_size}, got {height} x {width}")
    check_packed(packed, images.device, _num_patches(images, patch_size), images.shape[0])
    return channels
