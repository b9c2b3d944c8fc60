"""Batches, prepared ahead by one background thread: order, crops, masks, pixels, and the copy to the device.

What a batch holds is a function of (seed, step, rank, world size, micro-batch) alone, what stands in for bad images
included; threads, prefetch depth and the step a run starts from have no influence.
"""
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ijepa_fast.data.bad import BadImage, decode_all, neighbours, substitutes
from ijepa_fast.data.decoder import Decoder
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.reader import Reader, Reading
from ijepa_fast.data.sampler import GlobalBatchSampler, center_boxes, crop_boxes
from ijepa_fast.data.table import Index
from ijepa_fast.masks import Covered, Masks, MultiBlockMasks
from ijepa_fast.padding import Padded, pad

# Bytes of encoded images that are read ahead along the order, where more than one micro-batch fits: about 600 images of
# ImageNet. The index knows all sizes, so this bounds the memory whatever the images are.
READ_AHEAD_BYTES = 64 << 20
_MOST_AHEAD = 8  # micro-batches
_PATIENCE_S = 3.0  # for the thread to end


class Batch(NamedTuple):
    """One micro-batch of one rank, on the loader's device."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    masks: Masks
    ids: np.ndarray  # int64 [B], into the index, by the order of the epoch
    step: int  # global step, from 0
    last: bool  # whether it completes this rank's share of the step
    bad: tuple[BadImage, ...] = ()  # those of `ids` that other images had to stand in for
    padded: Padded | None = None  # the masks for a captured graph; `masks` are then left on the host


class Loader:
    """This rank's micro-batches of any range of steps.

    Rank r takes the positions `[r * G / W, (r + 1) * G / W)` of each global batch of G images, cut into micro-batches
    of `micro_batch` images (the last may be smaller). At most `prefetch` batches wait ready. `wait_s` adds up the
    seconds in which the consumer had to wait for data.

    With `padded`, batches have their masks padded as well, see `ijepa_fast.padding`.

    One iteration at a time; leaving it, `close()` and the context manager end the background thread, after the
    micro-batch in hand. Reader and decoder stay the caller's, to share and to close.
    """

    def __init__(
        self,
        index: Index,
        sampler: GlobalBatchSampler,
        decoder: Decoder,
        reader: Reader,
        masks: MultiBlockMasks,
        *,
        image_size: int,
        crop_scale: tuple[float, float],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        padded: bool = False,
    ):
        if sampler.global_batch % world_size:
            raise ValueError(f"a global batch of {sampler.global_batch} does not divide among {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        if micro_batch < 1 or prefetch < 1:
            raise ValueError(f"micro_batch and prefetch must be at least 1, not {micro_batch} and {prefetch}")
        self.index, self.sampler, self.decoder, self.reader, self.masks = index, sampler, decoder, reader, masks
        self.image_size, self.crop_scale, self.seed = image_size, crop_scale, seed
        self.device, self.prefetch, self.padded = torch.device(device), prefetch, padded
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # the background thread's own may differ
        share = sampler.global_batch // world_size
        first, end = rank * share, (rank + 1) * share
        self._slices = [(start, min(start + micro_batch, end)) for start in range(first, end, micro_batch)]
        self.wait_s = 0.0
        self._producer: _Producer | None = None

    @property
    def micro_batches_per_step(self) -> int:
        return len(self._slices)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The micro-batches of the steps `[first_step, last_step)`, in order; preparation begins at once.

        An image that cannot be read or decoded is replaced, and named in `Batch.bad`. An error in the background is
        raised in the place of the batch that failed.
        """
        self.close()
        self._producer = _Producer(self._prepare(first_step, last_step), self.prefetch)
        return self._consume(self._producer)

    def _consume(self, producer: "_Producer") -> Iterator[Batch]:
        try:
            while True:
                start = time.perf_counter()
                item = producer.get()
                self.wait_s += time.perf_counter() - start
                if item is None:
                    return
                batch, copied = item
                yield batch if copied is None else _receive(batch, copied)
        finally:
            producer.close()

    def _prepare(self, first_step: int, last_step: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """Runs in the background thread."""
        upload = _Upload(self.device) if self.device.type == "cuda" else None
        for share, encoded in self._read_ahead(first_step, last_step):
            data = list(encoded)
            # A decoder on the device leaves its result to the current stream, which must not be that of the step.
            with torch.cuda.stream(None if upload is None else upload.stream):
                batch = self._build(share, data)
            yield (batch, None) if upload is None else upload(batch)

    def _read_ahead(self, first_step: int, last_step: int) -> Iterator[tuple["_Share", Reading]]:
        """Yields each micro-batch when the reading of those after it has begun: of one, or of `READ_AHEAD_BYTES`."""
        begun: deque[tuple[_Share, Reading, int]] = deque()
        total = 0
        try:
            for step in range(first_step, last_step):
                ids = self.sampler.ids(step)
                for start, stop in self._slices:
                    share = _Share(step, start, stop, ids[start:stop])
                    size = int(self.index.records["size"][share.ids].sum(dtype=np.int64))
                    while (len(begun) > 1 and total + size > READ_AHEAD_BYTES) or len(begun) > _MOST_AHEAD:
                        total -= begun[0][2]
                        yield begun.popleft()[:2]
                    begun.append((share, self.reader.start(share.ids), size))
                    total += size
            while begun:
                yield begun.popleft()[:2]
        finally:
            for _, reading, _ in begun:
                reading.cancel()

    def _build(self, share: "_Share", encoded: list[bytes | ImageError]) -> Batch:
        step, start, stop, ids = share
        epoch, index, images = self.sampler.epoch_of(step), self.index, len(self.index)
        pixels, replaced = decode_all(
            index, self.reader, self.decoder, ids, encoded, self._boxes(epoch),
            lambda image: substitutes(self.seed, epoch, image, images), self.image_size,
        )  # fmt: skip
        bad = tuple(
            BadImage(start + at, step, int(ids[at]), index.path(ids[at]), reason, other, index.path(other))
            for at, reason, other in replaced
        )
        masks = self.masks.sample(step, start, stop)
        padded = pad(masks, len(ids) * self.masks.grid**2) if self.padded else None
        return Batch(pixels, masks, ids, step, stop == self._slices[-1][1], bad, padded)

    def _boxes(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        def boxes(ids: np.ndarray) -> np.ndarray:
            records = self.index.records[ids]
            return crop_boxes(self.seed, epoch, ids, records["width"], records["height"], self.crop_scale)

        return boxes

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Share(NamedTuple):
    """Positions `[start, stop)` of the global batch of `step`, which hold the images `ids`."""

    step: int
    start: int
    stop: int
    ids: np.ndarray


def eval_batches(
    index: Index,
    ids: np.ndarray,
    decoder: Decoder,
    reader: Reader,
    image_size: int,
    batch: int,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Iterator[torch.Tensor]:
    """Central crops of the images `ids`, in order, `batch` at a time: uint8 `[<= batch, image_size, image_size, 3]`.

    A bad image is replaced by the next one of the same label, and `report` gets a line on it.
    """

    def boxes(ids: np.ndarray) -> np.ndarray:
        records = index.records[ids]
        return center_boxes(records["width"], records["height"])

    ids, labels = np.asarray(ids), index.records["label"]
    for first in range(0, len(ids), batch):
        some = ids[first : first + batch]
        pixels, replaced = decode_all(
            index, reader, decoder, some, list(reader.start(some)), boxes, lambda i: neighbours(labels, i), image_size
        )
        for at, reason, other in replaced:
            report(f"warning: bad image {index.path(some[at])}: {reason}; {index.path(other)} is in its place")
        yield pixels


class _Producer:
    """Runs an iterator in a thread, up to `depth` items ahead. `get` gives None at its end and raises its errors."""

    def __init__(self, items: Iterator, depth: int):
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        # A daemon, or an interpreter that exits without close() would wait for a thread that waits for a consumer.
        self._thread = threading.Thread(target=self._run, args=(items,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator) -> None:
        try:
            for item in items:
                self._ready.put((item, None))
                if self._stop.is_set():
                    return
            self._ready.put((None, None))
        except BaseException as error:
            self._ready.put((None, error))

    def get(self) -> Any:
        if self._stop.is_set():
            raise RuntimeError("this iteration was ended: the loader was closed, or iterated anew")
        item, error = self._ready.get()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. It puts at most one more item, for which the emptied queue has room.

        One that hangs in a read, of a file on a dead mount, is left behind.
        """
        self._stop.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join(_PATIENCE_S)


class _Upload:
    """Copies batches to a CUDA device on a stream of their own, so that they do not queue behind the running step."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            images = self._copy(batch.images)
            if batch.padded is not None:
                batch = batch._replace(images=images, padded=batch.padded.to(self.device, non_blocking=True))
                return batch, self._event()
            context, target = (packed.to(self.device, non_blocking=True) for packed in batch.masks[:2])
            covered = batch.masks.covered
            masks = Masks(
                context,
                target,
                self._copy(batch.masks.context_of),
                None if covered is None else Covered(*map(self._copy, covered)),
            )
            return batch._replace(images=images, masks=masks), self._event()

    @staticmethod
    def _event() -> torch.cuda.Event:
        """Of the copies begun so far."""
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        # The allocator of pinned memory itself keeps a block until the copies out of it are done.
        return tensor if tensor.is_cuda else tensor.pin_memory().to(self.device, non_blocking=True)


def _receive(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make the consumer's stream wait for the copies, and keep their memory until that stream is done with it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    masks = batch.masks
    of_masks = (*masks.context[:3], *masks.target[:3], masks.context_of, *(masks.covered or ()))
    if batch.padded is not None:
        of_masks = (*batch.padded.tensors(), batch.padded.covered)
    for tensor in (batch.images, *of_masks):
        tensor.record_stream(stream)
    return batch
