"""What lies below a root, in units of work: some thousand files, one tar, or one parquet file each.

A unit gives a `Part`: rows whose containers and labels are numbered from 0, and what the numbers mean. Parts are joined
in order, so an index does not depend on which thread did what, nor on how often its building was broken off.
"""
import hashlib
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
from ijepa_fast.data.table import FILE, FORMAT, PARQUET, RECORD, TAR, PathTable, stamp
from ijepa_fast.errors import UserError
from ijepa_fast.run_folder import MARKER

SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MARKER = os.fsencode(MARKER)
_SUFFIXES_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)
FILES_A_UNIT = 2048
_HEAD = 4096  # bytes of an image that are read for its header, at first
_MOST_LABEL = 1 << 16  # bytes of a `.cls` or `.json` file in a tar
_LARGEST = (1 << 32) - 1


@dataclass
class Unit:
    kind: int  # FILE, TAR or PARQUET
    paths: bytes  # relative to the root, joined by zero bytes
    images: int  # files, or an estimate
    key: bytes  # of these paths, sizes and times


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


@dataclass
class Tree:
    """All units below a root, in the byte order of their paths."""

    root: str
    units: list[Unit] = field(default_factory=list)
    watched: list[bytes] = field(default_factory=list)  # folders, tars and parquet files
    stamps: list[tuple[int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def watch(self, path: bytes, stamped: tuple[int, int]) -> None:
        self.watched.append(path)
        self.stamps.append(stamped)


def walk(root: str) -> Tree:
    """List all folders below `root`, or the one tar or parquet file that it is."""
    where, tree, files = os.fsencode(root), Tree(root), list[bytes]()

    def flush() -> None:
        if files:
            joined = b"\0".join(files)
            times = b"".join(struct.pack("<qq", *folder_stamps[os.path.dirname(path)]) for path in files)
            tree.units.append(Unit(FILE, joined, len(files), _key(joined, times)))
            files.clear()

    folder_stamps: dict[bytes, tuple[int, int]] = {}

    def list_folder(folder: bytes, above: frozenset[tuple[int, int]]) -> None:
        path = os.path.join(where, folder)
        # Stat before listing: a file added in between then makes the cache stale, instead of being missed for good.
        stat = os.stat(path)
        folder_stamps[folder] = stamp(stat, True)
        tree.watch(folder, folder_stamps[folder])
        inode = (stat.st_dev, stat.st_ino)
        if inode in above:  # a symbolic link to a folder that it lies in
            return
        with os.scandir(path) as opened:
            entries = [(entry.name, _kind(entry)) for entry in opened]
        # A folder sorts as if its name ended in a slash, so the whole walk is in the byte order of paths.
        for name, kind in sorted((name + b"/" * (kind == "folder"), kind) for name, kind in entries):
            inside = os.path.join(folder, name.rstrip(b"/"))
            if kind == "folder" and os.path.exists(os.path.join(where, inside, _MARKER)):
                tree.skipped["run folder"] += 1  # its pictures are of images, and no images to train on
            elif kind == "folder":
                list_folder(inside, above | {inode})
            elif kind == "image":
                files.append(inside)
                if len(files) == FILES_A_UNIT:
                    flush()
            elif kind in ("tar", "parquet"):
                flush()
                add_container(inside, TAR if kind == "tar" else PARQUET)
            else:
                tree.skipped[kind] += 1

    def add_container(path: bytes, kind: int) -> None:
        stamped = stamp(os.stat(os.path.join(where, path)), False)
        tree.watch(path, stamped)
        tree.units.append(Unit(kind, path, stamped[1] // 100_000, _key(path, struct.pack("<qq", *stamped))))

    try:
        if os.path.isdir(root):
            list_folder(b"", frozenset())
        else:
            where, name = os.path.split(where)
            tree.root = os.fsdecode(where)
            add_container(name, TAR if name.lower().endswith(b".tar") else PARQUET)
    except OSError as error:
        where = error.filename if error.filename is not None else where
        raise UserError(f"folder {os.fsdecode(where)} cannot be listed: {error.strerror}") from None
    flush()
    return tree


def _kind(entry: os.DirEntry) -> str:
    """folder, image, tar, parquet, or why it is left out."""
    name = entry.name.lower()
    if name.startswith(b"."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():  # after links. To open a pipe would block for ever
            return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "no regular file"
    except OSError:  # a link to itself
        return "broken link"
    if name.endswith(_SUFFIXES_BYTES):
        return "image"
    if name.endswith((b".tar", b".parquet")):
        return name.rpartition(b".")[2].decode()
    return os.fsdecode(os.path.splitext(name)[1]) or "without a suffix"


def _key(paths: bytes, stamps: bytes) -> bytes:
    return hashlib.blake2b(FORMAT.encode() + b"\0" + paths + b"\0\0" + stamps, digest_size=16).digest()


def scan(root: str, unit: Unit) -> Part:
    """Read the headers of all images of a unit."""
    if unit.kind == FILE:
        return _scan_files(root, unit.paths.split(b"\0"))
    rows = Rows(unit.paths)
    path = os.path.join(root, os.fsdecode(unit.paths))
    if unit.kind == TAR:
        _scan_tar(path, rows)
    else:
        _scan_parquet(path, rows)
    return rows.part()


def _scan_files(root: str, paths: list[bytes]) -> Part:
    rows, names, bad = np.zeros(len(paths), RECORD), dict[str, int](), []
    where = os.fsencode(root)
    for i, path in enumerate(paths):
        folder, slash, _ = path.partition(b"/")
        label = names.setdefault(os.fsdecode(folder), len(names)) if slash else -1
        size, width, height, reason = _read_file_header(os.path.join(where, path))
        rows[i] = (0, min(size, _LARGEST), i, label, width, height, FILE)
        if reason:
            bad.append((os.path.join(root, os.fsdecode(path)), reason))
    return Part(rows, PathTable.from_paths(paths), list(names), bad=bad)


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


def _scan_tar(path: str, rows: Rows) -> None:
    """Labels come from `.cls` or `.json` siblings; else from two or more folders inside; else from the tar's name."""
    siblings, inside = Rows(rows.container), Rows(rows.container)
    sample, waiting, label = "", list[tuple[int, int, int, int]](), None

    def flush() -> None:
        for offset, size, width, height in waiting:
            siblings.add(offset, size, label, width, height, TAR)
        waiting.clear()

    try:
        with open(path, "rb") as file:
            for name, offset, size in tars.members(file, 0, os.fstat(file.fileno()).st_size):
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
                    width, height, reason = _read_member_header(file.fileno(), offset, size)
                    waiting.append((offset, size, width, height))
                    inside.add(offset, size, tars.inner_folder(name) or None, width, height, TAR)
                    if reason:
                        rows.bad.append((f"{path}: {name}", reason))
                elif size <= _MOST_LABEL:
                    label = tars.sibling_label(name, os.pread(file.fileno(), size, offset)) or label
    except (tars.TarFault, OSError) as error:
        rows.faults.append(f"{path}: {getattr(error, 'strerror', None) or error}")
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


def _read_member_header(handle: int, offset: int, size: int) -> tuple[int, int, str]:
    try:
        data = os.pread(handle, min(size, _HEAD), offset)
        try:
            header = read_header(data, complete=len(data) == size)
        except More:
            header = read_header(os.pread(handle, size, offset))
        return header.width, header.height, ""
    except (OSError, ImageError) as error:
        return 0, 0, str(getattr(error, "strerror", None) or error)


def _scan_parquet(path: str, rows: Rows) -> None:
    try:
        for row, (data, label) in enumerate(parquet.images(path)):
            width = height = 0
            try:
                if data is None:
                    raise ImageError("the row holds no bytes")
                _, width, height, _ = read_header(data)
            except ImageError as error:
                rows.bad.append((f"{path}: row {row}", str(error)))
            rows.add(row, len(data or b""), label, width, height, PARQUET)
    except parquet.ParquetFault as fault:
        rows.faults.append(f"{path}: {fault}")
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
