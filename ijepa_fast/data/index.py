"""The index: where each image lies, how large it is, its class; read once from the folders, then cached.

It is numpy from end to end, so that 14 million images load in the time of reading a file: one record an image, and the
paths of the containers in one blob. A container is what holds encoded bytes: an image file holds one image, at offset
0. The cache is one file (a JSON line, then raw sections), checked by a checksum and by the modification times of all
folders below the root; nothing in it is ever executed or unpickled.
"""
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_fast.data.formats import ImageError, More, read_header
from ijepa_fast.errors import UserError

RECORD = np.dtype([
    ("container", "<i8"),
    ("offset", "<i8"),  # bytes from the container's start
    ("size", "<i8"),  # bytes
    ("label", "<i4"),  # index into `class_names`; -1: none
    ("width", "<i4"),  # pixels as stored: an EXIF rotation is not applied
    ("height", "<i4"),
])
SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SUFFIXES_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)

_FORMAT = "ijepa_fast index 2"
_ALIGN = 64  # of each section in the file, bytes
_CHUNK = 64  # headers that a thread reads in one task
_HEAD = 4096  # bytes of a file that are read for its header, at first
_MOST_LINES = 20  # on unreadable files
_PATIENCE_S = 2.0  # reading headers for longer than this shows a bar


class PathTable:
    """Many paths as one uint8 `blob` and int64 `offsets [n+1]`; item i is bytes."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def from_paths(cls, paths: list[bytes]) -> "PathTable":
        offsets = np.zeros(len(paths) + 1, np.int64)
        np.cumsum([len(path) for path in paths], out=offsets[1:])
        return cls(np.frombuffer(b"".join(paths), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class Index:
    """All images below `root`, in the byte order of their relative paths.

    `records`: structured `RECORD [num_images]`, read-only where it comes from the cache (memory-mapped). `class_names`:
    the folders directly below `root` that hold images, sorted; empty where all images lie in `root` itself.
    """

    root: str
    records: np.ndarray
    class_names: tuple[str, ...]
    containers: PathTable  # relative to `root`

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> dict[str, int]:
        """`{"images": number, "crc32": checksum of their paths}`: which images these are.

        Not of their bytes: an intact copy in the place of a damaged file must not keep a run from going on.
        """
        crc = zlib.crc32(self.containers.offsets.data, zlib.crc32(self.containers.blob.data))
        return {"images": len(self), "crc32": crc}

    def container_path(self, container: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.containers[container]))

    def path(self, image: int) -> str:
        """Where image `image` lies, for people to read."""
        return self.container_path(self.records["container"][image])


def build_index(
    root: str | Path, *, cache_dir: str | Path | None = None, threads: int = 8, write_cache: bool = True
) -> Index:
    """The index of all images below `root`, at any depth, from the cache where nothing has changed.

    The class of an image is the folder directly below `root` that it lies in (sorted names give the labels 0, 1, ...);
    an image in `root` itself has none. Symbolic links are followed, names that begin with a dot are left out. An image
    whose header cannot be read is named on stderr and has 0 x 0 pixels. Raises `UserError` for a missing root and for
    one without a readable image. `cache_dir`: by default `$XDG_CACHE_HOME/ijepa_fast`; if it cannot be written, a
    warning says so; `write_cache=False` does not try.
    """
    root = os.path.realpath(os.path.expanduser(root))
    if not os.path.exists(root):
        raise UserError(f"data folder {root} does not exist")
    if not os.path.isdir(root):
        raise UserError(f"data folder {root} is a file: it must be a folder with images, at any depth")
    cache_file = _cache_file(root, cache_dir)
    index = _load(cache_file, root)
    if index is None:
        index, folders, mtimes = _scan(root, threads)
        if write_cache:
            try:
                _save(cache_file, index, folders, mtimes)
            except OSError as error:
                warnings.warn(f"the index of {root} will be built again next time, for {error}", stacklevel=2)
    return index


def _scan(root: str, threads: int) -> tuple[Index, PathTable, np.ndarray]:
    images, folders, others = _walk(root)
    if not images:
        raise UserError(
            f"no image below {root}: {others or 'no'} other file{'s' * (others != 1)} seen; "
            f"images end in {', '.join(SUFFIXES)}"
        )
    images.sort()
    folders.sort()
    # The class is what comes before the first slash: b"" for an image in root itself, which sorts first if present.
    classes, labels = np.unique(np.array([path.rpartition(b"/")[0].partition(b"/")[0] for path in images], object),
                                return_inverse=True)
    unlabelled = int(classes[0] == b"")
    records = np.zeros(len(images), RECORD)
    records["container"] = np.arange(len(images))
    records["label"] = labels - unlabelled
    headers, bad = _read_headers(root, images, threads)
    records["size"], records["width"], records["height"] = headers.T
    if len(bad) == len(images):
        where, reason = bad[0]
        raise UserError(f"{where} cannot be read as an image: {reason}; nor can any other file below {root}")
    for where, reason in bad[:_MOST_LINES]:
        print(f"warning: {where} cannot be read as an image: {reason}; others will stand in for it", file=sys.stderr)
    if len(bad) > _MOST_LINES:
        print(f"warning: and so {len(bad) - _MOST_LINES} others below {root}", file=sys.stderr)
    index = Index(root, records, tuple(os.fsdecode(c) for c in classes[unlabelled:]), PathTable.from_paths(images))
    return index, PathTable.from_paths([f for f, _ in folders]), np.array([m for _, m in folders], np.int64)


def _walk(root: str) -> tuple[list[bytes], list[tuple[bytes, int]], int]:
    """Relative paths of the images, (relative path, mtime in ns) of all folders, the number of other files."""
    images, folders, others = [], [], 0
    pending: list[tuple[bytes, frozenset]] = [(b"", frozenset())]
    while pending:
        folder, above = pending.pop()
        where = os.path.join(os.fsencode(root), folder)
        try:
            # Stat before listing: a file added in between then makes the cache stale, instead of being missed for good.
            stat = os.stat(where)
            folders.append((folder, stat.st_mtime_ns))
            inode = (stat.st_dev, stat.st_ino)
            if inode in above:  # a symbolic link to a folder that it lies in
                continue
            with os.scandir(where) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if entry.name.startswith(b"."):
                        others += 1
                    elif _is_folder(entry):
                        pending.append((path, above | {inode}))
                    elif path.lower().endswith(_SUFFIXES_BYTES) and _is_regular(entry):
                        images.append(path)
                    else:
                        others += 1
        except OSError as error:
            raise UserError(f"folder {os.fsdecode(where)} cannot be listed: {error.strerror}") from None
    return images, folders, others


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_regular(entry: os.DirEntry) -> bool:
    """A file, after links. To open a pipe would block for ever."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _read_headers(root: str, images: list[bytes], threads: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """File size, width and height of each image, int64 `[n, 3]`; path and reason of those that are none."""
    where = os.fsencode(root)

    def read(first: int) -> list[tuple[int, int, int, str]]:
        return [_read_header(os.path.join(where, path)) for path in images[first : first + _CHUNK]]

    headers: list[tuple[int, int, int, str]] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="index")
    try:
        for chunk in _with_bar(pool.map(read, range(0, len(images), _CHUNK)), len(images)):
            headers += chunk
    finally:
        pool.shutdown(cancel_futures=True)
    bad = [(os.path.join(root, os.fsdecode(path)), h[3]) for path, h in zip(images, headers, strict=True) if h[3]]
    return np.array([header[:3] for header in headers], np.int64), bad


def _read_header(path: bytes) -> tuple[int, int, int, str]:
    """File size, width, height and what is wrong; 0 x 0 pixels for what cannot be read as an image."""
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


def _with_bar(chunks: Iterable[list], total: int) -> Iterator[list]:
    """`chunks`, and a progress bar on stderr once they take longer than a moment."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("reading image headers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)
    task, start, shown = bar.add_task("", total=total), time.monotonic(), False
    try:
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))
            if not shown and time.monotonic() - start > _PATIENCE_S:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()


def _cache_file(root: str, cache_dir: str | Path | None) -> str:
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(home, "ijepa_fast")
    return os.path.join(cache_dir, hashlib.sha256(os.fsencode(root)).hexdigest()[:32] + ".index")


def _save(cache_file: str, index: Index, folders: PathTable, mtimes: np.ndarray) -> None:
    sections = {
        "records": index.records,
        "containers": index.containers.blob,
        "container_offsets": index.containers.offsets,
        "folders": folders.blob,
        "folder_offsets": folders.offsets,
        "mtimes": mtimes,
    }
    body = b"".join(_padded(array.tobytes()) for array in sections.values())
    header: dict[str, Any] = {
        "format": _FORMAT,
        "root": index.root,
        "class_names": index.class_names,
        "bytes": {name: array.nbytes for name, array in sections.items()},
    }
    header["crc32"] = _checksum(header, body)
    line = json.dumps(header).encode()
    os.makedirs(os.path.dirname(cache_file), exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=os.path.dirname(cache_file), suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(line + b" " * (-(len(line) + 1) % _ALIGN) + b"\n")
            file.write(body)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the final name over empty blocks
        os.replace(partial, cache_file)
    except BaseException:
        os.unlink(partial)
        raise


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)


def _checksum(header: dict[str, Any], body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(json.dumps(header).encode()))  # 14 million records load in 0.7 s


def _load(cache_file: str, root: str) -> Index | None:
    """The cached index, memory-mapped; None where there is none, or it is damaged, of another format or out of date."""
    try:
        with open(cache_file, "rb") as file:
            line = file.readline()
        header = json.loads(line)
        checksum = header.pop("crc32")
        if header["format"] != _FORMAT or header["root"] != root:
            return None
        data = np.memmap(cache_file, np.uint8, "r").view(np.ndarray)  # the subclass is slow to index
        if _checksum(header, data[len(line) :].data) != checksum:
            return None
        sections = _sections(data, len(line), header["bytes"])
        class_names = tuple(header["class_names"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged line decodes to anything
        return None
    folders = PathTable(sections["folders"], sections["folder_offsets"].view(np.int64))
    if not _unchanged(root, folders, sections["mtimes"].view(np.int64)):
        return None
    containers = PathTable(sections["containers"], sections["container_offsets"].view(np.int64))
    return Index(root, sections["records"].view(RECORD), class_names, containers)


def _sections(data: np.ndarray, start: int, sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    sections = {}
    for name, size in sizes.items():
        sections[name] = data[start : start + size]
        start += size + -size % _ALIGN
    return sections


def _unchanged(root: str, folders: PathTable, mtimes: np.ndarray) -> bool:
    """Adding, removing or renaming a file or a folder changes the modification time of the folder it lies in."""
    where = os.fsencode(root)
    try:
        return all(
            os.stat(os.path.join(where, folder)).st_mtime_ns == mtime
            for folder, mtime in zip(folders, mtimes, strict=True)
        )
    except OSError:
        return False
