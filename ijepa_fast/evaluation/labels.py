"""Labels from files: CSV tables, and lists of images such as the official 1 % and 10 % of ImageNet."""
import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ijepa_fast.data.index import Index
from ijepa_fast.errors import UserError

PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_filename", "name", "id")


class Table(NamedTuple):
    """A CSV file: `columns` by name, each a list of as many strings as `images`."""

    file: Path
    images: list[str]
    columns: dict[str, list[str]]

    def column(self, name: str) -> list[str]:
        if name not in self.columns:
            raise UserError(f"{self.file} has no column {name}; it has {', '.join(self.columns) or 'none but paths'}")
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 `[n]`."""
        values = np.empty(len(self.images))
        for row, text in enumerate(self.column(name)):
            try:
                values[row] = float(text)
            except ValueError:
                values[row] = np.nan
            if not np.isfinite(values[row]):
                raise UserError(f"{self.file}: column {name} of {self.images[row]} is {text!r}, which is no number")
        return values


def read_table(file: Path) -> Table:
    """A CSV file with a header; images are named in its column `path`, `image`, `file` ..., or in its first one.

    A file without commas is a list with an image and its class a line, which becomes the column `label`.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            header, *rows = [row for row in csv.reader(text) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from None
    if all(len(row) == 1 for row in (header, *rows)):
        pairs = [row[0].rsplit(maxsplit=1) for row in (header, *rows)]
        if all(len(pair) == 2 for pair in pairs):
            return Table(file, [image for image, _ in pairs], {"label": [label for _, label in pairs]})
    if not rows:
        raise UserError(f"{file} holds no rows: a header and a row an image are wanted")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"{file}: row {number} has {len(row)} fields, its header {len(header)}")
    lowered = [name.strip().lower() for name in header]
    key = next((lowered.index(name) for name in PATH_COLUMNS if name in lowered), 0)
    columns = {name.strip(): [row[i].strip() for row in rows] for i, name in enumerate(header) if i != key}
    return Table(file, [row[key].strip() for row in rows], columns)


def read_list(file: Path) -> list[str]:
    """Names of images, one a line; what follows the first space of a line (a label) is left out."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"list {file} names no image")
    return names


def find_images(index: Index, names: list[str], file: Path) -> np.ndarray:
    """Their numbers in `index`, int64 `[n]`: by path below its root, with or without a suffix, or by file name alone.

    Raises UserError for a name that no image has, for a file name that several have, and where images lie in tars.
    """
    if index.records["flag"].any():
        raise UserError(f"{file} names files, but images of {index.root} lie in tars or parquet files; unpack them")
    paths = [os.fsdecode(index.containers[c]) for c in index.records["container"].tolist()]
    known: dict[str, int] = {}
    for image, path in enumerate(paths):
        for name in (path, os.path.splitext(path)[0]):
            known.setdefault(name, image)
    by_name: dict[str, int] = {}
    for image, path in enumerate(paths):
        base = os.path.basename(path)
        for name in (base, os.path.splitext(base)[0]):
            by_name[name] = image if by_name.get(name, image) == image else -1
    root = index.root.rstrip("/") + "/"
    ids, missing = np.empty(len(names), np.int64), list[str]()
    for row, name in enumerate(names):
        short = name.removeprefix(root).removeprefix("./").removeprefix(os.path.basename(index.root) + "/")
        found = known.get(short, None if "/" in short else by_name.get(short))
        if found == -1:
            raise UserError(f"{file} names {name}, and several images below {index.root} have that file name")
        if found is None:
            missing.append(name)
        else:
            ids[row] = found
    if missing:
        raise UserError(f"{file} names {len(missing)} images that are not below {index.root}, the first {missing[0]}")
    return ids
