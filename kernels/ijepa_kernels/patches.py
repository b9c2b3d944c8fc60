"""gather_patches, embed_patches: from uint8 images to the patches, or the tokens, that a `Packed` names.

    gather_patches:  out[t, c, i, j] = (images[b, y * p + i, x * p + j, c] / 255 - mean[c]) / std[c]
    embed_patches:   out[t] = sum_cij weight[:, c, i, j] * patch[t, c, i, j] + bias + pos_embed[indices[t]]

with b the image of t's sequence, (y, x) = divmod(indices[t], W // p). Only the patches asked for are read, as uint8,
and normalised in fp32: C * p * p * (1 + out) bytes a token. The eager chain (to float, normalise, Conv2d over the whole
image, gather) moves the whole image three times over in floats, and the context keeps a third of it.

embed_patches is that gather, then PyTorch's matrix product, which starts to accumulate at bias + position. One kernel
for both would not write the patches and read them again. But the whole product is 0.1 % of a step (H/14: 0.5 of 658
GFLOP an image), so nobody would see the gain.
The backward gathers the patches again instead of keeping them. On a CPU that costs 2 ms in a whole step of ViT-S/16
with 16 images, on a GPU C * p * p * 3 bytes of traffic a token; it frees 1.2 kB (H/14, bf16) a token of the context.
"""
from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check_int, check_tensor, describe, is_number
from .dispatch import tl, triton, use_triton
from .packed import Packed, check_packed
from .registration import register
from .shipped import Shipped
from .sums import column_sum
from .tokens import gather_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_CHANNELS = 4  # of uint8 images: scales and shifts are arguments of the kernel, there is no tensor to upload
BLOCK_TOKENS, BLOCK_COLUMNS = 16, 128


def _affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(v / 255 - mean) / std as v * scale + shift."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


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
    # A patch is gathered as the p (uint8) or C * p (float) short rows of p pixels that lie together in memory. On a CPU
    # 1440 patches take 0.24 ms so, and 1.57 ms by indexing a strided [B, gh, gw, C, p, p] view.
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
    out = torch.empty(total, _width(columns), dtype=dtype, device=images.device)
    out[:, columns:] = 0
    patches = out[:, :columns].view(total, channels, p * p)
    if images.dtype != torch.uint8:
        patches.copy_(pixels.view(total, channels, p * p))
        return out
    scale, shift = (torch.tensor(v, device=images.device)[:, None] for v in _affine(mean, std))
    exact = patches if dtype == torch.float32 else torch.empty(total, channels, p * p, device=images.device)
    exact.copy_(pixels.view(total, p * p, channels).transpose(1, 2))
    exact.mul_(scale).add_(shift)
    if exact is not patches:
        patches.copy_(exact)
    return out


@triton.jit
def _of_channel(channel, value0, value1, value2, value3):
    return tl.where(channel == 0, value0, tl.where(channel == 1, value1, tl.where(channel == 2, value2, value3)))


@triton.jit
def _gather_patches_kernel(
    images_ptr,  # [B, CHANNELS, H, W] by its strides, uint8 or floating
    indices_ptr,  # [T]
    cu_seqlens_ptr,  # [S+1]
    image_ptr,  # [S]
    out_ptr,  # [T, WIDTH], contiguous
    blocks_per_sequence,
    grid_width,  # patches in a row of the image
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    scale0,
    scale1,
    scale2,
    scale3,
    shift0,
    shift1,
    shift2,
    shift3,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,  # CHANNELS * PATCH * PATCH and zeros up to a multiple of 8
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence = tl.program_id(0) // blocks_per_sequence
    first = tl.load(cu_seqlens_ptr + sequence) + tl.program_id(0) % blocks_per_sequence * BLOCK_T
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if first >= end:
        return
    token = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = token < end
    index = tl.load(indices_ptr + token, mask=inside, other=0)
    image = tl.load(image_ptr + sequence).to(tl.int64)
    y = (index // grid_width * PATCH).to(tl.int64)
    x = (index % grid_width * PATCH).to(tl.int64)
    corner = images_ptr + image * stride_image + y * stride_row + x * stride_column  # [BLOCK_T]
    out_row = out_ptr + token.to(tl.int64) * WIDTH
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        channel = k // (PATCH * PATCH)
        offset = channel * stride_channel + k // PATCH % PATCH * stride_row + k % PATCH * stride_column
        # Where the channels are interleaved it loads a byte at a time; the store, in 16-byte words, is what counts.
        read = inside[:, None] & (channel < CHANNELS)[None, :]
        value = tl.load(corner[:, None] + offset[None, :], mask=read, other=0).to(tl.float32)  # [BLOCK_T, BLOCK_K]
        if NORMALISE:
            scale = _of_channel(channel, scale0, scale1, scale2, scale3)
            shift = _of_channel(channel, shift0, shift1, shift2, shift3)
            value = tl.where(read, value * scale[None, :] + shift[None, :], 0.0)
        write = inside[:, None] & (k < WIDTH)[None, :]
        tl.store(out_row[:, None] + k[None, :], value.to(out_ptr.dtype.element_ty), mask=write)


def shipped() -> list[Shipped]:
    """RGB bytes as decoded, and normalised floats, for both patch sizes of the recipes."""
    floats = dict.fromkeys([f"{name}{c}" for name in ("scale", "shift") for c in range(MAX_CHANNELS)], "fp32")
    rows = []
    for patch in (14, 16):
        for source, out in (("u8", "bf16"), ("u8", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")):
            interleaved = source == "u8"
            constexprs = {
                "stride_channel" if interleaved else "stride_column": 1,
                "CHANNELS": 3,
                "PATCH": patch,
                "WIDTH": _width(3 * patch * patch),
                "NORMALISE": interleaved,
                "BLOCK_T": BLOCK_TOKENS,
                "BLOCK_K": BLOCK_COLUMNS,
            }
            divisible = ("stride_image", "stride_row") + (() if interleaved else ("stride_channel",))
            if interleaved:
                vector_bytes, note = 4, "loads a byte at a time, for the channels are interleaved; 16-byte stores"
            elif patch == 14:
                vector_bytes, note = 8, "8-byte loads, for a row of a patch is 56 bytes; 16-byte stores"
            else:
                vector_bytes, note = 16, ""
            types = {"images_ptr": source, "out_ptr": out} | floats
            options = {"divisible": divisible, "vector_bytes": vector_bytes, "note": note}
            rows.append(Shipped(_gather_patches_kernel, types, constexprs, **options))
    return rows


def _width(columns: int) -> int:
    return -(-columns // 8) * 8


def _launch(images, packed, patch_size, mean, std, dtype) -> Tensor:
    normalise = images.dtype == torch.uint8
    planar = images.permute(0, 3, 1, 2) if normalise else images
    channels = planar.shape[1]
    width = _width(channels * patch_size**2)
    out = torch.empty(packed.indices.shape[0], width, dtype=dtype, device=images.device)
    blocks = triton.cdiv(packed.max_seqlen, BLOCK_TOKENS)
    unused = [0.0] * MAX_CHANNELS
    scale, shift = ((v + unused)[:MAX_CHANNELS] for v in (_affine(mean, std) if normalise else (unused, unused)))
    if out.numel():
        with torch.cuda.device_of(images):
            _gather_patches_kernel[(packed.image.shape[0] * blocks,)](
                planar,
                *packed[:3],
                out,
                blocks,
                planar.shape[3] // patch_size,
                *planar.stride(),
                *scale,
                *shift,
                CHANNELS=channels,
                PATCH=patch_size,
                WIDTH=width,
                NORMALISE=normalise,
                BLOCK_T=BLOCK_TOKENS,
                BLOCK_K=BLOCK_COLUMNS,
            )
    return out


def _gather(
    images: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    image: Tensor,
    max_seqlen: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    body = _launch if use_triton(images) else gather_patches_ref
    return body(images, Packed(indices, cu_seqlens, image, max_seqlen), patch_size, mean, std, dtype)


def _gather_fake(images, indices, cu_seqlens, image, max_seqlen, patch_size, mean, std, dtype):
    channels = images.shape[3 if images.dtype == torch.uint8 else 1]
    return images.new_empty(indices.shape[0], _width(channels * patch_size**2), dtype=dtype)


_gather_op = register(
    "gather_patches(Tensor images, Tensor indices, Tensor cu_seqlens, Tensor image, SymInt max_seqlen, "
    "int patch_size, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    _gather,
    _gather_fake,
)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # meta has none


def _embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,  # [N, D]
    indices: Tensor,
    *rest,  # the other arguments of _gather
) -> Tensor:
    patches = _gather(images, indices, *rest)  # [T, K]
    weight = weight.to(patches.dtype).flatten(1)
    weight = F.pad(weight, (0, patches.shape[1] - weight.shape[1])).t()  # [K, D]
    with _without_autocast(images):  # the result has the dtype asked for, as the fake says
        if pos_embed is None and bias is None:
            return torch.mm(patches, weight)
        if pos_embed is None:
            return torch.addmm(bias.to(patches.dtype), patches, weight)
        # The matrix product accumulates onto this, which spares a pass over the result.
        start = pos_embed.float() if bias is None else bias.float() + pos_embed.float()
        return start.to(patches.dtype).index_select(0, indices).addmm_(patches, weight)


def _embed_fake(images, weight, bias, pos_embed, indices, *rest):
    return images.new_empty(indices.shape[0], weight.shape[0], dtype=rest[-1])


def _embed_setup_context(ctx, inputs, output):
    images, weight, bias, _, indices, cu_seqlens, image, *ctx.arguments = inputs
    ctx.save_for_backward(images, indices, cu_seqlens, image)
    ctx.weight_shape, ctx.dtypes = weight.shape, (weight.dtype, None if bias is None else bias.dtype)


def _embed_backward(ctx, grad):
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        patches = _gather_op(*ctx.saved_tensors, *ctx.arguments)
        columns = ctx.weight_shape[1:].numel()
        with _without_autocast(grad):
            grad_weight = grad.t() @ patches
        grad_weight = grad_weight[:, :columns].to(ctx.dtypes[0]).reshape(ctx.weight_shape)
    if ctx.needs_input_grad[2]:
        grad_bias = column_sum(grad).to(ctx.dtypes[1])
    return None, grad_weight, grad_bias, *(None,) * (4 + len(ctx.arguments))


_embed_op = register(
    "embed_patches(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor indices, Tensor cu_seqlens, "
    "Tensor image, SymInt max_seqlen, int patch_size, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    _embed,
    _embed_fake,
    setup_context=_embed_setup_context,
    backward=_embed_backward,
)


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
    return _gather_op(images, *packed, patch_size, mean, std, dtype)[:, : channels * patch_size**2]


def embed_patches(
    images: Tensor,
    packed: Packed,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    *,
    patch_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Patch embedding plus position of the patches that `packed` names: `Conv2d` with stride p, without the rest.

    images, packed, patch_size, mean, std: as for `gather_patches`.
    weight:    `[D, C, p, p]`, bias `[D]`: those of the `Conv2d`. Without a bias: None.
    pos_embed: `[N, D]` or `[1, N, D]`; None leaves it to the caller, who may want it added to the result in fp32.
    dtype:     of the matrix product's inputs and of the result; None takes the weight's, under torch.autocast too. The
               product accumulates in fp32 or wider.

    Returns `[T, D]`, differentiable in weight, bias and pos_embed. Raises `ValueError` for what does not fit.
    """
    check_tensor("weight", weight, "D, C, p, p")
    dtype = weight.dtype if dtype is None else dtype
    channels = _check(images, packed, patch_size, mean, std, dtype)
    dim, num_patches = weight.shape[0], _num_patches(images, patch_size)
    check_tensor("weight", weight, f"{dim}, {channels}, {patch_size}, {patch_size}", device=images.device)
    if bias is not None:
        check_tensor("bias", bias, f"{dim}", device=images.device)
    if pos_embed is not None:
        leading = "1, " if isinstance(pos_embed, Tensor) and pos_embed.ndim == 3 else ""
        check_tensor("pos_embed", pos_embed, f"{leading}{num_patches}, {dim}", device=images.device)
        pos_embed = pos_embed.reshape(num_patches, dim)
    arguments = *packed, patch_size, mean, std, dtype
    if pos_embed is None or not pos_embed.requires_grad or not torch.is_grad_enabled():
        return _embed_op(images, weight, bias, pos_embed, *arguments)
    position = gather_tokens(pos_embed[None], packed._replace(image=torch.zeros_like(packed.image)))
    return _embed_op(images, weight, bias, None, *arguments) + position.to(dtype)


def _num_patches(images: Tensor, patch_size: int) -> int:
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
    return (height // patch_size) * (width // patch_size)


def _check(
    images: Tensor, packed: Packed, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> int:
    """Everything that both ops take; returns the number of channels."""
    for name, value in (("mean", mean), ("std", std)):  # float images do not use them, but the op's schema has them
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise ValueError(f"{name}: want a list of numbers, one a channel, got {describe(value)}")
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        check_tensor("images", images, "B, H, W, C", (torch.uint8,))
        _, height, width, channels = images.shape
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"images: want 1 to {MAX_CHANNELS} channels in uint8 [B, H, W, C], got {channels}")
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(
                f"mean, std: want {channels} numbers each, one a channel of images [B, H, W, C], std positive, "
                f"got {mean} and {std}"
            )
    else:
        check_tensor("images", images, "B, C, H, W")
        _, channels, height, width = images.shape
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images: want a tensor that requires no gradient, these ops have none for it")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: want float32, bfloat16 or float16, got {dtype}")
    check_int("patch_size", patch_size)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images: want sides divisible by patch_size = {patch_size}, got {height} x {width}")
    check_packed(packed, images.device, _num_patches(images, patch_size), images.shape[0])
    return channels
