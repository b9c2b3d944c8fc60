"""Features of frozen encoders: computed once by all ranks together, and kept on disk.

One pass gives both representations that the paper tries (A.2): the mean over patches of the last layer, and of the
concatenated last four. A file is named by what its numbers depend on: weights, images, crops, precision. Images go
through the encoder in the same batches whatever the number of ranks, so that the numbers are the same too.
"""
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa_fast.counter_rng import uniforms
from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder import Decoder
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.sampler import center_boxes, crop_boxes
from ijepa_fast.distributed import World
from ijepa_fast.errors import DecodeError, UserError
from ijepa_fast.evaluation.dataset import Labelled
from ijepa_fast.evaluation.frozen import LAYERS, Encoder, weights_digest

CROP_SCALE = (0.3, 1.0)  # of the random crops, as in pretraining
_FORMAT = "ijepa_fast features 1"
_FLIP = 0x666C


class Features(NamedTuple):
    """Of the images of a `Labelled` part, in its order, on the CPU."""

    last_four: Tensor  # fp32 [n, 4 D]; the last layer's are the last D
    dim: int  # D
    digests: Tensor  # int64 [n]: of the images' encoded bytes

    @property
    def last(self) -> Tensor:
        """fp32 `[n, D]`."""
        return self.last_four[:, -self.dim :]


class Extractor:
    """Computes features by `model` (see `frozen`), already prepared on `world.device`; the same numbers on any ranks.

    `cache`: the folder of the files, or None to keep none. `features` is called by all ranks; rank 0 alone gets what it
    computes, the others None.
    """

    def __init__(
        self,
        model: Encoder,
        decoder: Decoder,
        world: World,
        *,
        cache: Path | None,
        batch: int = 64,
        threads: int = 8,
        console: Console | None = None,
    ):
        self.model, self.decoder, self.world = model, decoder, world
        self.cache, self.batch, self.threads, self.console = cache, batch, threads, console
        self.encoder = model.encoder
        self._weights = weights_digest(self.encoder)

    def features(self, part: Labelled, name: str, view: int | None = None) -> Features | None:
        """Of the central crop of each image, or of random crop number `view`, flipped or not; `name` is for the bar."""
        file = None if self.cache is None else self.cache / f"{self._key(part, view)}.safetensors"
        features = _load(file, len(part.ids)) if self.world.is_main and file is not None else None
        if not self.world.any(features is not None):
            features = self._compute(part, name, view)
            if features is not None and file is not None:
                try:
                    _save(file, features, f"{name}: {len(part.ids)} images of {part.index.root}")
                except OSError as error:
                    where = f"{self.cache}: {error.strerror or error}"
                    print(f"warning: the features of {name} are computed anew next time, for {where}", file=sys.stderr)
        return features

    def _key(self, part: Labelled, view: int | None) -> str:
        transform = (self.encoder.image_size, view, CROP_SCALE, type(self.decoder).__name__)
        # On a CPU the order of a sum, and so its last bit, depends on how many threads share it.
        threads = torch.get_num_threads() if self.world.device.type == "cpu" else 0
        precision = self.world.device.type, threads, str(self.encoder.compute_dtype), str(self.encoder.residual_dtype)
        parts = [_FORMAT, self._weights, data_fingerprint(part), transform, precision, self.batch, torch.__version__]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]

    @torch.inference_mode()
    def _compute(self, part: Labelled, name: str, view: int | None) -> Features | None:
        world, n = self.world, len(part.ids)
        layers = min(LAYERS, len(self.encoder.blocks))
        batches = [part.ids[first : first + self.batch] for first in range(0, n, self.batch)]
        rounds = -(-len(batches) // world.size)
        mine = batches[world.rank :: world.size]
        mine += [part.ids[:0]] * (rounds - len(mine))  # all ranks take part in every collective
        rows, digests = [], []
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(Reader(part.index, self.threads))
            advance = stack.enter_context(progress(self.console, f"features of {name}", n))
            ahead = stack.enter_context(one_ahead(mine, lambda ids: self._read(part, reader, ids, view)))
            for _ in range(rounds):
                with world.raise_on_all_ranks():
                    images, seen = next(ahead)
                values = torch.zeros(self.batch, layers * self.encoder.size.dim, device=world.device)
                if len(images):
                    values[: len(images)] = self.model.features(images.to(world.device), layers=layers)
                gathered = world.gather(values)
                # int64 on the host: through gloo.
                seen_by_all = world.gather(torch.nn.functional.pad(seen, (0, self.batch - len(seen))))
                if world.is_main:
                    rows.append(gathered.cpu())
                    digests.append(seen_by_all)
                advance(min(self.batch * world.size, n))
        if not world.is_main:
            return None
        every = torch.cat(rows)[:n]
        if not every.isfinite().all():
            raise UserError(f"the features of {name} are not finite: the weights are those of a run that diverged")
        return Features(every, self.encoder.size.dim, torch.cat(digests)[:n])

    def _read(self, part: Labelled, reader: Reader, ids: np.ndarray, view: int | None) -> tuple[Tensor, Tensor]:
        encoded = reader.read(ids)
        images = decode(part, self.decoder, encoded, ids, self.encoder.image_size, view)
        return images, torch.tensor([_digest(one) for one in encoded], dtype=torch.int64)


def decode(
    part: Labelled, decoder: Decoder, encoded: list[bytes], ids: np.ndarray, size: int, view: int | None, seed: int = 0
) -> Tensor:
    """Central crops, or random ones of number `view`, half of them flipped: uint8 `[n, size, size, 3]`."""
    if not len(ids):
        return torch.empty(0, size, size, 3, dtype=torch.uint8)
    widths, heights = part.index.records["width"][ids], part.index.records["height"][ids]
    boxes = center_boxes(widths, heights)
    if view is not None:
        boxes = crop_boxes(seed, view, ids, widths, heights, CROP_SCALE)
    try:
        with library_warnings.batch(lambda at: part.index.path(ids[at])):
            images = decoder.decode(encoded, boxes, size)
    except DecodeError as error:
        path = part.index.path(ids[error.position])
        raise UserError(f"{path} cannot be decoded: {error.reason}; remove or replace it") from None
    if view is not None:
        flip = torch.from_numpy(uniforms((_FLIP, seed, view), ids, 1)[:, 0] < 0.5).to(images.device)
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return images


def data_fingerprint(part: Labelled) -> str:
    """Of which files a part consists, and of their sizes and times of change; in hexadecimal digits."""
    records = part.index.records[part.ids]
    digest = hashlib.sha256(part.index.root.encode(errors="surrogateescape"))
    containers, which = np.unique(records["container"], return_inverse=True)  # a tar has many images
    digest.update(which.astype(np.int64).tobytes() + records["offset"].tobytes() + records["size"].tobytes())
    for container in containers.tolist():
        path = part.index.container_path(container)
        try:
            digest.update(f"{path} {os.stat(path).st_mtime_ns}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"{path} cannot be read any more: {error.strerror}") from None
    return digest.hexdigest()


def shared_images(train: Features, val: Features) -> int:
    """How many images of `val` are, byte for byte, in `train` as well."""
    return int(torch.isin(val.digests, train.digests).sum())


@contextlib.contextmanager
def progress(console: Console | None, title: str, total: int):
    """A bar on a terminal; gives the function that advances it."""
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def one_ahead(items: list, work) -> Iterator[Iterator]:
    """`work` of each item in order, the next one done in a thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:

        def results():
            ahead = None
            for item in items:
                begun = pool.submit(work, item)
                if ahead is not None:
                    yield ahead.result()
                ahead = begun
            if ahead is not None:
                yield ahead.result()

        yield results()


def _digest(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little", signed=True)


def _load(file: Path, n: int) -> Features | None:
    """None where there is no file, or a damaged one, which is then written anew."""
    try:
        with safe_open(file, "pt") as tensors:
            features = Features(
                tensors.get_tensor("last_four"), int(tensors.metadata()["dim"]), tensors.get_tensor("digests")
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return features if len(features.last_four) == len(features.digests) == n else None


def _save(file: Path, features: Features, what: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    os.close(handle)
    try:
        tensors = {"last_four": features.last_four.contiguous(), "digests": features.digests}
        save_file(tensors, partial, {"format": _FORMAT, "dim": str(features.dim), "what": what})
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise
