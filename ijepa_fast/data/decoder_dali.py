"""DALI behind the decoder's interface. On a CUDA device it follows DALI's documentation, but has not run yet.

Tried with DALI 2.4: `exec_dynamic=True` survives a batch that fails, the other executor does not; `antialias=True` is
within a level of Pillow, `False` ten times further off. `adjust_orientation=False` because the released recipe ignores
EXIF. DALI's errors name neither image nor reason, so a batch that fails is decoded again one by one. It is given the
kinds of images that it decodes as Pillow does, and Pillow the others.

On a CUDA device two batches are in the works at once: a call returns when DALI has launched what the device does, so
that the CPU's part of the next batch runs beside it, and events order what comes after. DALI's own queue would do as
much but gives batches back in order: an image decoded by itself, or in the place of a bad one, would come too late.
"""
import threading
from typing import Literal

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.formats import is_common
from ijepa_fast.errors import DecodeError


class DaliDecoder:
    """Decodes, crops and resizes with DALI: on `threads` CPU threads and, where `device` is CUDA, on that device.

    An image that DALI refuses is left to Pillow, whose answer, pixels or reason, counts. May be called from any thread,
    one at a time.
    """

    def __init__(self, threads: int, device: torch.device | str = "cpu"):
        self.threads, self.device = threads, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The current device is each thread's own: settle it now, before a loader's thread asks.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._pillow = PillowDecoder(threads)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._lent: tuple[torch.Tensor, torch.cuda.Event] | None = None  # by DALI, until the copy of it is made
        self._pipelines: dict[int, Pipeline] = {}  # by output size; each for batches up to its `max_batch_size`

    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """As `Decoder.decode`; the result is on `device`."""
        pixels, reasons = self.decode_each(encoded, boxes, size)
        for position, reason in sorted(reasons.items()):
            raise DecodeError(position, reason)
        return pixels

    def decode_each(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> tuple[torch.Tensor, dict[int, str]]:
        """As `Decoder.decode_each`; the result is on `device`, for work on the stream that is current at the call."""
        caller = torch.cuda.current_stream(self.device) if self._stream is not None else None
        common = [i for i, data in enumerate(encoded) if is_common(data)]
        left = sorted(set(range(len(encoded))).difference(common))
        with self._lock, torch.cuda.stream(self._stream):
            try:
                decoded = self._run([encoded[i] for i in common], boxes[common], size) if common else None
            except RuntimeError:
                decoded = None
            if decoded is not None and not left:
                return self._hand_over(decoded, caller), {}
            pixels = torch.zeros((len(encoded), size, size, 3), dtype=torch.uint8, device=self.device)
            if decoded is not None:
                self._copy(pixels, common, decoded)
            else:
                left = sorted(left + self._one_by_one(pixels, common, encoded, boxes, size))
            name = library_warnings.names()
            with library_warnings.batch(lambda at: name(left[at])):
                decoded, reasons = self._pillow.decode_each([encoded[i] for i in left], boxes[left], size)
            pixels[left] = decoded.to(self.device)
            return self._hand_over(pixels, caller), {left[at]: reason for at, reason in reasons.items()}

    def _hand_over(self, pixels: torch.Tensor, caller: torch.cuda.Stream | None) -> torch.Tensor:
        """In memory of torch's own, which knows the streams that read it; DALI takes its back when nobody holds it."""
        if caller is None:
            return pixels
        copy, copied = pixels.clone(), torch.cuda.Event()
        copied.record()
        caller.wait_event(copied)
        copy.record_stream(caller)
        if self._lent is not None:
            self._lent[1].synchronize()  # of the batch before: the host is one ahead of the device, and no more
        self._lent = pixels, copied
        return copy

    def _copy(self, pixels: torch.Tensor, positions: list[int], decoded: torch.Tensor) -> None:
        """Out of DALI's memory, and wait for it: only good batches are worth more."""
        pixels[positions] = decoded
        if self._stream is not None:
            self._stream.synchronize()

    def _one_by_one(
        self, pixels: torch.Tensor, positions: list[int], encoded: list[bytes], boxes: np.ndarray, size: int
    ) -> list[int]:
        """Fill in `pixels` at those `positions` that DALI can decode alone, and return the others."""
        refused = []
        for i in positions:
            try:
                self._copy(pixels, [i], self._run([encoded[i]], boxes[i : i + 1], size))
            except RuntimeError:
                refused.append(i)
        return refused

    def _run(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        pipeline = self._pipelines.get(size)
        if pipeline is None or pipeline.max_batch_size < len(encoded):
            pipeline = self._pipelines[size] = _pipeline(
                size,
                "mixed" if self.device.type == "cuda" else "cpu",
                batch_size=len(encoded),
                num_threads=self.threads,
                device_id=self.device.index,  # None on a CPU: DALI then needs no GPU
                exec_dynamic=True,
                prefetch_queue_depth=1,
            )
        boxes = np.ascontiguousarray(boxes, np.int32)
        (pixels,) = pipeline.run(
            self._stream,  # the result is for work on it; without one, on a CPU, `run` waits
            encoded=[np.frombuffer(data, np.uint8) for data in encoded],
            corner=np.ascontiguousarray(boxes[:, :2]),
            extent=np.ascontiguousarray(boxes[:, 2:]),
        )
        return torch.from_dlpack(pixels.as_tensor())  # shares the memory, which DALI then leaves alone

    def close(self) -> None:
        if self._lent is not None:
            self._lent[1].synchronize()
            self._lent = None
        self._pipelines.clear()
        self._pillow.close()


@pipeline_def
def _pipeline(size: int, backend: Literal["cpu", "mixed"]):
    images = fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        fn.external_source(name="corner", dtype=types.INT32, ndim=1),
        fn.external_source(name="extent", dtype=types.INT32, ndim=1),
        device=backend,
        output_type=types.RGB,
        axis_names="WH",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # of chroma, as on the CPU; "mixed" would repeat it
    )
    return fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
