"""The images of a unit (see `walk`): what their headers say, and where they lie.

A unit gives a `Part`: rows whose containers and labels are numbered from 0, and what the numbers mean. Parts are joined
in order, so an index does not depend on which thread did what, nor on how often its building was broken off.
"""
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ijepa_fast.data import parquet, tars
from ijepa_fast.data.formats import ImageError, More, read_header
from ijepa_fast.data.storage import LocalStorage, ReadAt, RemoteStorage, storage
from ijepa_fast.data.table import FILE, PARQUET, RECORD, TAR, PathTable
from ijepa_fast.data.walk import SUFFIXES, Unit

_HEAD = 4096  # bytes of an image that are read for its header, at first
_MOST_LABEL = 1 << 16  # bytes of a `.cls` or `.json` file in a tar
_LARGEST = (1 << 32) - 1


@dataclass
class Part:
    rows: np.ndarray  # RECORD
    containers: PathTable
    class_names: list[str]
    numbered: bool = False  # whether the class names are numbers that labels were given as
    bad: list[tuple[str, str]] = field(default_factory=list)  # where and why: headers that cannot be read
    faults: list[str] = field(default_factory=list)  # of the container itself
    skipped: dict[str, int] = field(default_factory=dict)

    def dump(self) -> bytes:
        arrays = self.rows.view(np.uint8), self.containers.blob, self.containers.offsets.view(np.uint8)
        about = {
            "class_names": self.class_names, "numbered": self.numbered, "bad": self.bad, "faults": self.faults,
            "skipped": self.skipped, "sizes": [len(array) for array in arrays],
        }  # fmt: skip
        line = json.dumps(about).encode()
        return struct.pack("<I", len(line)) + line + b"".join(array.tobytes() for array in arrays)

    @classmethod
    def load(cls, data: bytes) -> "Part":
        start = 4 + struct.unpack_from("<I", data)[0]
        about: dict[str, Any] = json.loads(data[4:start])
        arrays = []
        for size in about.pop("sizes"):
            arrays.append(np.frombuffer(data, np.uint8, size, start))
            start += size
        about["bad"] = [(where, reason) for where, reason in about["bad"]]
        return cls(arrays[0].view(RECORD), PathTable(arrays[1], arrays[2].view(np.int64)), **about)


def scan(root: str, unit: Unit) -> Part:
    """Read the headers of all images of a unit."""
    files = storage(root)
    if unit.kind == FILE:
        return _scan_files(files, unit)
    rows = Rows(unit.paths)
    if unit.kind == TAR:
        _scan_tar(files, os.fsdecode(unit.paths), rows)
    else:
        _scan_parquet(files, os.fsdecode(unit.paths), rows)
    return rows.part()


def _scan_files(files: LocalStorage | RemoteStorage, unit: Unit) -> Part:
    paths = unit.paths.split(b"\0")
    rows, names, bad = np.zeros(len(paths), RECORD), dict[str, int](), []
    if isinstance(files, RemoteStorage):
        headers = _remote_headers(files, [os.fsdecode(path) for path in paths], unit.sizes)
    else:
        where = os.fsencode(files.root)
        headers = (_read_file_header(os.path.join(where, path)) for path in paths)
    for i, (path, (size, width, height, reason)) in enumerate(zip(paths, headers, strict=True)):
        folder, slash, _ = path.partition(b"/")
        label = names.setdefault(os.fsdecode(folder), len(names)) if slash else -1
        rows[i] = (0, min(size, _LARGEST), i, label, width, height, FILE)
        if reason:
            bad.append((os.path.join(files.root, os.fsdecode(path)), reason))
    return Part(rows, PathTable.from_paths(paths), list(names), bad=bad)


def _remote_headers(
    files: RemoteStorage, paths: list[str], sizes: tuple[int, ...]
) -> Iterator[tuple[int, int, int, str]]:
    """As `_read_file_header` of each."""
    heads = files.heads(paths, [min(size, _HEAD) for size in sizes])
    for path, size, data in zip(paths, sizes, heads, strict=True):
        try:
            if isinstance(data, OSError):
                raise data
            try:
                header = read_header(data, complete=len(data) == size)
            except More:
                header = read_header(files.read_patiently(path, size, 0))
            yield size, header.width, header.height, ""
        except (OSError, ImageError) as error:
            yield size, 0, 0, str(getattr(error, "strerror", None) or error)


def _read_file_header(path: bytes) -> tuple[int, int, int, str]:
    """File size, width and height, and what is wrong; 0 x 0 pixels for what cannot be read as an image."""
    size = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_HEAD)
            try:
                header = read_header(data, complete=len(data) == size)
            except More:
                header = read_header(data + file.read())
            return size, header.width, header.height, ""
    except (OSError, ImageError) as error:
        return size, 0, 0, str(getattr(error, "strerror", None) or error)


class Rows:
    """The images of one tar or parquet file, packed as they come."""

    def __init__(self, container: bytes):
        self.container, self.packed, self.names = container, bytearray(), dict[str, int]()
        self.bad: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.numbered = False

    def add(self, offset: int, size: int, label: str | None, width: int, height: int, flag: int) -> None:
        number = -1 if label is None else self.names.setdefault(label, len(self.names))
        self.packed += struct.pack("<QIIiIIB", offset, min(size, _LARGEST), 0, number, width, height, flag)

    def part(self) -> Part:
        records = np.frombuffer(self.packed, RECORD).copy()
        return Part(
            records, PathTable.from_paths([self.container]), list(self.names), self.numbered, self.bad, self.faults,
            dict(self.skipped),
        )  # fmt: skip


def _scan_tar(files: LocalStorage | RemoteStorage, path: str, rows: Rows) -> None:
    """Labels come from `.cls` or `.json` siblings; else from two or more folders inside; else from the tar's name."""
    siblings, inside = Rows(rows.container), Rows(rows.container)
    shown = os.path.join(files.root, path)
    sample, waiting, label = "", list[tuple[int, int, int, int]](), None

    def flush() -> None:
        for offset, size, width, height in waiting:
            siblings.add(offset, size, label, width, height, TAR)
        waiting.clear()

    try:
        with files.open(path) as (read, end):
            for name, offset, size in tars.members(read, 0, end):
                base, suffix = name.rpartition("/")[2], os.path.splitext(name)[1].lower()
                if base.startswith("."):
                    rows.skipped["hidden"] += 1
                    continue
                if suffix not in (*SUFFIXES, ".cls", ".json"):
                    rows.skipped[suffix or "without a suffix"] += 1
                    continue
                if (key := tars.sample_key(name)) != sample:
                    flush()
                    sample, label = key, None
                if suffix in SUFFIXES:
                    width, height, reason = _read_member_header(read, offset, size)
                    waiting.append((offset, size, width, height))
                    inside.add(offset, size, tars.inner_folder(name) or None, width, height, TAR)
                    if reason:
                        rows.bad.append((f"{shown}: {name}", reason))
                elif size <= _MOST_LABEL:
                    label = tars.sibling_label(name, read(size, offset)) or label
    except (tars.TarFault, OSError) as error:
        rows.faults.append(f"{shown}: {getattr(error, 'strerror', None) or error}")
    flush()
    if siblings.names:
        rows.packed, rows.names = siblings.packed, siblings.names
        rows.numbered = all(name.isdecimal() for name in siblings.names)
        return
    rows.packed = inside.packed
    if len(inside.names) >= 2:
        rows.names = inside.names
        return
    records = np.frombuffer(rows.packed, RECORD).copy()
    stem, outer = os.path.splitext(os.path.basename(path))[0], os.fsdecode(rows.container).rpartition("/")[0]
    name = stem if tars.name_is_class(stem) else outer.partition("/")[0]
    rows.names = {name: 0} if name else {}
    records["label"] = 0 if name else -1
    rows.packed = bytearray(records.tobytes())


def _read_member_header(read: ReadAt, offset: int, size: int) -> tuple[int, int, str]:
    try:
        data = read(min(size, _HEAD), offset)
        try:
            header = read_header(data, complete=len(data) == size)
        except More:
            header = read_header(read(size, offset))
        return header.width, header.height, ""
    except (OSError, ImageError) as error:
        return 0, 0, str(getattr(error, "strerror", None) or error)


def _scan_parquet(files: LocalStorage | RemoteStorage, path: str, rows: Rows) -> None:
    shown = os.path.join(files.root, path)
    try:
        for row, (data, label) in enumerate(parquet.images(files.for_pyarrow(path))):
            width = height = 0
            try:
                if data is None:
                    raise ImageError("the row holds no bytes")
                _, width, height, _ = read_header(data)
            except ImageError as error:
                rows.bad.append((f"{shown}: row {row}", str(error)))
            rows.add(row, len(data or b""), label, width, height, PARQUET)
    except (parquet.ParquetFault, OSError) as fault:
        rows.faults.append(f"{shown}: {getattr(fault, 'strerror', None) or fault}")
    rows.numbered = all(name.isdecimal() for name in rows.names)


def join(parts: Iterator[Part]) -> tuple[np.ndarray, PathTable, tuple[str, ...], list[Part]]:
    """Rows, containers and class names of all parts together, and the parts without their rows."""
    rows, containers, names, kept, first = [], [], dict[str, int](), [], 0
    numbered = True
    for part in parts:
        kept.append(part)
        if not len(part.rows):
            continue
        own = part.rows.copy()
        own["container"] += first
        first += len(part.containers)
        to_all = np.array([names.setdefault(name, len(names)) for name in part.class_names] + [-1], np.int32)
        own["label"] = to_all[own["label"]]
        numbered = numbered and (part.numbered or not part.class_names)
        rows.append(own)
        containers.append(part.containers)
        part.rows, part.containers = np.zeros(0, RECORD), PathTable.from_paths([])
    records = np.concatenate([np.zeros(0, RECORD), *rows])
    del rows
    if numbered and names and max(map(int, names)) < 10**6:  # labels that are numbers stay these numbers
        class_names = tuple(str(number) for number in range(max(map(int, names)) + 1))
        order = np.array([*map(int, names), -1], np.int32)
    else:
        class_names = tuple(sorted(names, key=os.fsencode))
        place = {name: i for i, name in enumerate(class_names)}
        order = np.array([*(place[name] for name in names), -1], np.int32)
    records["label"] = order[records["label"]]
    return records, PathTable.concatenate(containers), class_names, kept
