"""Bad images: what takes their place, and the account that a run keeps of them.

An image is bad where it cannot be read, is not whole, or Pillow cannot decode it. Another image takes its place, chosen
by (seed, epoch, sample) alone, so a resumed run, or one on another number of ranks, sees the same.
"""
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ijepa_fast.counter_rng import uniforms
from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder import Decoder
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.table import Index
from ijepa_fast.errors import UserError

_SUBSTITUTE = 0x7375  # first word of the random keys, see sampler
TRIES = 64  # substitutes that are looked at for one bad image
AT_LEAST = 10  # bad images that never stop a run, however few were read


class BadImage(NamedTuple):
    """An image that had to be replaced."""

    position: int  # in the global batch of `step`
    step: int
    id: int
    path: str  # of the file, or of the tar and its member
    reason: str
    substitute: int  # id of the image in its place
    substitute_path: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.substitute_path} is in its place"


def substitutes(seed: int, epoch: int, image: int, images: int) -> Iterator[int]:
    """Which images to try in the place of `image`, in this order."""
    for u in uniforms((_SUBSTITUTE, seed, epoch), np.array([image]), TRIES)[0].tolist():
        yield int(u * images)


def neighbours(labels: np.ndarray, image: int) -> Iterator[int]:
    """For an evaluation: the images after `image` that have its label, so that a label stays true."""
    after = np.arange(image + 1, image + 1 + 64 * TRIES) % len(labels)
    yield from after[labels[after] == labels[image]][:TRIES].tolist()


class Filled(NamedTuple):
    """Pixels of a batch without a gap: uint8 `[n, S, S, 3]`. `bad`: position, reason and substitute's id."""

    pixels: torch.Tensor
    bad: list[tuple[int, str, int]]


def decode_all(
    index: Index,
    reader: Reader,
    decoder: Decoder,
    ids: np.ndarray,
    encoded: list[bytes | ImageError],
    box_of: Callable[[np.ndarray], np.ndarray],
    candidates_of: Callable[[int], Iterator[int]],
    size: int,
) -> Filled:
    """Decode the images `ids` from `encoded`, each cropped to `box_of(ids)`, and fill the place of those that are bad.

    `candidates_of(id)`: the images to try in the place of `id`. Raises `UserError` where none of them is good.
    """
    boxes = box_of(ids)
    reasons = {at: str(data) for at, data in enumerate(encoded) if isinstance(data, ImageError)}
    whole = {at: data for at, data in enumerate(encoded) if not isinstance(data, ImageError)}
    good = list(whole)
    with library_warnings.batch(lambda at: index.path(ids[good[at]])):
        decoded, refused = decoder.decode_each(list(whole.values()), boxes[good], size)
    if not reasons and not refused:
        return Filled(decoded, [])
    pixels = torch.zeros((len(ids), size, size, 3), dtype=torch.uint8, device=decoded.device)
    pixels[good] = decoded
    reasons |= {good[at]: reason for at, reason in refused.items()}
    bad = []
    for at in sorted(reasons):
        for candidate in candidates_of(int(ids[at])):
            one = np.array([candidate])
            (data,) = reader.start(one)
            if isinstance(data, ImageError):
                continue
            with library_warnings.batch(lambda _: index.path(one[0])):  # noqa: B023 (called in here only)
                decoded, refused = decoder.decode_each([data], box_of(one), size)
            if not refused:
                pixels[at] = decoded[0]
                bad.append((at, reasons[at], candidate))
                break
        else:
            raise UserError(
                f"{index.path(ids[at])} cannot be used: {reasons[at]}; and neither can any of the images that were "
                f"tried in its place"
            )
    return Filled(pixels, bad)


@dataclass
class Account:
    """The bad images of a run so far, those of all ranks. A checkpoint holds it, and `bad_images.jsonl` every event.

    `limit` (`data.max_bad_fraction`) is of the different images: one bad image among forty comes back every epoch.
    """

    folder: Path  # of the run
    images: int  # in the index
    limit: float
    replaced: int = 0  # samples
    ids: set[int] = field(default_factory=set)  # of the different bad images
    last: BadImage | None = None
    warned: library_warnings.Account = field(default_factory=library_warnings.Account)  # not in a checkpoint

    @property
    def file(self) -> Path:
        return self.folder / "bad_images.jsonl"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"replaced": self.replaced, "ids": sorted(self.ids)}

    def restore(self, state: dict[str, Any] | None, step: int, *, write: bool) -> None:
        """As it was in the checkpoint of `step`; drops from the file (if `write`) what came after it."""
        if state is not None:
            self.replaced, self.ids = state["replaced"], set(state["ids"])
        if write and self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            shortened = self.file.with_suffix(".cut")
            shortened.write_text("".join(kept))
            os.replace(shortened, self.file)

    def add(self, events: list[BadImage], *, write: bool) -> list[str]:
        """Count them and append them to the file (if `write`); a line on each image that is bad for the first time."""
        new = [event for event in {event.id: event for event in events}.values() if event.id not in self.ids]
        self.replaced += len(events)
        self.ids.update(event.id for event in events)
        if events:
            self.last = events[-1]
        if write and events:
            with open(self.file, "a") as file:
                for event in events:
                    file.write(json.dumps({**event._asdict(), "step": event.step + 1}) + "\n")
        return [f"bad image {event}" for event in new]

    def check(self, read: int) -> None:
        """Raise `UserError` where too many of the images that `read` samples can have seen are bad."""
        seen = min(read, self.images)
        if len(self.ids) > max(AT_LEAST, self.limit * seen):
            assert self.last is not None
            raise UserError(
                f"{len(self.ids):,} of the {seen:,} images read so far are bad, more than "
                f"data.max_bad_fraction={self.limit:g}; the last one: {self.last.path}: {self.last.reason}; "
                f"{self.file} lists all: repair them, or raise data.max_bad_fraction, and go on with --resume"
            )
