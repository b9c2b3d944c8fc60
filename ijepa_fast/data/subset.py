"""Parts of an index: `data.list`, then `data.classes`, then `data.limit`."""
import bisect
import dataclasses
import os
from pathlib import Path

import numpy as np

from ijepa_fast.config import DataConfig
from ijepa_fast.data.table import TAR, Index
from ijepa_fast.errors import UserError


def select(index: Index, data: DataConfig) -> Index:
    """The images that `data.list`, `data.classes` and `data.limit` leave. Raises `UserError` where none is left."""
    if data.list is not None:
        index = _listed(index, data.list)
    if data.classes is not None:
        index = _of_classes(index, data.classes)
    if data.limit is not None and data.limit < len(index):
        # Evenly over the stored order, which is sorted by class.
        index = _rows(index, np.arange(data.limit) * len(index) // data.limit)
    return index


def _rows(index: Index, ids: np.ndarray) -> Index:
    return dataclasses.replace(index, records=index.records[ids])


def _of_classes(index: Index, classes: tuple[str, ...]) -> Index:
    for name in classes:
        if name not in index.class_names:
            raise UserError(f"data.classes names {name!r}, and {index.root} has {len(index.class_names)} other classes")
    kept = tuple(name for name in index.class_names if name in set(classes))
    to_new = np.full(len(index.class_names) + 1, -1, np.int32)  # its last entry is that of label -1
    to_new[[index.class_names.index(name) for name in kept]] = np.arange(len(kept))
    labels = to_new[index.records["label"]]
    chosen = _rows(index, np.flatnonzero(labels >= 0))
    chosen.records["label"] = labels[labels >= 0]
    return dataclasses.replace(chosen, class_names=kept)


def _listed(index: Index, file: Path) -> Index:
    """The images that the lines of `file` name, in the index's order: `path` or `path,label`, relative to the root.

    The path of a tar or parquet file stands for all its images, `a.tar: b.jpg` for one member.
    """
    try:
        lines = [line for line in file.read_text(errors="surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"data.list={file} cannot be read: {error.strerror}") from None
    found, names = _Finder(index), dict[int, str]()
    ids = set[int]()
    for number, line in enumerate(lines, 1):
        path, comma, label = line.rpartition(",")
        some = found.ids(line) if not comma or not (some := found.ids(path)) else some
        if not some:
            if number == 1 and comma:
                continue  # the header of a CSV file
            raise UserError(f"data.list={file}, line {number}: {index.root} holds no image {path or line}")
        ids.update(some)
        if comma and found.ids(path):
            names |= dict.fromkeys(some, label.strip())
    if not ids:
        raise UserError(f"data.list={file} names no image")
    order = np.array(sorted(ids), np.int64)
    chosen = _rows(index, order)
    if not names:
        return chosen
    every = set(names.values())
    numbers = all(name.isdecimal() for name in every)
    classes = tuple(map(str, range(max(map(int, every)) + 1))) if numbers else tuple(sorted(every))
    place = {name: i for i, name in enumerate(classes)}
    chosen.records["label"] = [place[names[i]] if i in names else -1 for i in order.tolist()]
    return dataclasses.replace(chosen, class_names=classes)


class _Finder:
    """Image ids by path: containers are sorted, so each takes a binary search."""

    def __init__(self, index: Index):
        self.index, self._of_container = index, np.ascontiguousarray(index.records["container"])
        self._members: dict[int, dict[str, int]] = {}

    def ids(self, path: str) -> list[int]:
        path = path.strip()
        path = path.removeprefix(f"{self.index.root}/")
        if os.path.isabs(path):
            path = os.path.relpath(path, self.index.root)
        if (container := self._container(path)) is not None:
            return list(range(*self._range(container)))
        tar, colon, member = path.partition(": ")
        if colon and (container := self._container(tar)) is not None:
            if container not in self._members:
                rows = range(*self._range(container))
                self._members[container] = {
                    self.index.path(row).partition(": ")[2]: row
                    for row in rows if self.index.records["flag"][row] == TAR
                }  # fmt: skip
            if member in self._members[container]:
                return [self._members[container][member]]
        return []

    def _container(self, path: str) -> int | None:
        name, containers = os.fsencode(path), self.index.containers
        at = bisect.bisect_left(range(len(containers)), name, key=containers.__getitem__)
        return at if at < len(containers) and containers[at] == name else None

    def _range(self, container: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._of_container, [container, container + 1])
        return int(first), int(last)
