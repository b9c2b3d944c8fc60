"""Encoded bytes from the containers, by a pool of threads: reading overlaps with decoding and hides a slow disk."""
import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ijepa_fast.data.formats import MAX_PIXELS, ImageError, prepare
from ijepa_fast.data.parquet import ParquetFault, ParquetReader
from ijepa_fast.data.table import FILE, PARQUET, Index
from ijepa_fast.errors import UserError

# What a network file system says while it recovers. Other errors (no such file, no permission) are final.
_PASSING = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ENETDOWN, errno.ENETUNREACH,
            errno.EHOSTDOWN, errno.ECONNRESET, errno.EREMOTEIO}
_LARGEST = 1 << 30  # bytes of an encoded image
_WAITS_S = (0.1, 0.5, 2.0)  # before each further try


class Reader:
    """Reads images by their ids, `threads` at once. `close()` it, or use it as a context manager.

    An image is given as `formats.prepare` makes it, or as the `ImageError` that says why it cannot be used. An error
    that a network file system may get over is tried again after a while, three times.
    """

    def __init__(self, index: Index, threads: int, max_pixels: int = MAX_PIXELS):
        self.index, self.max_pixels = index, max_pixels
        self._parquet = ParquetReader()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    def start(self, ids: np.ndarray) -> Iterator[bytes | ImageError]:
        """Begin to read at once; the iterator waits for each image in turn."""
        return self._pool.map(self._read_one, np.asarray(ids).tolist())

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The encoded bytes of `ids`, in order. `UserError` with the path of the first one that cannot be used."""
        images = list[bytes]()
        for i, data in zip(ids, self.start(ids), strict=True):
            if isinstance(data, ImageError):
                raise UserError(f"{self.index.path(i)} cannot be used: {data}")
            images.append(data)
        return images

    def _read_one(self, image: int) -> bytes | ImageError:
        record = self.index.records[image]
        try:
            data = self._pread(record)
            return prepare(data, int(record["width"]), int(record["height"]), self.max_pixels)
        except ImageError as error:
            return error

    def _pread(self, record: np.ndarray) -> bytes:
        """The bytes as they are stored."""
        offset, size = int(record["offset"]), int(record["size"])
        path = self.index.container_path(int(record["container"]))
        if size > _LARGEST:
            raise ImageError(f"it has {size:,} bytes, more than {_LARGEST:,}")
        for wait in (*_WAITS_S, None):
            try:
                return self._stored(path, int(record["flag"]), offset, size)
            except OSError as error:
                if error.errno not in _PASSING or wait is None:
                    raise ImageError(f"it cannot be read any more: {error.strerror}") from None
                time.sleep(wait)
        raise AssertionError("the last try has no wait")

    def _stored(self, path: str, flag: int, offset: int, size: int) -> bytes:
        if flag == PARQUET:
            try:
                return self._parquet.read(path, offset)
            except ParquetFault as fault:
                raise ImageError(str(fault)) from None
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A file that holds one image is read to its end, to notice one that has grown.
            data = os.pread(handle, size + (flag == FILE), offset)
        finally:
            os.close(handle)
        if len(data) != size:
            what = "file" if flag == FILE else "tar"
            raise ImageError(
                f"it is not the {what} that was indexed with {size} bytes: put that back, "
                f"or `touch {os.path.dirname(path)}` to have its folder indexed again"
            )
        return data

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
