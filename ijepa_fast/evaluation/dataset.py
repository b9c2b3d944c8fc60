"""Labelled sets in the layouts that people have: train/ and val/, a folder a class, a CSV file."""
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ijepa_fast.data.index import Index, build_index, real_root
from ijepa_fast.data.storage import storage
from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.labels import Table, find_images, read_table
from ijepa_fast.evaluation.split import stratified

VAL_NAMES = ("val", "validation", "valid", "test")
HELD_OUT = 0.2  # of each class, where a set has no part of its own for evaluation


@dataclass(frozen=True, eq=False)
class Labelled:
    """Some images of an index, with their classes."""

    index: Index
    ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], into the class names

    def take(self, rows: np.ndarray) -> "Labelled":
        return Labelled(self.index, self.ids[rows], self.labels[rows])


class DataSet(NamedTuple):
    train: Labelled
    val: Labelled
    class_names: tuple[str, ...]
    how: str  # where val comes from, in words
    table: Table | None = None  # the CSV file that the labels came from, and
    rows: tuple[np.ndarray, np.ndarray] | None = None  # the rows of it that train and val are, int64 [n] each


def open_dataset(
    root: Path | str,
    csv_file: Path | None = None,
    column: str | None = None,
    *,
    threads: int = 8,
    report: Callable[[str], None] | None = None,
) -> DataSet:
    """The labelled set below `root`.

    Without a CSV file, classes are folders: below `root`/train and `root`/val (or validation, valid, test), or below
    `root` itself, where a fifth of each class is then held out for evaluation, by a fixed seed. With one, the class of
    an image is what stands in `column` (one class for all where that is None: its numbers are wanted); a column `split`
    with train and val says which part it belongs to, else a fifth is held out. `threads` and `report` are those of
    `build_index`. Raises UserError where labels are missing or are all the same.
    """
    root, build = real_root(root), functools.partial(build_index, threads=threads, report=report)
    if csv_file is not None:
        return _from_table(build(root), read_table(csv_file), column)
    folders = storage(root).folders("")
    val = next((name for name in VAL_NAMES if name in folders), None)
    if "train" in folders and val is not None:
        data = _two_folders(build(os.path.join(root, "train")), build(os.path.join(root, val)))
    else:
        data = _one_folder(build(root))
    if len(data.class_names) < 2:
        raise UserError(f"{root} holds one class only, {data.class_names[0]}; a classifier needs at least two")
    return data


def _two_folders(train: Index, val: Index) -> DataSet:
    parts = _labelled(train), _labelled(val)
    unknown = sorted(set(val.class_names) - set(train.class_names))
    if unknown:
        raise UserError(f"{val.root} holds the class {unknown[0]}, which {train.root} does not")
    to_train = np.array([train.class_names.index(name) for name in val.class_names])
    evaluated = Labelled(val, parts[1].ids, to_train[parts[1].labels])
    return DataSet(parts[0], evaluated, train.class_names, f"evaluated on {val.root}")


def _one_folder(index: Index) -> DataSet:
    every = _labelled(index)
    rest, held = _hold_out(every.labels)
    how = f"{index.root} has no train and val: evaluated on a fifth of each class, held out by a fixed seed"
    return DataSet(every.take(rest), every.take(held), index.class_names, how)


def _labelled(index: Index) -> Labelled:
    labels = index.records["label"].astype(np.int64)
    bare = int((labels < 0).sum())
    if bare:
        which = "its images lie" if bare == len(labels) else f"{bare} of its {len(labels)} images lie"
        raise UserError(
            f"{index.root} has no labels: {which} in no class folder; put each class into a folder of its own, "
            f"or name a CSV file of labels (--labels)"
        )
    return Labelled(index, np.arange(len(labels)), labels)


def _from_table(index: Index, table: Table, column: str | None) -> DataSet:
    ids = find_images(index, table.images, table.file)
    if column is None:
        class_names, labels = ("all",), np.zeros(len(ids), np.int64)
    else:
        names, labels = np.unique(table.column(column), return_inverse=True)
        class_names = tuple(names.tolist())
        if len(class_names) < 2:
            raise UserError(f"{table.file}: column {column} holds one class only; a classifier needs at least two")
    if "split" in table.columns:
        split = np.array(table.columns["split"])
        train, val = np.flatnonzero(split == "train"), np.flatnonzero(np.isin(split, VAL_NAMES))
        if not len(train) or not len(val):
            raise UserError(f"{table.file}: its column split names no image of {'val' if len(train) else 'train'}")
        how = f"train and val as {table.file} splits them"
    else:
        train, val = _hold_out(labels)
        how = f"{table.file} has no column split: evaluated on a fifth, held out by a fixed seed"
    every = Labelled(index, ids, labels)
    return DataSet(every.take(train), every.take(val), class_names, how, table, (train, val))


def _hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rest, held = (part.numpy() for part in stratified(torch.from_numpy(labels), HELD_OUT, seed=0))
    if not len(held):
        raise UserError("no class has two images, so none can be held out for evaluation; give train and val folders")
    return rest, held
