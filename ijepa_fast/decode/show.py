"""The sheet of samples: a hidden block, its context, and what the decoder makes of the prediction, several times."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ijepa_fast.decode.blocks import Blocks
from ijepa_fast.decode.model import Decoder
from ijepa_fast.masks import Masks
from ijepa_fast.view.masks import visible_patches
from ijepa_fast.view.sheet import COLOURS, INK, Sheet, dimmed, enlarged, resized, whole_cells


def decoded_sheet(
    images: Tensor, masks: Masks, blocks: Blocks, decoder: Decoder, out_path: str | Path, names: list[str],
    *, samples: int, seed: int,
) -> Path:  # fmt: skip
    """Write a PNG, a row an image: context, the true block in its place, and `samples` decoded ones in it.

    Of each image (`images` uint8 `[B, S, S, 3]`) the first target block is shown. Sample k is of the same noise in
    every row.
    """
    grid = images.shape[1] // decoder.settings.patch_size
    contexts, targets = visible_patches(masks.context, grid), visible_patches(masks.target, grid)
    first = [int(np.flatnonzero(masks.target.image.numpy() == image)[0]) for image in range(len(images))]
    told = blocks.features[first]
    made = []
    for k in range(samples):
        noise = [torch.Generator().manual_seed(seed + k) for _ in first]
        made.append(torch.cat([decoder.sample(told[i : i + 1], noise[i]) for i in range(len(first))]))
    columns = ["context", "hidden block", *(f"sample {k + 1}" for k in range(samples))]
    facts = "pixels decoded from the features predicted for the block; samples differ in the decoder's noise alone: "
    facts += "where they agree, the prediction knows"
    sheet = Sheet("What a prediction says, in pixels", facts, columns, len(images), panel=whole_cells(grid))
    for row, (sequence, name) in enumerate(zip(first, names, strict=True)):
        crop, block = resized(images[row].numpy(), sheet.panel), targets[sequence]
        context = dimmed(crop, contexts[row])
        sheet.draw(row, 0, context, name)
        sheet.outline(row, 0, contexts[row], INK)
        sheet.outline(row, 0, block, COLOURS[0])
        shown = [blocks.pixels[sequence].cpu(), *(some[row] for some in made)]
        for column, pixels in enumerate(shown, start=1):
            scene = _placed(context, block, pixels.numpy())
            difference = (pixels.float() - blocks.pixels[sequence].cpu().float()).abs().mean().item()
            said = f"{block.sum()} tokens" if column == 1 else f"{difference:.0f} levels off"
            sheet.draw(row, column, scene, said)
            sheet.outline(row, column, block, COLOURS[0])
    return sheet.save(out_path)


def _placed(scene: np.ndarray, block: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """`pixels` `[64, 64, 3]` stretched to where `block` lies in `scene` `[panel, panel, 3]`."""
    filled = enlarged(block, len(scene))
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    patch = Image.fromarray(pixels).resize((len(columns), len(rows)), Image.Resampling.BICUBIC)
    scene = scene.copy()
    scene[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = np.asarray(patch)
    return scene
