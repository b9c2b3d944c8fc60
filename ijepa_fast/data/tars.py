"""The images of an uncompressed tar: WebDataset shards, ImageNet-22k's tar a class, and tars inside tars.

Plain headers are read here, a few microseconds each; whatever else a tar may hold (long names, pax, sparse files) is
left to `tarfile`.
"""
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from ijepa_fast.data.storage import RangeFile, ReadAt

_BLOCK = tarfile.BLOCKSIZE
_SHARD = re.compile(r"(^|[-_.])\d+$")  # 000017, imagenet-train-000017: the number of a shard, and no class
_LABEL_KEYS = ("label", "cls", "class", "class_name")


class Member(NamedTuple):
    name: str
    offset: int  # of its contents in the file
    size: int


class TarFault(Exception):
    """The tar cannot be read on; what came before it is sound."""


def members(read: ReadAt, start: int, end: int) -> Iterator[Member]:
    """The regular files of the tar in bytes `[start, end)` of what `read` reads, those of tars inside it included."""
    at, slow = start, None
    while True:
        head = read(_BLOCK, at)
        if at + len(head) > end or len(head) < _BLOCK:
            raise TarFault("it is cut short: it has no end mark")
        if not head.strip(b"\0"):
            return
        found = _plain(head, at)
        if found is not None:
            after = found.offset + found.size
        else:
            slow = slow or _Slow(read, start, end)
            found, after = slow.member(at)
        if after > end:
            raise TarFault(f"it is cut short: {found.name if found else 'its last member'} is not whole")
        if found is not None and found.name.lower().endswith(".tar"):
            yield from members(read, found.offset, found.offset + found.size)
        elif found is not None:
            yield found
        at = after + -after % _BLOCK


def _plain(head: bytes, at: int) -> Member | None:
    """A regular file with an ordinary header (POSIX.1-1988 ustar, or GNU's or the older form of it), else None."""
    if head[156] not in b"0\0" or head[124] & 0x80 or head[257:262] not in (b"ustar", b"\0\0\0\0\0"):
        return None
    try:
        size = int(head[124:136].strip(b"\0 ") or b"0", 8)
        if int(head[148:156].strip(b"\0 ") or b"0", 8) != sum(head) - sum(head[148:156]) + 256:
            return None
    except ValueError:
        return None
    name = head[:100].partition(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    if name.endswith(b"/"):  # how the oldest tars mark a folder
        return None
    return Member(os.fsdecode(name), at + _BLOCK, size)


class _Slow:
    """`tarfile`, asked for the member at a given place."""

    def __init__(self, read: ReadAt, start: int, end: int):
        self._file = RangeFile(read, end)
        self._file.seek(start)
        try:
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 (it holds nothing of its own)
        except tarfile.TarError as error:
            raise TarFault(f"it is no uncompressed tar: {error}") from None

    def member(self, at: int) -> tuple[Member | None, int]:
        """The regular file whose headers begin at `at`, or None, and where its contents end."""
        self._file.seek(at)
        self._tar.offset, self._tar.firstmember = at, None  # type: ignore[attr-defined]
        try:
            info = self._tar.next()
        except (tarfile.TarError, OSError, ValueError) as error:
            raise TarFault(f"it is damaged at byte {at}: {error}") from None
        self._tar.members.clear()  # type: ignore[attr-defined]
        if info is None:
            raise TarFault(f"it is damaged at byte {at}")
        after = info.offset_data + (info.size if info.isreg() else 0)
        if not info.isreg() or info.issparse():
            return None, max(after, self._tar.offset)
        return Member(info.name, info.offset_data, info.size), after


def sample_key(name: str) -> str:
    """What the files of a sample share (WebDataset): the path up to the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def sibling_label(name: str, data: bytes) -> str | None:
    """The class in a sample's `.cls` (a number or a word) or `.json` (under label, cls, class or class_name)."""
    text = data.decode("utf-8", "replace").strip()
    if name.endswith(".cls"):
        return text or None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    found = next((values[key] for key in _LABEL_KEYS if key in values), None) if isinstance(values, dict) else None
    return str(found) if isinstance(found, int | str) and not isinstance(found, bool) else None


def inner_folder(name: str) -> str:
    """The first folder of a member's path; "" where it lies in none."""
    parts = [part for part in name.split("/")[:-1] if part not in ("", ".")]
    return parts[0] if parts else ""


def name_is_class(stem: str) -> bool:
    """Whether a tar of this name holds a class: all but what ends in a number of its own."""
    return not _SHARD.search(stem)
