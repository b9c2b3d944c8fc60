"""What the pictures of a model have in common: which weights, which images, and how many of them."""
import argparse
import os
from typing import TYPE_CHECKING

import numpy as np
import torch

import ijepa_fast
from ijepa_fast.config import MaskConfig
from ijepa_fast.data.index import Index

if TYPE_CHECKING:
    from ijepa_fast.weights import Model

# Of the reference sampler, with nothing of a context thrown away, and also on grids of a few patches.
MASKS = MaskConfig(collate="ragged", min_keep=1)


def open_model(args: argparse.Namespace) -> tuple["Model", torch.device]:
    """The model, and the device it is on: a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ijepa_fast.load(args.weights, which=args.which).to(device), device


def chosen(index: Index, rows: int) -> tuple[np.ndarray, list[str]]:
    """`rows` images, evenly over the index, and what to write below them."""
    ids = np.unique(np.linspace(0, len(index) - 1, min(rows, len(index))).astype(np.int64))
    names = [os.path.basename(index.path(i)) for i in ids]
    return ids, [name if len(name) <= 26 else f"{name[:25]}…" for name in names]
