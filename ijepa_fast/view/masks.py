"""What a step sees: its real crops, and of each the patches that the context encoder is shown and the target blocks.

`python -m ijepa_fast.view masks --config configs/demo.yaml`
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from ijepa_kernels import Packed
from torch import Tensor

from ijepa_fast.config import MaskConfig, load_config
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.masks import Masks, MultiBlockMasks
from ijepa_fast.view.sheet import COLOURS, INK, Sheet, dimmed, resized, whole_cells


def masks_sheet(
    images: Tensor | np.ndarray, masks: Masks, patch_size: int, out_path: str | Path, title: str, *, rows: int = 8
) -> Path:
    """Write a PNG of the first `rows` context sequences: the crop, its visible patches, and every target block.

    `images`: uint8 `[B, S, S, 3]`; `masks`: of these images, as `MultiBlockMasks` lists them (both on any device);
    `title`: one line. Returns `out_path`.
    """
    size, grid = images.shape[1], images.shape[1] // patch_size
    contexts, targets = visible_patches(masks.context, grid), visible_patches(masks.target, grid)
    context_of, rows = masks.context_of.cpu().numpy(), min(rows, len(contexts))
    targets_of = [targets[context_of == row] for row in range(rows)]

    names = ["crop", "context", *(f"target {i + 1}" for i in range(max(map(len, targets_of))))]
    colours = [INK, INK, *itertools.islice(itertools.cycle(COLOURS), len(names) - 2)]
    facts = f"{size} x {size} pixels in {grid} x {grid} patches; what a panel does not hold is dimmed"
    sheet = Sheet(title, facts, names, rows, panel=whole_cells(grid), colours=colours)
    for row in range(rows):
        image = int(masks.context.image[row])
        crop = resized(np.asarray(images[image].cpu() if isinstance(images, Tensor) else images[image]), sheet.panel)
        sheet.draw(row, 0, crop, _name(masks.context.image, row))
        for column, visible in enumerate([contexts[row], *targets_of[row]], start=1):
            sheet.draw(row, column, dimmed(crop, visible), f"{visible.sum()} of {grid * grid} tokens")
        for column, (block, colour) in enumerate(zip(targets_of[row], colours[2:], strict=False), start=2):
            sheet.outline(row, column, block, colour)
            sheet.outline(row, 1, block, colour, width=0.5)  # why the context has its holes
        sheet.outline(row, 1, contexts[row], INK)
    return sheet.save(out_path)


def masks_title(config: MaskConfig, step: int) -> str:
    """The heading of a sheet: which step it is of, and how its masks were drawn and collated."""
    cut = f"truncated within groups of {config.group}" if config.collate == "truncate" else "ragged"
    if config.max_keep is not None:
        cut += f", contexts of {config.max_keep} tokens at most"
    return f"Masks of step {step}: {config.sampler} sampler, {cut}"


def visible_patches(packed: Packed, grid: int) -> np.ndarray:
    """Which patches each sequence holds: bool [S, grid, grid]."""
    cu_seqlens = packed.cu_seqlens.cpu().numpy()
    out = np.zeros((len(cu_seqlens) - 1, grid * grid), bool)
    out[np.repeat(np.arange(len(out)), np.diff(cu_seqlens)), packed.indices.cpu().numpy()] = True
    return out.reshape(-1, grid, grid)


def _name(image: Tensor, row: int) -> str:
    """What the crop of context sequence `row` is called."""
    same = (image == image[row]).nonzero().flatten().tolist()
    return f"image {image[row]}" + (f", context {same.index(row) + 1} of {len(same)}" if len(same) > 1 else "")


def draw(args: argparse.Namespace) -> None:
    config, notes = load_config(args.config, args.overrides)
    for note in notes:
        print(f"released config: {note}")
    batch = config.optim.global_batch_size
    images = min(args.images, batch)
    masks = MultiBlockMasks(config.mask, config.grid, config.train.seed, batch)
    with build_pipeline(config.data, masks, micro_batch=images, prefetch=1) as data:
        first = next(data.loader.batches(args.step, args.step + 1))
    title = masks_title(config.mask, args.step)
    rows = len(first.masks.context.image)
    print(masks_sheet(first.images, first.masks, config.model.patch_size, args.out, title, rows=rows))
