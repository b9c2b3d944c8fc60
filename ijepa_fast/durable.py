"""Files that are whole or not there, also after a full disk, a kill or a power cut."""
import os
import zlib
from pathlib import Path


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
