"""What the predictor believes is in a hidden block: the patches whose features are most like those it predicts.

`python -m ijepa_fast.view predictions WEIGHTS IMAGES... --out predictions.png`. The predictor never makes pixels, so
each predicted token is shown as the most similar patch of a set of other images, taken whole from its crop. Beside it
stands what a perfect prediction would retrieve: the same with the target encoder's features of the true block.
"""
import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.data.index import Index
from ijepa_fast.errors import UserError
from ijepa_fast.masks import Masks, MultiBlockMasks
from ijepa_fast.view.masks import visible_patches
from ijepa_fast.view.open import MASKS, chosen, open_model
from ijepa_fast.view.sheet import COLOURS, INK, Sheet, dimmed, enlarged, resized, whole_cells

if TYPE_CHECKING:
    from ijepa_fast.weights import Model

_BATCH = 16


class Retrieved(NamedTuple):
    """For T query tokens the most similar patch of the set."""

    pixels: np.ndarray  # uint8 [T, p, p, 3]
    similarity: np.ndarray  # fp32 [T], cosine


def bank_features(dense: Tensor) -> Tensor:
    """Patch features `[B, N, D]` as unit rows `[B * N, D]`: layer-normalised first, as the targets of the loss are."""
    rows = F.layer_norm(dense.float(), dense.shape[-1:]).flatten(0, 1)
    return F.normalize(rows, dim=1)


def retrieve(queries: Tensor, batches: Iterator[tuple[Tensor, Tensor]], patch_size: int) -> Retrieved:
    """The nearest patch of all `batches` (crops uint8 `[B, S, S, 3]`, their patch features `[B, N, D]`) for each query.

    `queries` `[T, D]` are tokens as the predictor makes them. One batch is in memory at a time.
    """
    queries = F.normalize(queries.float(), dim=1)
    best = torch.full((len(queries),), -2.0, device=queries.device)
    pixels = torch.zeros(len(queries), patch_size, patch_size, 3, dtype=torch.uint8)
    for images, dense in batches:
        similarity, row = (queries @ bank_features(dense).T).max(1)
        better = (similarity > best).cpu()
        best = torch.maximum(best, similarity)
        pixels[better] = _patches(images, patch_size)[row.cpu()[better]]
    return Retrieved(pixels.numpy(), best.cpu().numpy())


def predictions_sheet(
    images: Tensor, masks: Masks, believed: Retrieved, best: Retrieved, out_path: str | Path, names: list[str],
    blocks: int, bank_size: int,
) -> Path:  # fmt: skip
    """Write a PNG, `blocks` rows an image: crop, context, hidden block, as predicted, if predicted perfectly.

    `images` uint8 `[B, S, S, 3]`; row t of `believed` and `best` is token t of `masks.target`.
    """
    grid = images.shape[1] // believed.pixels.shape[1]
    contexts, targets = visible_patches(masks.context, grid), visible_patches(masks.target, grid)
    ends = masks.target.cu_seqlens.tolist()
    columns = ["crop", "context", "hidden block", "as predicted", "if predicted perfectly"]
    facts = f"every hidden patch is drawn as the most similar of {bank_size} other images, by the predicted features "
    facts += "or, last, by the target encoder's features of it"
    rows = len(images) * blocks
    sheet = Sheet("What the predictor believes is there", facts, columns, rows, panel=whole_cells(grid))
    row = 0
    for image, name in zip(range(len(images)), names, strict=True):
        crop = resized(images[image].numpy(), sheet.panel)
        sequences = np.flatnonzero(masks.target.image.numpy() == image)[:blocks]
        for sequence, colour in zip(sequences, itertools.cycle(COLOURS)):
            context, block = contexts[image], targets[sequence]
            tokens = slice(ends[sequence], ends[sequence + 1])
            sheet.draw(row, 0, crop, name)
            sheet.draw(row, 1, dimmed(crop, context), f"{context.sum()} of {grid * grid} tokens")
            sheet.draw(row, 2, dimmed(crop, block), f"{block.sum()} tokens")
            for column, found in ((3, believed), (4, best)):
                # Beside its context, since what it must fit to is there.
                scene = dimmed(crop, context)
                filled = enlarged(block, sheet.panel)
                scene[filled] = _mosaic(block, found.pixels[tokens], sheet.panel)[filled]
                said = f"cosine {found.similarity[tokens].mean():.2f}"
                sheet.draw(row, column, scene, said)
                sheet.outline(row, column, block, colour)
            sheet.outline(row, 1, context, INK)
            sheet.outline(row, 1, block, colour)
            sheet.outline(row, 2, block, colour)
            row += 1
    return sheet.save(out_path)


def _mosaic(block: np.ndarray, patches: np.ndarray, panel: int) -> np.ndarray:
    """`patches` uint8 `[tokens, p, p, 3]` at the places of `block`, in raster order: uint8 `[panel, panel, 3]`."""
    canvas, cell = np.zeros((panel, panel, 3), np.uint8), panel // len(block)
    for (y, x), patch in zip(np.argwhere(block), patches, strict=True):
        canvas[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell] = resized(patch, cell)
    return canvas


def _patches(images: Tensor, p: int) -> Tensor:
    """uint8 `[B, S, S, 3]` as `[B * N, p, p, 3]`."""
    return images.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(0, 2)


def draw(args: argparse.Namespace) -> None:
    index = index_images(args.images)
    bank = index_images(args.bank) if args.bank else index
    model, device = open_model(args)
    if model.predictor is None:
        raise UserError(f"{args.weights} holds no predictor: name a run, or a released checkpoint")
    ids, names = chosen(index, args.rows)
    images = torch.cat(list(center_crops(index, ids, model.image_size, batch=_BATCH)))
    masks = MultiBlockMasks(MASKS, model.encoder.grid, args.seed, len(images)).sample(0, 0, len(images))
    shown = {index.path(i) for i in ids}
    others = np.array([i for i in chosen(bank, args.most + len(ids))[0] if bank.path(i) not in shown], np.int64)
    if not len(others):
        raise UserError("there is no other image to take patches from: name more IMAGES, or a folder as --bank")
    context, target = masks.context.to(device), masks.target.to(device)
    predicted = model.predict(images.to(device), context, target)
    true = bank_features(model.features(images.to(device), pool=None))
    true = true[masks.target.rows(model.encoder.grid**2).to(device)]
    found = retrieve(torch.cat([predicted.float(), true]), _bank(model, bank, others, device), model.patch_size)
    half = len(predicted)
    believed, best = (Retrieved(*(field[part] for field in found)) for part in (slice(half), slice(half, None)))
    print(predictions_sheet(images, masks, believed, best, args.out, names, args.blocks, len(others)))


def _bank(
    model: "Model", index: Index, ids: Sequence[int] | np.ndarray, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for images in center_crops(index, ids, model.image_size, batch=_BATCH):
        yield images, model.features(images.to(device), pool=None)
