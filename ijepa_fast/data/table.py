"""The index as a table: 29 bytes an image and the paths of the containers, memory-mapped, with no Python object a row.

A container holds encoded bytes: a file holds one image at offset 0, a tar many, each at its offset, and a parquet file
many, each with its row. The file is a JSON line and raw sections. Nothing in it is executed or unpickled.

The line holds a hash (BLAKE2b) of all that follows. It is verified whenever the file's modification time is not the one
that it was given when it was written, so an untouched index of 14 million images opens without being read.
"""
import hashlib
import json
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ijepa_fast.data import order
from ijepa_fast.data.patience import patiently
from ijepa_fast.data.storage import storage

RECORD = np.dtype([
    ("offset", "<u8"),  # bytes from the container's start; of an image in a parquet file, its row
    ("size", "<u4"),  # bytes; 2**32 - 1 for more
    ("container", "<u4"),
    ("label", "<i4"),  # index into `class_names`; -1: none
    ("width", "<u4"),  # pixels as stored: an EXIF rotation is not applied; 0: its header cannot be read
    ("height", "<u4"),
    ("flag", "u1"),  # what kind of container it lies in
])
FILE, TAR, PARQUET = 0, 1, 2  # flags
FORMAT = "ijepa_fast index 3"
_ALIGN = 64  # of each section in the file, bytes
_PIECE = 1 << 24  # bytes that are hashed and written at a time


class PathTable:
    """Many paths as one uint8 `blob` and int64 `offsets [n+1]`; item i is bytes."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def from_paths(cls, paths: list[bytes]) -> "PathTable":
        offsets = np.zeros(len(paths) + 1, np.int64)
        np.cumsum([len(path) for path in paths], out=offsets[1:])
        return cls(np.frombuffer(b"".join(paths), np.uint8), offsets)

    @classmethod
    def concatenate(cls, tables: list["PathTable"]) -> "PathTable":
        sizes = np.concatenate([np.zeros(1, np.int64), *(np.diff(table.offsets) for table in tables)])
        return cls(np.concatenate([np.zeros(0, np.uint8), *(table.blob for table in tables)]), np.cumsum(sizes))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class Index:
    """All images below `root`: in the byte order of their containers' paths, and inside one as they are stored.

    `records`: structured `RECORD [num_images]`, read-only where it comes from the cache (memory-mapped). `class_names`
    says what the labels mean; empty where there are none. `about`: what was left out, and what is wrong.
    """

    root: str
    records: np.ndarray
    class_names: tuple[str, ...]
    containers: PathTable  # relative to `root`
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> dict[str, int]:
        """`{"images": number, "crc32": checksum of their paths and offsets, "order": version}`: which images these are,
        and which version of `order` trains on them.

        Not of their bytes: an intact copy in the place of a damaged file must not keep a run from going on.
        """
        crc = zlib.crc32(self.containers.offsets.data, zlib.crc32(self.containers.blob.data))
        if len(self) != len(self.containers) or self.records["flag"].any():
            for first in range(0, len(self), 1 << 20):
                some = self.records[first : first + (1 << 20)]
                crc = zlib.crc32(np.ascontiguousarray(some["offset"]).data, crc)
                crc = zlib.crc32(np.ascontiguousarray(some["container"]).data, crc)
        return {"images": len(self), "crc32": crc, "order": order.VERSION}

    def container_path(self, container: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.containers[container]))

    def path(self, image: int) -> str:
        """Where image `image` lies, for people to read: `a/b.jpg`, `a/b.tar: c/d.jpg`, `a/b.parquet: row 7`."""
        record = self.records[image]
        path = self.container_path(int(record["container"]))
        if record["flag"] == TAR:
            return f"{path}: {self._member(int(record['container']), int(record['offset']))}"
        return f"{path}: row {record['offset']}" if record["flag"] == PARQUET else path

    def _member(self, tar: int, offset: int) -> str:
        """The name of the member whose contents begin at `offset`, cut to 100 bytes: it stands in the block before."""
        try:
            path, size = os.fsdecode(self.containers[tar]), tarfile.BLOCKSIZE
            header = patiently(lambda: storage(self.root).read(path, size, offset - size))
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError, ValueError):
            return f"the member at byte {offset}"


def save_index(file: str, index: Index, watched: PathTable, stamps: np.ndarray) -> None:
    """Write it whole or not at all. `watched`: what must not change, and `stamps` int64 `[n, 2]` of it, see `load`."""
    sections = {
        "records": index.records,
        "containers": index.containers.blob,
        "container_offsets": index.containers.offsets,
        "watched": watched.blob,
        "watched_offsets": watched.offsets,
        "stamps": stamps,
    }
    header: dict[str, Any] = {
        "format": FORMAT,
        "root": index.root,
        "class_names": index.class_names,
        "about": index.about,
        "bytes": {name: array.nbytes for name, array in sections.items()},
        "written": int(time.time()) // 2 * 2,  # seconds: whole and even, as the coarsest file system keeps them
    }
    digest = _digest(header, _pieces(sections))
    line = json.dumps({**header, "blake2b": digest}).encode()
    os.makedirs(os.path.dirname(file), exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=os.path.dirname(file), suffix=".partial")
    try:
        with open(handle, "wb") as out:
            out.write(line + b" " * (-(len(line) + 1) % _ALIGN) + b"\n")
            for piece in _pieces(sections):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())  # else a power cut can leave the final name over empty blocks
        os.utime(partial, (header["written"], header["written"]))
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _pieces(sections: dict[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    for array in sections.values():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for first in range(0, len(flat), _PIECE):
            yield flat[first : first + _PIECE].data
        yield bytes(-len(flat) % _ALIGN)


def _digest(header: dict[str, Any], pieces: Iterator[bytes | memoryview]) -> str:
    hasher = hashlib.blake2b(json.dumps(header).encode(), digest_size=16)
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def load_index(file: str, root: str, *, verify: bool = False, compare: bool = True) -> Index | None:
    """The index in `file`, memory-mapped; None where there is none, or it is damaged, of another format or out of date.

    It is out of date once a folder has another modification time than in `stamps` (adding, removing or renaming a file
    or a folder changes it), or a tar or parquet file another time or size.
    `verify`: its hash too, in any case. `compare=False` does not look at the images.
    """
    try:
        with open(file, "rb") as opened:
            line = opened.readline()
            modified = os.fstat(opened.fileno()).st_mtime_ns
        header = json.loads(line)
        digest = header.pop("blake2b")
        if header["format"] != FORMAT or header["root"] != root:
            return None
        data = np.memmap(file, np.uint8, "r").view(np.ndarray)  # the subclass is slow to index
        body = data[len(line) :]
        if len(body) != sum(size + -size % _ALIGN for size in header["bytes"].values()):
            return None
        if verify or modified != header["written"] * 10**9:
            pieces = (body[first : first + _PIECE].data for first in range(0, len(body), _PIECE))
            if _digest(header, pieces) != digest:
                return None
        sections = _sections(body, header["bytes"])
        index = Index(
            root,
            sections["records"].view(RECORD),
            tuple(header["class_names"]),
            PathTable(sections["containers"], sections["container_offsets"].view(np.int64)),
            header["about"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged line decodes to anything
        return None
    if not compare:
        return index
    watched = PathTable(sections["watched"], sections["watched_offsets"].view(np.int64))
    return index if _unchanged(root, watched, sections["stamps"].view(np.int64).reshape(-1, 2)) else None


def _sections(body: np.ndarray, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    sections, start = {}, 0
    for name, size in sizes.items():
        sections[name] = body[start : start + size]
        start += size + -size % _ALIGN
    return sections


def stamp(stat: os.stat_result, folder: bool) -> tuple[int, int]:
    """Modification time in ns, and for files the size."""
    return stat.st_mtime_ns, -1 if folder else stat.st_size


def _unchanged(root: str, watched: PathTable, stamps: np.ndarray) -> bool:
    where, blob, offsets = os.fsencode(root) + b"/", watched.blob.tobytes(), watched.offsets.tolist()
    try:
        for i, (modified, size) in enumerate(stamps.tolist()):
            if stamp(os.stat(where + blob[offsets[i] : offsets[i + 1]]), size < 0) != (modified, size):
                return False
    except OSError:
        return False
    return True
