"""Files that are whole or not there, also after a full disk, a kill or a power cut."""
import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from ijepa_fast.errors import UserError


def write_durably(path: Path, text: str) -> None:
    """All of it or nothing, also in place of an earlier file and when the disk is full or the power fails."""
    temporary = path.with_name(path.name + ".writing")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """A rename outlives a power cut only once its folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
        return [file.tell(), crc]


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` once it is whole; an error leaves nothing.

    Raises UserError where `path` is there already and is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; choose a new folder, or remove it first")
    temporary = path.with_name(f".writing_{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                usual_mode(file)
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def usual_mode(path: Path) -> None:
    """What any new file may be read by: safetensors (0.8) lets its owner alone read those that it writes."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
