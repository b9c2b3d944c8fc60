"""The index: where each image lies, how large it is, its class; read once from the data, then cached.

    python -m ijepa_fast.data.index ROOT... [--verify] [--workers N]

builds it ahead of training, shows what it holds and, with `--verify`, decodes every image (see `verify`). A root holds
folders, uncompressed tars and parquet files, mixed and nested as they come (`walk`, `scan`), here or at an address that
fsspec reaches (`storage`); what is kept is in `table`.
Parts that are done are kept in a journal, so a builder that was killed goes on where it was.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["index", *sys.argv[1:]]))

import contextlib
import fcntl
import hashlib
import os
import struct
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_fast.data.scan import Part, join, scan
from ijepa_fast.data.storage import is_remote, parent
from ijepa_fast.data.table import FILE, RECORD, Index, PathTable, load_index, save_index
from ijepa_fast.data.walk import SUFFIXES, Tree, Unit, walk
from ijepa_fast.errors import UserError

__all__ = ["RECORD", "SUFFIXES", "Index", "PathTable", "build_index", "cache_path"]

_PATIENCE_S = 2.0  # reading headers for longer than this shows a bar
_REQUESTS = 4  # of each thread, at an address: they wait more than they work
_MOST_LINES = 20  # on unreadable files, at a time
_FRAME = struct.Struct("<16sQI")  # of the journal: key of the unit, bytes of the part, their CRC-32


def build_index(
    root: str | Path,
    *,
    cache_dir: str | Path | None = None,
    threads: int = 8,
    write_cache: bool = True,
    compare: bool = True,
    report: Callable[[str], None] | None = None,
) -> Index:
    """The index of all images below `root`, at any depth, from the cache where nothing has changed.

    `root`: a folder, a tar or parquet file, or the address of one (`s3://bucket/folder`). The class of an image is the
    folder directly below `root` that it lies in, or what its tar or parquet file says (see `scan`); sorted names give
    the labels 0, 1, ...; an image in `root` itself has none. Symbolic links are followed, names that begin with a dot
    are left out. An image whose header cannot be read has 0 x 0 pixels. `report` gets lines on what was done and left
    out; left to itself, warnings go to stderr, and nothing else.

    Raises `UserError` for a missing root and for one without a readable image. `cache_dir`: by default
    `$XDG_CACHE_HOME/ijepa_fast`; if it cannot be written, a warning says so; `write_cache=False` does not try.
    `compare=False` believes the cache: another process has just compared it with what lies below `root`.
    """
    root = real_root(root)
    remote = is_remote(root)
    if not remote and not os.path.exists(root):
        raise UserError(f"data folder {root} does not exist")
    alone = root.lower().endswith((".tar", ".parquet")) and (remote or not os.path.isdir(root))
    if not remote and not alone and not os.path.isdir(root):
        raise UserError(f"data folder {root} is a file: it must be a folder with images, at any depth, or a tar")
    file = cache_path(root, cache_dir)
    folder = root if not alone else parent(root) if remote else os.path.dirname(root)
    index, begin = load_index(file, folder, compare=compare), time.perf_counter()
    how, tree = "read from its cache", None
    if remote and compare:  # no file of an address is watched: all are listed
        tree = walk(root)
        if index is not None and index.about.get("listing") != tree.digest():
            index = None
    if index is None:
        tree = tree or walk(root)
        index = _build(tree, file if write_cache else None, threads * (_REQUESTS if remote else 1))
        how = f"built in {time.perf_counter() - begin:.1f} s"
        if write_cache:
            try:
                watched = PathTable.from_paths(tree.watched)
                save_index(file, index, watched, np.array(tree.stamps, np.int64).reshape(-1, 2))
                _journal_file(file).unlink(missing_ok=True)
            except OSError as error:
                warnings.warn(f"the index of {root} will be built again next time, for {error}", stacklevel=2)
    _tell(root, index, how, report)
    return index


def real_root(root: str | Path) -> str:
    """An address as it is, without a slash at its end; of a folder or file, its real path."""
    if isinstance(root, str) and is_remote(root):
        return root if root.endswith("://") else root.rstrip("/")
    return os.path.realpath(os.path.expanduser(root))


def cache_path(root: str, cache_dir: str | Path | None = None) -> str:
    """The file that holds the index of `root`, as `real_root` gives it."""
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(home, "ijepa_fast")
    return os.path.join(cache_dir, hashlib.sha256(os.fsencode(root)).hexdigest()[:32] + ".index")


def _build(tree: Tree, file: str | None, threads: int) -> Index:
    with _Journal(file) as journal:
        parts = list(_with_bar(_scan_all(tree, journal, threads), tree.units))
    records, containers, class_names, kept = join(iter(parts))
    skipped = tree.skipped + sum((Counter(part.skipped) for part in kept), Counter())
    bad = [one for part in kept for one in part.bad]
    faults = [fault for part in kept for fault in part.faults]
    if not len(records):
        others = skipped.total() + len(faults)
        raise UserError(
            f"no image below {tree.root}: {others or 'no'} other file{'s' * (others != 1)} seen; "
            f"images end in {', '.join(SUFFIXES)}, and lie in folders, .tar and .parquet files"
            + "".join(f"; {fault}" for fault in faults[:3])
        )
    if len(bad) == len(records):
        raise UserError(f"{bad[0][0]} cannot be read as an image: {bad[0][1]}; nor can any other below {tree.root}")
    about: dict[str, Any] = {"skipped": dict(sorted(skipped.items())), "bad": bad, "faults": faults}
    if is_remote(tree.root):
        about["listing"] = tree.digest()
    return Index(tree.root, records, class_names, containers, about)


def _scan_all(tree: Tree, journal: "_Journal", threads: int) -> Iterator[Part]:
    """The parts of all units, in order; those that the journal holds are not scanned again."""
    pending: deque[tuple[Unit, Future[Part] | None]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="index")
    try:
        units = iter(tree.units)
        while True:
            while len(pending) < 2 * threads and (unit := next(units, None)) is not None:
                done = unit.key in journal
                pending.append((unit, None if done else pool.submit(scan, tree.root, unit)))
            if not pending:
                return
            unit, future = pending.popleft()
            if future is None:
                yield journal[unit.key]
            else:
                part = future.result()
                journal.add(unit.key, part)
                yield part
    finally:
        pool.shutdown(cancel_futures=True)


def _journal_file(file: str) -> Path:
    return Path(file + ".journal")


class _Journal:
    """Parts by the keys of their units, in a file that survives a kill. Another builder at work means none of it."""

    def __init__(self, file: str | None):
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file = None
        if file is None:
            return
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(file), exist_ok=True)
            opened = open(_journal_file(file), "a+b")  # noqa: SIM115 (closed with the journal)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                opened.close()
                return
            self._file = opened
            self._read()

    def _read(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        end, total = 0, os.fstat(self._file.fileno()).st_size
        while len(head := self._file.read(_FRAME.size)) == _FRAME.size:
            key, size, crc = _FRAME.unpack(head)
            data = self._file.read(min(size, total))
            if len(data) < size or zlib.crc32(data) != crc:
                break
            self._places[key] = end + _FRAME.size, size
            end += _FRAME.size + size
        self._file.truncate(end)  # a frame that a kill cut short, and what can only be rubbish after it

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> Part:
        assert self._file is not None
        offset, size = self._places[key]
        return Part.load(os.pread(self._file.fileno(), size, offset))

    def add(self, key: bytes, part: Part) -> None:
        if self._file is None:
            return
        data = part.dump()
        try:
            self._file.write(_FRAME.pack(key, len(data), zlib.crc32(data)) + data)
            self._file.flush()
        except OSError:  # a full disk: saving the index will say so
            self._file.close()
            self._file = None

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _with_bar(parts: Iterator[Part], units: list[Unit]) -> Iterator[Part]:
    """`parts`, and a progress bar on stderr once they take longer than a moment."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading image headers"), BarColumn(), MofNCompleteColumn(), TextColumn("files and tars,"),
               TextColumn("{task.fields[images]:,} images"), TimeRemainingColumn())  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    weights = [unit.images if unit.kind == FILE else 1 for unit in units]
    task, start, shown, images = bar.add_task("", total=sum(weights), images=0), time.monotonic(), False, 0
    try:
        for part, weight in zip(parts, weights, strict=True):
            yield part
            images += len(part.rows)
            bar.update(task, advance=weight, images=images)
            if not shown and time.monotonic() - start > _PATIENCE_S:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()


def _tell(root: str, index: Index, how: str, report: Callable[[str], None] | None) -> None:
    def warn(line: str) -> None:
        if report is None:
            print(f"warning: {line}", file=sys.stderr)
        else:
            report(line)

    skipped, bad, faults = (index.about.get(key, ()) for key in ("skipped", "bad", "faults"))
    if report is not None:
        classes = f" in {len(index.class_names):,} classes" if index.class_names else ""
        report(f"index of {root}: {len(index):,} images{classes}, {how}")
        if skipped:
            report(f"left out: {describe(skipped)}")
    for fault in faults[:_MOST_LINES]:
        warn(fault)
    for where, reason in bad[:_MOST_LINES]:
        warn(f"{where} cannot be read as an image: {reason}; others will stand in for it")
    left = max(0, len(faults) - _MOST_LINES) + max(0, len(bad) - _MOST_LINES)
    if left:
        warn(f"and {left:,} more below {root}: python -m ijepa_fast.data.index {root} counts them by reason")


def describe(skipped: dict[str, int]) -> str:
    """`3 .txt, 1 hidden`: how many files were left out, by kind."""
    most = sorted(skipped.items(), key=lambda kind: -kind[1])
    shown = ", ".join(f"{number:,} {kind}" for kind, number in most[:8])
    return shown + (f" and {sum(n for _, n in most[8:]):,} of other kinds" if most[8:] else "")
