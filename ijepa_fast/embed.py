"""From images to features: `python -m ijepa_fast.embed WEIGHTS IMAGES... [--out features.npy] [--similar]`.

A row is the mean over the patches of the central crop, as the paper evaluates (I-JEPA, arXiv 2301.08243, A.2). Reading
and decoding run a batch ahead of the encoder, and what is done is on the disk: memory holds a few batches, and the same
command goes on where it was stopped.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["embed", *sys.argv[1:]]))

import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import ijepa_fast
from ijepa_fast import arguments_weights
from ijepa_fast.cli import command
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.data.index import Index
from ijepa_fast.data.storage import is_remote
from ijepa_fast.feature_file import FeatureFile
from ijepa_fast.view.neighbours import neighbours_sheet

if TYPE_CHECKING:
    from ijepa_fast.weights import Model

MOST_PAIRED = 16  # so many files are told pair by pair


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_weights.embed(argv)
    index = index_images(args.images)
    model = load(args.weights, args.which, args.device)
    with tempfile.TemporaryDirectory() as folder:
        keep = args.out is not None or not args.similar
        out = (args.out or Path("features.npy")) if keep else Path(folder) / "features.npy"
        features = embed(model, index, out, layers=args.layers, batch=args.batch)
        if keep:
            print(f"{len(features)} images, {features.shape[1]} features each, from the {model.which} encoder: {out}")
        if args.similar:
            tell_similar(features, index, args.images, model.image_size, args.sheet)


def load(weights: Path, which: str, device: str | None) -> "Model":
    """The model on `device` (by default a GPU where there is one), in bf16 on a GPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ijepa_fast.load(weights, which=which)
    return model.to(device, torch.bfloat16) if torch.device(device).type == "cuda" else model.to(device)


def embed(model: "Model", index: Index, out: Path, *, layers: int = 1, batch: int = 64) -> np.ndarray:
    """Write the pooled features of all images of `index`; returns them, fp32 `[n, D * layers]`, memory-mapped.

    The `layers` last blocks are concatenated. Raises `UserError` as `FeatureFile` and `center_crops` do; the rows of
    the batches before are kept, and the next call with the same arguments goes on after them.
    """
    device = next(model.encoder.parameters()).device
    dim = model.encoder.size.dim * layers
    about = {"weights": _checksum(model.encoder), "image_size": model.image_size, "layers": layers, "pool": "mean"}
    with FeatureFile(out, index, dim, about) as file, _bar() as bar:
        task = bar.add_task("embedding", total=len(index), completed=file.done)
        ids = np.arange(file.done, len(index))
        for images in center_crops(index, ids, model.image_size, batch=batch, device=device):
            features = model.features(images.to(device, non_blocking=True), layers=layers, pool="mean")
            file.append(features.float().cpu().numpy())
            bar.advance(task, len(images))
        file.finish()
    return _rows_of(out, len(index), dim)


def tell_similar(features: np.ndarray, index: Index, paths: list[str], image_size: int, sheet: Path) -> None:
    """Print the cosine similarity of every pair of a few files; with a folder among `paths`, draw nearest neighbours.

    The files are then the queries, or, without any, six images of the folder.
    """
    files = [i for i, path in enumerate(_one_each(paths, index)) if path is not None]
    if len(files) == len(index) <= MOST_PAIRED:
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        for a, b in itertools.combinations(files, 2):
            print(f"{unit[a] @ unit[b]:.4f}  {index.path(a)}  {index.path(b)}")
        return
    queries = files[:MOST_PAIRED] or np.unique(np.linspace(0, len(index) - 1, 6).astype(int)).tolist()
    print(neighbours_sheet(features, index, queries, image_size, sheet))


def _one_each(paths: list[str], index: Index) -> Iterator[str | None]:
    """For every image of `index`: the file that was named, or None where it lies in a folder that was."""
    if len(paths) == 1:
        whole = is_remote(paths[0]) or os.path.isdir(paths[0])
        yield from [None if whole else paths[0]] * len(index)
        return
    named = {os.path.realpath(os.path.expanduser(path)): path for path in paths if not os.path.isdir(path)}
    yield from (named.get(index.path(i)) for i in range(len(index)))


def _rows_of(out: Path, rows: int, dim: int) -> np.ndarray:
    if out.suffix == ".npy":
        return np.load(out, mmap_mode="r")
    if out.suffix == ".safetensors":
        return np.memmap(out, "<f4", "r", out.stat().st_size - rows * dim * 4, (rows, dim))
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(out, columns=["features"])["features"].combine_chunks()
    return column.values.to_numpy().reshape(rows, dim)


def _checksum(module: nn.Module) -> int:
    """Of all weights: which ones these are."""
    crc = 0
    for tensor in module.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
