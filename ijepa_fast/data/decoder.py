"""From encoded images and crop boxes to pixels. One interface; Pillow here, DALI in `decoder_dali`.

The released recipe crops with Pillow and resizes bilinear with antialiasing; both decoders do, DALI within one grey
level away from the borders. The crop comes before the resize, so no pixel outside the box has a part in the result.
Files of more than 8 bits a channel are the exception: Pillow clips them, as it does in the released code; DALI scales.
"""
import io
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Literal, Protocol

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

from ijepa_fast.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what DALI reads as well, whatever a file's suffix says


class DecodeError(Exception):
    """Image `position` of a batch cannot be decoded; `reason` is the decoder's."""

    def __init__(self, position: int, reason: str):
        super().__init__(f"image {position} of the batch: {reason}")
        self.position, self.reason = position, reason


class Decoder(Protocol):
    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """Crop and resize each image to `size` x `size` RGB.

        `boxes`: int32 `[n, 4]` (left, top, width, height), pixels of the stored image. Returns uint8
        `[n, size, size, 3]`. Raises `DecodeError` for the first image that cannot be decoded.
        """

    def close(self) -> None:
        """Stop the decoder's threads."""


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
                pixels[position] = _crop(encoded[position], boxes[position].tolist(), size)
            except Exception as error:  # Pillow's plugins raise whatever damaged data leads them to
                raise DecodeError(position, str(error) or type(error).__name__) from error

        for _ in self._pool.map(decode_one, range(len(encoded))):
            pass
        return torch.from_numpy(pixels)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def build_decoder(name: Literal["auto", "dali", "pillow"], threads: int, device: torch.device | str = "cpu") -> Decoder:
    """The decoder `name` for training on `device`. "auto": DALI for CUDA where it is installed, else Pillow.

    DALI on a CPU is no general gain, and its import takes a second. Median ms an image at 224 px, one thread of an
    AVX-512 Xeon, Pillow / DALI (bench/test_bench_data.py): 1.2 / 1.1 for JPEGs of 160 x 213, 2.3 / 3.0 for 500 x 375,
    12.7 / 10.6 for 1600 x 1200.
    """
    cuda = torch.device(device).type == "cuda"
    if name == "pillow" or (name == "auto" and not cuda):
        return PillowDecoder(threads)
    try:
        from ijepa_fast.data.decoder_dali import DaliDecoder
    except ImportError as error:
        if name == "auto":
            return PillowDecoder(threads)
        raise UserError(
            f"data.decoder is dali, but its import fails ({error}): "
            f"install nvidia-dali-cuda130 (the extra `dali`), or set data.decoder=pillow"
        ) from None
    return DaliDecoder(threads, device)


def _crop(encoded: bytes, box: list[int], size: int) -> Image.Image:
    left, top, width, height = box
    with open_image(io.BytesIO(encoded)) as image:
        if left < 0 or top < 0 or left + width > image.width or top + height > image.height:
            raise ValueError(f"its {image.width} x {image.height} pixels do not hold the box {box}")
        # Converting is pixel by pixel, so it may come after the crop, where there is less to convert.
        cropped = image.crop((left, top, left + width, top + height)).convert("RGB")
        return cropped.resize((size, size), Image.Resampling.BILINEAR)
