"""Encoded bytes from the containers, by a pool of threads: reading overlaps with decoding and hides a slow disk."""
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ijepa_fast.data.index import Index
from ijepa_fast.errors import UserError


class Reader:
    """Reads images by their ids, `threads` at once. `close()` it, or use it as a context manager."""

    def __init__(self, index: Index, threads: int):
        self.index = index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    def start(self, ids: np.ndarray) -> Iterator[bytes]:
        """Begin to read at once; the iterator waits for each image in turn."""
        return self._pool.map(self._read_one, np.asarray(ids).tolist())

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The encoded bytes of `ids`, in order. `UserError` if a file has vanished or changed its length."""
        return list(self.start(ids))

    def _read_one(self, image: int) -> bytes:
        record = self.index.records[image]
        offset, size = int(record["offset"]), int(record["size"])
        path = self.index.container_path(record["container"])
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # A file that holds one image is read to its end, to notice one that has grown.
                data = os.pread(handle, size if offset else size + 1, offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{path} cannot be read any more: {error.strerror}") from None
        if len(data) != size:
            raise UserError(
                f"{path} is not the file that was indexed with {size} bytes: put that back, "
                f"or `touch {os.path.dirname(path)}` to have its folder indexed again"
            )
        return data

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
