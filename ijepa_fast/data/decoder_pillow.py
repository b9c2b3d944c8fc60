"""Pillow behind the decoder's interface, and the reading of image headers.

Files of more than 8 bits a channel are clipped to 8, as Pillow does it in the released code; DALI scales them.
"""
import io
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch

# Imported by name, so that the five formats we read are registered once, before any thread asks for them.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from ijepa_fast.errors import DecodeError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what DALI reads as well, whatever a file's suffix says


def open_image(file: BinaryIO) -> Image.Image:
    """Read the header only, and only of the formats that every decoder knows; the EXIF rotation is not applied."""
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError("it is not a JPEG, PNG, WebP, BMP or TIFF image") from None


class PillowDecoder:
    """Decodes with Pillow, `threads` images at once: Pillow releases the interpreter's lock while it works."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")

    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """As `Decoder.decode`."""
        pixels = np.empty((len(encoded), size, size, 3), np.uint8)

        def decode_one(position: int) -> None:
            try:
                pixels[position] = np.asarray(_crop(encoded[position], boxes[position].tolist(), size))
            except Exception as error:  # Pillow's plugins raise whatever damaged data leads them to
                raise DecodeError(position, str(error) or type(error).__name__) from error

        for _ in self._pool.map(decode_one, range(len(encoded))):
            pass
        return torch.from_numpy(pixels)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def crop(image: Image.Image, box: list[int], size: int) -> Image.Image:
    """The pixels of `box` (left, top, width, height), resized to `size` x `size` RGB."""
    left, top, width, height = box
    if left < 0 or top < 0 or left + width > image.width or top + height > image.height:
        raise ValueError(f"its {image.width} x {image.height} pixels do not hold the box {box}")
    # Converting is pixel by pixel, so it may come after the crop, where there is less to convert.
    cropped = image.crop((left, top, left + width, top + height)).convert("RGB")
    return cropped.resize((size, size), Image.Resampling.BILINEAR)


def _crop(encoded: bytes, box: list[int], size: int) -> Image.Image:
    with open_image(io.BytesIO(encoded)) as image:
        return crop(image, box, size)
