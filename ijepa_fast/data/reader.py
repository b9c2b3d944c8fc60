"""Encoded bytes from the containers, by a pool of threads: reading overlaps with decoding and hides a slow disk."""
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ijepa_fast.data.formats import MAX_PIXELS, ImageError, prepare
from ijepa_fast.data.parquet import ParquetFault, ParquetReader
from ijepa_fast.data.patience import patiently
from ijepa_fast.data.storage import RemoteStorage, storage
from ijepa_fast.data.table import FILE, PARQUET, TAR, Index
from ijepa_fast.errors import UserError

_GAP = 1 << 16  # bytes between two images of a tar that cost less to read than another call
_SPAN = 1 << 22  # bytes that are read at one go at most
_LARGEST = 1 << 30  # bytes of an encoded image
_REQUESTS = 4  # of each thread, at an address: they wait more than they work


def _neighbours(records: np.ndarray) -> Iterator[list[int]]:
    """Positions of images to read at one go, those in each group by offset: neighbours in a tar, or single ones."""
    alone = records["flag"] != TAR
    yield from ([position] for position in np.flatnonzero(alone).tolist())
    tar = np.flatnonzero(~alone)
    tar = tar[np.lexsort((records["offset"][tar], records["container"][tar]))]
    group, container, begin, end = list[int](), -1, 0, 0
    for position, record in zip(tar.tolist(), records[tar], strict=True):
        offset, size = int(record["offset"]), int(record["size"])
        near = record["container"] == container and end <= offset <= end + _GAP and offset + size - begin <= _SPAN
        if group and not near:
            yield group
            group = []
        if not group:
            container, begin = record["container"], offset
        group.append(position)
        end = offset + size
    if group:
        yield group


class Reading:
    """Images that are being read: iterate once, in order, or `cancel` what has not begun."""

    def __init__(self, parts: list[tuple[Future[list[bytes | ImageError]], int]]):
        self._parts = parts[::-1]

    def __iter__(self) -> Iterator[bytes | ImageError]:
        while self._parts:
            future, at = self._parts.pop()  # so that nothing is kept longer than it is needed
            yield future.result()[at]

    def cancel(self) -> None:
        for future, _ in self._parts:
            future.cancel()
        self._parts.clear()


class Reader:
    """Reads images by their ids, `threads` at once, from an address four times as many.

    `close()` it, or use it as a context manager.

    An image is given as `formats.prepare` makes it, or as the `ImageError` that says why it cannot be used. An error
    that a network file system may get over is tried again after a while, three times. Images that lie close together in
    a tar are read at one go.
    """

    def __init__(self, index: Index, threads: int, max_pixels: int = MAX_PIXELS):
        self.index, self.max_pixels = index, max_pixels
        self._storage = storage(index.root)
        self._remote = isinstance(self._storage, RemoteStorage)
        self._parquet = ParquetReader(self._storage)
        self._pool = ThreadPoolExecutor(threads * (_REQUESTS if self._remote else 1), thread_name_prefix="reader")

    def start(self, ids: np.ndarray) -> Reading:
        """Begin to read at once; iterating waits for each image in turn."""
        ids = np.asarray(ids)
        parts: list[Any] = [None] * len(ids)
        for group in _neighbours(self.index.records[ids]):
            future = self._pool.submit(self._read_group, ids[group].tolist())
            for at, position in enumerate(group):
                parts[position] = future, at
        return Reading(parts)

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The encoded bytes of `ids`, in order. `UserError` with the path of the first one that cannot be used."""
        images = list[bytes]()
        for i, data in zip(ids, self.start(ids), strict=True):
            if isinstance(data, ImageError):
                raise UserError(f"{self.index.path(i)} cannot be decoded: {data}; remove or replace it")
            images.append(data)
        return images

    def _read_group(self, images: list[int]) -> list[bytes | ImageError]:
        if len(images) == 1:
            return [self._read_one(images[0])]
        records = self.index.records[images]
        first = int(records["offset"][0])
        end = int(records["offset"][-1]) + int(records["size"][-1])
        path = self._path(records[0])
        try:
            span = memoryview(patiently(lambda: self._storage.read(path, end - first, first)))
        except OSError:
            span = memoryview(b"")
        if len(span) != end - first:
            return [self._read_one(image) for image in images]  # with its own tries and reasons
        return [self._prepared(record, bytes(span[at : at + int(record["size"])]))
                for record, at in zip(records, (records["offset"] - first).tolist(), strict=True)]  # fmt: skip

    def _prepared(self, record: np.ndarray, data: bytes) -> bytes | ImageError:
        try:
            return prepare(data, int(record["width"]), int(record["height"]), self.max_pixels)
        except ImageError as error:
            return error

    def _read_one(self, image: int) -> bytes | ImageError:
        record = self.index.records[image]
        try:
            data = self._pread(record)
        except ImageError as error:
            return error
        return self._prepared(record, data)

    def _pread(self, record: np.ndarray) -> bytes:
        """The bytes as they are stored."""
        offset, size = int(record["offset"]), int(record["size"])
        path = self._path(record)
        if size > _LARGEST:
            raise ImageError(f"it has {size:,} bytes, more than {_LARGEST:,}")
        try:
            return patiently(lambda: self._stored(path, int(record["flag"]), offset, size))
        except OSError as error:
            raise ImageError(f"it cannot be read any more: {error.strerror}") from None

    def _path(self, record: np.ndarray) -> str:
        return os.fsdecode(self.index.containers[int(record["container"])])

    def _stored(self, path: str, flag: int, offset: int, size: int) -> bytes:
        if flag == PARQUET:
            try:
                return self._parquet.read(path, offset)
            except (ParquetFault, UserError) as fault:
                raise ImageError(str(fault)) from None
        # A file that holds one image is read to its end, to notice one that has grown.
        data = self._storage.read(path, size + (flag == FILE), offset)
        if len(data) != size:
            what = "file" if flag == FILE else "tar"
            folder = os.path.dirname(os.path.join(self.index.root, path))
            how = "start again to have it" if self._remote else f"`touch {folder}` to have its folder"
            raise ImageError(
                f"it is not the {what} that was indexed with {size} bytes: put that back, or {how} indexed again"
            )
        return data

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
