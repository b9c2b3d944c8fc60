"""Where the heads look: the attention of one patch to all others, head by head.

`python -m ijepa_fast.view attention WEIGHTS IMAGES... --out attention.png`. I-JEPA has no class token, so a patch must
be chosen whose attention is drawn; by default the one in the middle.
"""
import argparse
from pathlib import Path
from typing import cast

import numpy as np
import torch
from ijepa_kernels import Packed
from torch import Tensor

from ijepa_fast.blocks import Block
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.errors import UserError
from ijepa_fast.model import VisionTransformer
from ijepa_fast.view.open import chosen, open_model
from ijepa_fast.view.sheet import COLOURS, Sheet, resized, whole_cells

_PANEL = 160  # pixels
_HEAT = np.array([[18, 22, 28], [84, 39, 143], [203, 71, 119], [248, 149, 64], [252, 253, 191]], float)


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, images: Tensor, layer: int, patch: int) -> Tensor:
    """How block `layer` (from 0; negative from the end) distributes the attention of `patch`: fp32 `[B, heads, N]`.

    softmax(q k / sqrt(head_dim)), rows sum to 1. `images` as the encoder takes them.
    """
    packed = Packed.dense(len(images), encoder.grid**2, device=images.device)
    x, branch = encoder.patch_embed(images, packed, encoder.pos_embed, encoder.residual_dtype)
    blocks = list(encoder.blocks)
    for block in blocks[: layer % len(blocks)]:
        x, branch = block(x, branch, packed.cu_seqlens, packed.max_seqlen)
    block = cast(Block, blocks[layer])
    heads = block.attn.num_heads
    _, normed = block.norm1(x, branch, encoder.compute_dtype)
    q, k, _ = block.attn.qkv(normed).float().view(len(images), -1, 3, heads, x.shape[1] // heads).unbind(2)
    return torch.einsum("bhd,bnhd->bhn", q[:, patch] * q.shape[-1] ** -0.5, k).softmax(-1)


def attention_sheet(
    images: Tensor, maps: Tensor, patch: int, layer: str, out_path: str | Path, names: list[str]
) -> Path:
    """Write a PNG: each crop (uint8 `[B, S, S, 3]`) with the patch marked, and its heads' `maps` (`[B, heads, N]`)."""
    grid = round(maps.shape[2] ** 0.5)
    columns = ["crop", *(f"head {head + 1}" for head in range(maps.shape[1]))]
    facts = f"{layer}: attention of the outlined patch to all {grid} x {grid}, dark to bright over the range below"
    sheet = Sheet("Attention of the heads", facts, columns, len(images), panel=whole_cells(grid, _PANEL))
    marked = (np.arange(grid * grid) == patch).reshape(grid, grid)
    for row, (image, heads, name) in enumerate(zip(images, maps.cpu().numpy(), names, strict=True)):
        crop = resized(image.numpy(), sheet.panel)
        sheet.draw(row, 0, crop, name)
        sheet.outline(row, 0, marked, COLOURS[0], width=1.5)
        for column, weights in enumerate(heads, start=1):
            low, high = np.quantile(weights, [0.01, 0.99])
            heat = _coloured((weights.reshape(grid, grid) - low) / max(high - low, 1e-12))
            sheet.draw(row, column, resized(heat, sheet.panel), f"{low:.2%} to {high:.2%}")
            sheet.outline(row, column, marked, COLOURS[0])
    return sheet.save(out_path)


def _coloured(values: np.ndarray) -> np.ndarray:
    """Values of 0 to 1 (more is cut) from dark to bright: uint8 `[..., 3]`."""
    place = values.clip(0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    share = (place - low)[..., None]
    return ((1 - share) * _HEAT[low] + share * _HEAT[low + 1]).astype(np.uint8)


def draw(args: argparse.Namespace) -> None:
    index = index_images(args.images)
    model, device = open_model(args)
    grid, depth = model.encoder.grid, len(model.encoder.blocks)
    layer = depth if args.layer is None else args.layer
    if not 1 <= layer <= depth:
        raise UserError(f"--layer must be 1 to {depth}, the blocks of this encoder, not {layer}")
    row, column = args.patch or (grid // 2, grid // 2)
    if not (0 <= row < grid and 0 <= column < grid):
        raise UserError(f"--patch must be two numbers of 0 to {grid - 1}, not {row} {column}")
    ids, names = chosen(index, args.rows)
    images = torch.cat(list(center_crops(index, ids, model.image_size, batch=8)))
    patch = row * grid + column
    batches = [some.to(device) for some in images.split(8)]
    maps = torch.cat([attention_maps(model.encoder, some, layer - 1, patch).cpu() for some in batches])
    print(attention_sheet(images, maps, patch, f"block {layer} of {depth}", args.out, names))
