"""From encoded images and crop boxes to pixels: the interface, and the choice of a decoder.

The released recipe crops with Pillow and resizes bilinear with antialiasing; all decoders do, DALI within one grey
level away from the borders. The crop comes before the resize, so no pixel outside the box has a part in the result.
"""
from typing import Literal, Protocol

import numpy as np
import torch

from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.decoder_turbo import TurboDecoder
from ijepa_fast.errors import UserError


class Decoder(Protocol):
    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """Crop and resize each image to `size` x `size` RGB.

        `boxes`: int32 `[n, 4]` (left, top, width, height), pixels of the stored image. Returns uint8
        `[n, size, size, 3]`, which on a CUDA device may still be on its way, to the stream that is current at the call.
        Raises `ijepa_fast.errors.DecodeError` for the first image that cannot be decoded.
        """

    def decode_each(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> tuple[torch.Tensor, dict[int, str]]:
        """As `decode`, but an image that cannot be decoded stops none of the others.

        Returns the pixels, zero where an image is bad, and the reasons by position. Every decoder leaves the verdict
        to Pillow: an image is bad where Pillow cannot decode it, whatever another decoder would have made of it.
        """

    def close(self) -> None:
        """Stop the decoder's threads."""


def resizes_fast() -> bool:
    """Whether torch's resize has vector instructions on this CPU; without, it is slower than Pillow's."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def build_decoder(
    name: Literal["auto", "dali", "pillow", "scaled", "turbo"], threads: int, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder `name` for training on `device`.

    "auto" is DALI for CUDA where that is installed, else turbo where the CPU has AVX2, else Pillow.

    DALI on a CPU is no general gain, and its import takes a second. Median ms an image at 224 px, one thread of an
    AVX-512 Xeon, Pillow / DALI (bench/test_bench_data.py): 1.2 / 1.1 for JPEGs of 160 x 213, 2.3 / 3.0 for 500 x 375,
    12.7 / 10.6 for 1600 x 1200.

    "scaled" is Pillow that decodes large JPEGs at 1/2, 1/4 or 1/8: the same pixels where the crop is less than twice
    the output (all of 500 x 375), less than half the time for 1600 x 1200, where it differs from Pillow by 0.5 levels
    on average, 5 at the 99th percentile and up to some 30 at edges. `auto` therefore never takes it.

    "turbo" is simplejpeg and torch's resize, on the CPU: 0.05 levels from Pillow at most on average, and 1 anywhere.
    CPU ms an image, Pillow / turbo, one thread of an EPYC with AVX-512: 0.6 / 0.25, 1.2 / 0.7 and 6.7 / 4.2 for those
    sizes, 1.6 / 1.1 for 500 x 375 in 110 kB.

    `python -m ijepa_fast.data.tune CONFIG` measures all of them on given images.
    """
    cuda = torch.device(device).type == "cuda"
    if name == "scaled":
        return PillowDecoder(threads, scaled=True)
    if name == "turbo" or (name == "auto" and not cuda and resizes_fast()):
        return TurboDecoder(threads)
    if name == "pillow" or (name == "auto" and not cuda):
        return PillowDecoder(threads)
    try:
        from ijepa_fast.data.decoder_dali import DaliDecoder  # here: it takes a second, and may not be installed
    except ImportError as error:
        if name == "auto":
            return build_decoder("auto", threads)
        raise UserError(
            f"data.decoder is dali, but its import fails ({error}): "
            f"install nvidia-dali-cuda130 (the extra `dali`), or set data.decoder=pillow"
        ) from None
    return DaliDecoder(threads, device)
