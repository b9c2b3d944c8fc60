"""What lies below a root, in units of work: some thousand files, one tar, or one parquet file each.

Both walks, of folders here and of an address, give the units in the byte order of their paths.
"""
import hashlib
import os
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ijepa_fast.data.storage import RemoteStorage, is_remote, parent, storage
from ijepa_fast.data.table import FILE, FORMAT, PARQUET, TAR, stamp
from ijepa_fast.errors import UserError
from ijepa_fast.run_folder import MARKER

SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MARKER = os.fsencode(MARKER)
_SUFFIXES_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)
FILES_A_UNIT = 2048
LISTINGS = 16  # folders of an address that are listed at once


@dataclass
class Unit:
    kind: int  # FILE, TAR or PARQUET
    paths: bytes  # relative to the root, joined by zero bytes
    images: int  # files, or an estimate
    key: bytes  # of these paths, sizes and times
    sizes: tuple[int, ...] = ()  # of the files, where the listing gives them: it does at an address


@dataclass
class Tree:
    """All units below a root, in the byte order of their paths."""

    root: str
    units: list[Unit] = field(default_factory=list)
    watched: list[bytes] = field(default_factory=list)  # folders, tars and parquet files; nothing of an address
    stamps: list[tuple[int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    _files: list[tuple[bytes, bytes, int | None]] = field(default_factory=list)  # of the unit that is being gathered

    def watch(self, path: bytes, stamped: tuple[int, int]) -> None:
        self.watched.append(path)
        self.stamps.append(stamped)

    def add_file(self, path: bytes, version: bytes, size: int | None = None) -> None:
        self._files.append((path, version, size))
        if len(self._files) == FILES_A_UNIT:
            self.flush()

    def add_container(self, path: bytes, kind: int, version: bytes, size: int) -> None:
        self.flush()
        self.units.append(Unit(kind, path, size // 100_000, _key(path, version)))

    def flush(self) -> None:
        """After the last file."""
        if self._files:
            joined = b"\0".join(path for path, _, _ in self._files)
            versions = b"".join(version for _, version, _ in self._files)
            sizes = tuple(size for _, _, size in self._files if size is not None)
            self.units.append(Unit(FILE, joined, len(self._files), _key(joined, versions), sizes))
            self._files.clear()

    def digest(self) -> str:
        """Of all that was listed and is indexed: paths, sizes, versions."""
        return hashlib.blake2b(b"".join(unit.key for unit in self.units), digest_size=16).hexdigest()


def walk(root: str) -> Tree:
    """List all folders below `root`, or the one tar or parquet file that it is."""
    return _walk_address(root) if is_remote(root) else _walk_folders(root)


def _walk_folders(root: str) -> Tree:
    where, tree = os.fsencode(root), Tree(root)

    def list_folder(folder: bytes, above: frozenset[tuple[int, int]]) -> None:
        path = os.path.join(where, folder)
        # Stat before listing: a file added in between then makes the cache stale, instead of being missed for good.
        stat = os.stat(path)
        stamped = stamp(stat, True)
        version = struct.pack("<qq", *stamped)
        tree.watch(folder, stamped)
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
                tree.add_file(inside, version)
            elif kind in ("tar", "parquet"):
                add_container(inside, kind)
            else:
                tree.skipped[kind] += 1

    def add_container(path: bytes, kind: str) -> None:
        stamped = stamp(os.stat(os.path.join(where, path)), False)
        tree.watch(path, stamped)
        tree.add_container(path, TAR if kind == "tar" else PARQUET, struct.pack("<qq", *stamped), stamped[1])

    try:
        if os.path.isdir(root):
            list_folder(b"", frozenset())
        else:
            where, name = os.path.split(where)
            tree.root = os.fsdecode(where)
            add_container(name, _kind_of_name(name))
    except OSError as error:
        where = error.filename if error.filename is not None else where
        raise UserError(f"folder {os.fsdecode(where)} cannot be listed: {error.strerror}") from None
    tree.flush()
    return tree


def _kind(entry: os.DirEntry) -> str:
    """folder, image, tar, parquet, or why it is left out."""
    name = entry.name
    if name.startswith(b"."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():  # after links. To open a pipe would block for ever
            return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "no regular file"
    except OSError:  # a link to itself
        return "broken link"
    return _kind_of_name(name)


def _kind_of_name(name: bytes) -> str:
    """image, tar, parquet, or why it is left out: of a regular file."""
    name = name.lower()
    if name.endswith(_SUFFIXES_BYTES):
        return "image"
    if name.endswith((b".tar", b".parquet")):
        return name.rpartition(b".")[2].decode()
    return os.fsdecode(os.path.splitext(name)[1]) or "without a suffix"


def _key(paths: bytes, versions: bytes) -> bytes:
    return hashlib.blake2b(FORMAT.encode() + b"\0" + paths + b"\0\0" + versions, digest_size=16).digest()


def _walk_address(root: str) -> Tree:
    """Level by level, `LISTINGS` folders at once: each is a request, or one for every thousand of its files."""
    name = root.rpartition("/")[2]
    alone = name if name.lower().endswith((".tar", ".parquet")) else None
    tree = Tree(root if alone is None else parent(root))
    files = storage(tree.root)
    assert isinstance(files, RemoteStorage)
    files.forget_listings()
    found: list[tuple[bytes, str, bytes, int]] = []
    level = [""]
    with ThreadPoolExecutor(LISTINGS, thread_name_prefix="listing") as pool:
        while level:
            below = []
            for folder, entries in zip(level, pool.map(files.entries, level), strict=True):
                if folder and any(entry.name == MARKER for entry in entries):
                    tree.skipped["run folder"] += 1
                    continue
                if alone is not None and not folder:
                    entries = [entry for entry in entries if entry.name == alone]
                for entry in entries:
                    path = f"{folder}/{entry.name}".lstrip("/")
                    if entry.name.startswith("."):
                        tree.skipped["hidden"] += 1
                    elif entry.folder:
                        below.append(path)
                    elif (kind := _kind_of_name(os.fsencode(entry.name))) in ("image", "tar", "parquet"):
                        found.append((os.fsencode(path), kind, entry.version.encode(), entry.size))
                    else:
                        tree.skipped[kind] += 1
            level = below
    if alone is not None and not found:
        raise UserError(f"data folder {root} does not exist")
    for file, kind, version, size in sorted(found):
        version += struct.pack("<q", size)
        if kind == "image":
            tree.add_file(file, version, size)
        else:
            tree.add_container(file, TAR if kind == "tar" else PARQUET, version, size)
    tree.flush()
    return tree
