"""Where containers lie: below a folder of this machine, or at an address that fsspec reaches (the extra `remote`).

An address is `s3://`, `gs://`, `hf://` or whatever else fsspec knows. Keys, profiles and end points are its own: the
environment (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, FSSPEC_S3_ENDPOINT_URL) and its configuration files.
"""
import contextlib
import errno
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from ijepa_fast.data.patience import PASSING, patiently
from ijepa_fast.errors import UserError

ReadAt = Callable[[int, int], bytes]  # (size, offset) -> at most so many bytes
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.ASCII)
# What tells one version of an object from the next, best first; of a file system's, the first that it gives.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "content_md5", "mtime", "LastModified", "last_modified", "updated",
             "modified", "created")  # fmt: skip
# Bytes of a tar that are fetched at one go while it is indexed. A request waits about as long as this takes to come, so
# to skip what lies between two headers would be no faster for members of less than this.
_WINDOW = 1 << 20
_Result = TypeVar("_Result")


def is_remote(root: object) -> bool:
    return isinstance(root, str) and _ADDRESS.match(root) is not None


def parent(address: str) -> str:
    """The folder that the last part of an address lies in."""
    folder = address.rpartition("/")[0]
    return f"{folder}/" if folder.endswith(":/") else folder


class Entry(NamedTuple):
    """What a listing says of a file or folder."""

    name: str  # without the folder it lies in
    folder: bool
    size: int
    version: str


class LocalStorage:
    """Files below the folder `root`; paths are relative to it."""

    def __init__(self, root: str):
        self.root = root

    def read(self, path: str, size: int, offset: int) -> bytes:
        """At most `size` bytes at `offset`."""
        handle = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(handle, size, offset)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[tuple[ReadAt, int]]:
        """A function that reads from the file, for its many small parts in order; and the file's size."""
        with open(os.path.join(self.root, path), "rb") as file:
            yield functools.partial(os.pread, file.fileno()), os.fstat(file.fileno()).st_size

    def for_pyarrow(self, path: str) -> "str | RangeFile":
        return os.path.join(self.root, path)

    def folders(self, path: str) -> list[str]:
        """The names of the folders in a folder; none of one that cannot be listed."""
        try:
            with os.scandir(os.path.join(self.root, path)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return []


class RemoteStorage:
    """Files below the address `root`; paths are relative to it. `read` tries once, all others patiently.

    Raises `UserError` for an address that cannot be: an unknown scheme, a package that is not installed.
    """

    def __init__(self, root: str):
        self.root = root
        try:
            from fsspec.core import url_to_fs

            self._fs, base = url_to_fs(root)
        except ImportError as error:
            raise UserError(f"{root} cannot be reached: {error} (pip install 'ijepa_fast[remote]')") from None
        except Exception as error:  # of fsspec or of whichever package it found: all say that the address is wrong
            raise UserError(f"{root} cannot be reached: {_one_line(error)}") from None
        self._base = base.rstrip("/")
        # Files of the Hugging Face hub read 5 MB ahead, unless they are told not to.
        self._options = {"cache_type": "none"} if root.startswith("hf://") else {}

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def read(self, path: str, size: int, offset: int) -> bytes:
        """At most `size` bytes at `offset`. Raises `OSError`, with a number of `PASSING` where it may pass."""
        if size <= 0:
            return b""
        try:
            with _as_os_error():
                # Named: what comes second is another thing in each package.
                return self._fs.cat_file(self._full(path), start=offset, end=offset + size, **self._options)
        except OSError as error:
            if error.errno == errno.EINVAL:  # S3, where nothing lies at `offset` any more
                return b""
            raise

    def heads(self, paths: list[str], sizes: list[int]) -> Iterator[bytes | OSError]:
        """The first `sizes[i]` bytes of each file, or why there are none; many are fetched at once."""
        asked = [i for i, size in enumerate(sizes) if size]  # an empty file has no range to ask for
        with _as_os_error():
            found = self._fs.cat_ranges(
                [self._full(paths[i]) for i in asked], [0] * len(asked), [sizes[i] for i in asked], on_error="return",
                **self._options,
            )  # fmt: skip
        answers = dict(zip(asked, found, strict=True))
        for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            data = answers.get(i, b"")
            if isinstance(data, bytes):
                yield data
                continue
            try:
                yield self._insist(path, lambda path=path, size=size: self.read(path, size, 0))  # type: ignore[misc]
            except OSError as error:
                yield error

    def read_patiently(self, path: str, size: int, offset: int) -> bytes:
        return self._insist(path, lambda: self.read(path, size, offset))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[tuple[ReadAt, int]]:
        """As that of `LocalStorage`; reads ahead."""
        size = self._size(path)
        yield _Window(functools.partial(self.read_patiently, path), size), size

    def for_pyarrow(self, path: str) -> "str | RangeFile":
        return RangeFile(functools.partial(self.read_patiently, path), self._size(path))

    def entries(self, folder: str) -> list[Entry]:
        """What lies in a folder, in no order. Raises `UserError` where it cannot be listed."""
        full = self._full(folder)

        def ask() -> list[dict[str, Any]]:
            with _as_os_error():
                return self._fs.ls(full, detail=True)

        try:
            found = patiently(ask)
        except OSError as error:
            if error.errno == errno.ENOENT and not folder:
                raise UserError(f"data folder {self.root} does not exist") from None
            where = f"{self.root}/{folder}".rstrip("/")
            raise UserError(f"folder {where} cannot be listed: {error.strerror}") from None
        entries = []
        for info in found:
            path = info["name"].rstrip("/")
            if path.strip("/") != full.strip("/"):  # the object that stands for the folder itself
                version = next((f"{key}={info[key]}" for key in _VERSIONS if info.get(key) is not None), "")
                size = int(info.get("size") or 0)
                entries.append(Entry(path.rpartition("/")[2], info["type"] == "directory", size, version))
        return entries

    def folders(self, path: str) -> list[str]:
        """As that of `LocalStorage`."""
        try:
            return sorted(entry.name for entry in self.entries(path) if entry.folder)
        except UserError:
            return []

    def forget_listings(self) -> None:
        """fsspec remembers listings for as long as the process lives."""
        self._fs.invalidate_cache()

    def _size(self, path: str) -> int:
        def ask() -> int:
            with _as_os_error():
                return int(self._fs.info(self._full(path))["size"])

        return self._insist(path, ask)

    def _insist(self, path: str, read: Callable[[], _Result]) -> _Result:
        """Raises `UserError` for an error that might pass but does not: an index would keep it as the image's fault."""
        try:
            return patiently(read)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            raise UserError(f"{self.root}/{path} cannot be read: {error.strerror}") from None


def storage(root: str) -> LocalStorage | RemoteStorage:
    """Where the containers of an index of `root` are read."""
    return _remote(root) if is_remote(root) else LocalStorage(root)


_remote = functools.cache(RemoteStorage)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Each package has errors of its own; those that are not known to be final are taken as passing."""
    try:
        yield
    except FileNotFoundError:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    except PermissionError as error:
        raise OSError(errno.EACCES, _one_line(error) or os.strerror(errno.EACCES)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise
        raise OSError(errno.EREMOTEIO, _one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Window:
    """Reads `size` bytes at `offset` from what was fetched last, or fetches from there on."""

    def __init__(self, read: ReadAt, end: int):
        self._read, self._end = read, end
        self._data, self._start = b"", 0

    def __call__(self, size: int, offset: int) -> bytes:
        size = min(size, self._end - offset)
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._data = self._read(min(max(size, _WINDOW), self._end - offset), offset)
            self._start = offset
        at = offset - self._start
        return self._data[at : at + size]


class RangeFile(io.RawIOBase):
    """A file object over a function that reads at an offset, for `tarfile` and pyarrow."""

    def __init__(self, read: ReadAt, size: int):
        self._read_at, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._read_at(left if size is None or size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data
