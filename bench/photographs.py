"""Real photographs, those that scikit-image ships, as JPEGs of a given size."""
import io
from pathlib import Path

from PIL import Image

from bench.compare import NotRun

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def encode(size: str) -> list[bytes]:
    """One JPEG of each photograph; `size` is "WIDTHxHEIGHT" in pixels."""
    try:
        from skimage import data
    except ImportError:
        raise NotRun("scikit-image, which ships the photographs, is not installed") from None
    encoded = []
    for name in NAMES:
        file = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize(tuple(map(int, size.split("x")))).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def write_folder(folder: Path, size: str, images: int) -> None:
    """`images` files, the photographs over and over."""
    encoded = encode(size)
    for i in range(images):
        (folder / f"{i:05d}.jpg").write_bytes(encoded[i % len(encoded)])
