"""What the encoder tells apart: the principal components of its patch features, as colours over the image.

`python -m ijepa_fast.view features WEIGHTS IMAGES... --out features.png`. The components are those of all patches of
the sheet together, so that one colour means one thing on all of it.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.view.open import chosen, open_model
from ijepa_fast.view.sheet import Sheet, enlarged, resized, whole_cells

_TINT = 0.65  # of the colours in the overlay


def principal_colours(features: Tensor) -> np.ndarray:
    """The first three principal components of patch features `[B, N, D]` as red, green, blue: uint8 `[B, N, 3]`.

    Each component is scaled to its 2nd and 98th percentile, and turned so that its skew is positive: a component's sign
    means nothing.
    """
    rows = features.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    # Of the D x D covariance, since there are far more patches than channels.
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    parts = rows @ axes
    parts = parts * torch.where((parts**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(parts, 0.02, dim=0), torch.quantile(parts, 0.98, dim=0)
    colours = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return colours.round().to(torch.uint8).view(*features.shape[:2], 3).cpu().numpy()


def features_sheet(images: Tensor, features: Tensor, out_path: str | Path, names: list[str]) -> Path:
    """Write a PNG: each crop (uint8 `[B, S, S, 3]`), the colours of its patches (`[B, N, D]`), and both together."""
    grid = round(features.shape[1] ** 0.5)
    colours = principal_colours(features).reshape(-1, grid, grid, 3)
    facts = f"red, green, blue: the first three components, over {len(images)} images of {grid} x {grid} patches"
    columns = ["crop", "components", "over the crop"]
    sheet = Sheet("Principal components of patch features", facts, columns, len(images), panel=whole_cells(grid))
    for row, (image, colour, name) in enumerate(zip(images, colours, names, strict=True)):
        crop, painted = resized(image.numpy(), sheet.panel), enlarged(colour, sheet.panel)
        smooth = resized(colour, sheet.panel)
        sheet.draw(row, 0, crop, name)
        sheet.draw(row, 1, painted)
        # Brightness of the crop, colour of the features: shapes stay readable below the tint.
        grey = np.repeat(crop.mean(2, keepdims=True), 3, axis=2)
        sheet.draw(row, 2, ((1 - _TINT) * grey + _TINT * smooth).astype(np.uint8))
    return sheet.save(out_path)


def draw(args: argparse.Namespace) -> None:
    index = index_images(args.images)
    model, device = open_model(args)
    ids, names = chosen(index, args.rows)
    images = torch.cat(list(center_crops(index, ids, model.image_size, batch=8)))
    features = torch.cat([model.features(some.to(device), pool=None).float().cpu() for some in images.split(8)])
    print(features_sheet(images, features, args.out, names))
