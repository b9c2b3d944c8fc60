"""DALI behind the decoder's interface. `device="mixed"` decodes JPEGs on the GPU; it has not run on one yet.

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

from ijepa_fast.data.decoder import DecodeError, PillowDecoder


class DaliDecoder:
    """Crops and resizes with DALI, on `threads` CPU threads and, if `device` is "mixed", the current CUDA device.

    An image that DALI refuses is left to Pillow, whose answer, pixels or reason, counts. May be called from any thread,
    one at a time.
    """

    def __init__(self, threads: int, device: Literal["cpu", "mixed"] = "cpu"):
        self.threads, self.device = threads, device
        self._pillow = PillowDecoder(1)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream() if device == "mixed" else None
        self._pipelines: dict[int, Pipeline] = {}  # by output size; each for batches up to its `max_batch_size`

    def decode(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        """As `Decoder.decode`; on the GPU if `device` is "mixed"."""
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
        return pixels.to("cuda" if self.device == "mixed" else "cpu")

    def _run(self, encoded: list[bytes], boxes: np.ndarray, size: int) -> torch.Tensor:
        pipeline = self._pipelines.get(size)
        if pipeline is None or pipeline.max_batch_size < len(encoded):
            pipeline = self._pipelines[size] = _pipeline(
                size,
                self.device,
                batch_size=len(encoded),
                num_threads=self.threads,
                device_id=torch.cuda.current_device() if self.device == "mixed" else None,
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
def _pipeline(size: int, device: str):
    images = fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        fn.external_source(name="corner", dtype=types.INT32, ndim=1),
        fn.external_source(name="extent", dtype=types.INT32, ndim=1),
        device=device,
        output_type=types.RGB,
        axis_names="WH",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # of chroma, as on the CPU; "mixed" would repeat it
    )
    return fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
