"""DALI behind the decoder's interface. On a CUDA device it follows DALI's documentation, but has not run yet.

Tried with DALI 2.4: `exec_dynamic=True` survives a batch that fails, the other executor does not; `antialias=True` is
within a level of Pillow, `False` ten times further off. `adjust_orientation=False` because the released recipe ignores
EXIF. DALI's errors name neither image nor reason, so a batch that fails is decoded again one by one.
"""
import threading
from typing import Literal

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from ijepa_fast.data.decoder_pillow import PillowDecoder
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
        self._pillow = PillowDecoder(1)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pipelines: dict[int, Pipeline] = {}  # by output size; each for batches up to its `max_batch_size`

    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """As `Decoder.decode`; the result is on `device`."""
        with self._lock, torch.cuda.stream(self._stream):
            try:
                pixels = self._run(encoded, boxes, size)
            except RuntimeError:
                pixels = torch.cat([self._alone(i, data, boxes[i], size) for i, data in enumerate(encoded)])
            if self._stream is not None:
                pixels = pixels.clone()  # torch's own memory: DALI's cannot wait for the streams that read it
                self._stream.synchronize()
            return pixels

    def _alone(self, position: int, data: bytes, box: np.ndarray, size: int) -> torch.Tensor:
        try:
            return self._run([data], box[None], size)
        except RuntimeError:
            pass
        try:
            pixels = self._pillow.decode([data], box[None], size)
        except DecodeError as error:
            raise DecodeError(position, error.reason) from error
        return pixels.to(self.device)

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
            encoded=[np.frombuffer(data, np.uint8) for data in encoded],
            corner=np.ascontiguousarray(boxes[:, :2]),
            extent=np.ascontiguousarray(boxes[:, 2:]),
        )
        return torch.from_dlpack(pixels.as_tensor())  # shares the memory, which DALI then leaves alone

    def close(self) -> None:
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
