"""What the pictures of a model have in common: which weights, which images, and how many of them."""
import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import ijepa_fast
from ijepa_fast.config import MaskConfig
from ijepa_fast.data.index import Index
from ijepa_fast.errors import UserError

if TYPE_CHECKING:
    from ijepa_fast.weights import Model

# Of the reference sampler, with nothing of a context thrown away, and also on grids of a few patches.
MASKS = MaskConfig(collate="ragged", min_keep=1)


def add_arguments(parser: argparse.ArgumentParser, out: str, rows: int = 6) -> None:
    parser.add_argument("weights", type=Path, help="a run, a checkpoint, or a file or folder of another format")
    parser.add_argument("images", nargs="+", help="files, or folders of images at any depth")
    parser.add_argument("--out", default=out, type=Path, metavar="PNG", help=f"default: {out}")
    parser.add_argument("--rows", default=rows, type=int, metavar="N", help=f"images, evenly of all; default: {rows}")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder; default: target")


def open_model(args: argparse.Namespace) -> tuple["Model", torch.device]:
    """The model, and the device it is on: a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ijepa_fast.load(args.weights, which=args.which).to(device), device


def chosen(index: Index, rows: int) -> tuple[np.ndarray, list[str]]:
    """`rows` images, evenly over the index, and what to write below them."""
    if rows < 1:
        raise UserError(f"--rows must be at least 1, not {rows}")
    ids = np.unique(np.linspace(0, len(index) - 1, min(rows, len(index))).astype(np.int64))
    names = [os.path.basename(index.path(i)) for i in ids]
    return ids, [name if len(name) <= 26 else f"{name[:25]}…" for name in names]
