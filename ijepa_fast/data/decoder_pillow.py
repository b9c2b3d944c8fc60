"""Pillow behind the decoder's interface.

Files of 16 bits a channel keep their upper eight, as Pillow itself does it for colour; of 32 bits and of floats nothing
says what is white, so `formats` refuses them by name.
"""
import functools
import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ijepa_fast.data import library_warnings
from ijepa_fast.data.formats import FORMATS, MAX_PIXELS, NAMES
from ijepa_fast.errors import DecodeError


def open_image(file: BinaryIO, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Read the header only, and only of the formats that every decoder knows; the EXIF rotation is not applied."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is not {NAMES}") from None
    if (pixels := image.width * image.height) > max_pixels:
        raise ValueError(f"it has {pixels:,} pixels, more than {max_pixels:,}")
    return image


class PillowDecoder:
    """Decodes with Pillow, `threads` images at once: Pillow releases the interpreter's lock while it works.

    `scaled`: a JPEG whose crop is at least 2, 4 or 8 times the output is decoded at that part of its size.
    """

    def __init__(self, threads: int, *, scaled: bool = False):
        self._crop = _scaled_crop if scaled else _crop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")

    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """As `Decoder.decode`."""
        pixels, reasons = self.decode_each(encoded, boxes, size)
        for position, reason in reasons.items():
            raise DecodeError(position, reason)
        return pixels

    def decode_each(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> tuple[torch.Tensor, dict[int, str]]:
        """As `Decoder.decode_each`."""
        pixels = np.empty((len(encoded), size, size, 3), np.uint8)
        name = library_warnings.names()  # those of the thread that asks

        def decode_one(position: int) -> str | None:
            try:
                with library_warnings.about(functools.partial(name, position)):
                    self._crop(encoded[position], boxes[position].tolist(), pixels[position])
            except Exception as error:  # Pillow's plugins raise whatever damaged data leads them to
                pixels[position] = 0
                return " ".join(str(error).split()) or type(error).__name__
            return None

        answers = enumerate(self._pool.map(decode_one, range(len(encoded))))
        reasons = {position: reason for position, reason in answers if reason is not None}
        return torch.from_numpy(pixels), reasons

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def check_box(image: Image.Image, box: list[int]) -> None:
    left, top, width, height = box
    if left < 0 or top < 0 or left + width > image.width or top + height > image.height:
        raise ValueError(f"its {image.width} x {image.height} pixels do not hold the box {box}")


def crop(image: Image.Image, box: list[int], size: int) -> Image.Image:
    """The pixels of `box` (left, top, width, height), resized to `size` x `size` RGB."""
    check_box(image, box)
    left, top, width, height = box
    # Converting is pixel by pixel, so it may come after the crop, where there is less to convert.
    cropped = image.crop((left, top, left + width, top + height))
    if cropped.mode.startswith("I"):  # 16 bits, also from a PGM, whose mode is I: convert() would clip at 255
        cropped = Image.fromarray((np.asarray(cropped).astype(np.int32) >> 8).astype(np.uint8))
    cropped = cropped if cropped.mode == "RGB" else cropped.convert("RGB")  # which would copy it
    return cropped.resize((size, size), Image.Resampling.BILINEAR)


def _crop(encoded: bytes, box: list[int], out: np.ndarray) -> None:
    with open_image(io.BytesIO(encoded), math.inf) as image:
        out[:] = np.asarray(crop(image, box, len(out)))


def _scaled_crop(encoded: bytes, box: list[int], out: np.ndarray) -> None:
    """As `_crop`, from fewer DCT coefficients: libjpeg then computes 4 x 4, 2 x 2 or 1 x 1 pixels of each 8 x 8."""
    size = len(out)
    left, top, width, height = box
    with open_image(io.BytesIO(encoded), math.inf) as image:
        factor = next((factor for factor in (8, 4, 2) if min(width, height) >= factor * size), 1)
        if factor == 1 or image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
            out[:] = np.asarray(crop(image, box, size))
            return
        check_box(image, box)
        image.draft(image.mode, (image.width // factor, image.height // factor))
        # A pixel is `factor` of the stored ones, also the last, of which the image may hold only a part.
        part = left / factor, top / factor, (left + width) / factor, (top + height) / factor
        out[:] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=part))
