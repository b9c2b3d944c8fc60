"""Images that somebody names, files and folders, for looking at them and not for training: each one whole, in order."""
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import open_image
from ijepa_fast.data.index import RECORD, Index, PathTable, build_index
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.sampler import center_boxes
from ijepa_fast.data.storage import is_remote
from ijepa_fast.errors import DecodeError, UserError

THREADS = 8  # that read and decode
_Item = TypeVar("_Item")


def index_images(paths: Sequence[str | Path]) -> Index:
    """One index of all images in `paths`, files and folders (at any depth), in the order given.

    One folder, or one address (`s3://bucket/folder`), gives the index that training has of it, classes and cache and
    all; of anything else, no image has a class. Raises `UserError` for a path that does not exist, for what cannot be
    read as an image, and for an address that is not alone.
    """
    if len(paths) == 1 and (is_remote(paths[0]) or os.path.isdir(paths[0])):
        return build_index(paths[0], threads=THREADS)
    if remote := next((path for path in paths if is_remote(path)), None):
        raise UserError(f"{remote} is an address, and can only be named alone; copy its images here to name others too")
    names: list[bytes] = []
    records: list[np.ndarray] = []
    for path in paths:
        if os.path.isdir(path):
            folder = build_index(path, threads=THREADS)
            names += [os.fsencode(folder.container_path(i)) for i in range(len(folder.containers))]
            records.append(folder.records.copy())
        else:
            names.append(os.fsencode(os.path.realpath(os.path.expanduser(path))))
            records.append(_record(names[-1]))
        records[-1]["container"] += len(names) - (records[-1]["container"].max() + 1)
    every = np.concatenate(records)
    every["label"] = -1
    return Index("/", every, (), PathTable.from_paths([name.removeprefix(b"/") for name in names]))


def _record(path: bytes) -> np.ndarray:
    record = np.zeros(1, RECORD)
    try:
        with open(path, "rb") as file, library_warnings.unsaid():
            record["size"] = os.fstat(file.fileno()).st_size
            record["width"], record["height"] = open_image(file).size
    except Exception as error:  # Pillow's plugins raise whatever a malformed header leads them to
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{os.fsdecode(path)} cannot be read as an image: {reason}") from None
    return record


def center_crops(
    index: Index, ids: Sequence[int] | np.ndarray, image_size: int, *, batch: int, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Central crops of the images `ids`, in order: uint8 `[<= batch, S, S, 3]`, decoded one batch ahead.

    The square of 0.875 of the shorter side, as evaluation takes it. Raises `UserError`, with its path, for the first
    image that cannot be decoded; the whole batches before it have been given by then.
    """
    return _one_ahead(_decoded(index, np.asarray(ids), image_size, batch, device))


def _decoded(
    index: Index, ids: np.ndarray, image_size: int, batch: int, device: torch.device | str
) -> Iterator[torch.Tensor]:
    decoder = build_decoder("auto", THREADS, device)
    try:
        with Reader(index, THREADS) as reader:
            for first in range(0, len(ids), batch):
                some = ids[first : first + batch]
                records = index.records[some]
                boxes = center_boxes(records["width"], records["height"])
                try:
                    with library_warnings.batch(lambda at: index.path(some[at])):  # noqa: B023 (called in here only)
                        pixels = decoder.decode(reader.read(some), boxes, image_size)
                except DecodeError as error:
                    path = index.path(some[error.position])
                    raise UserError(f"{path} cannot be decoded: {error.reason}; remove or replace it") from None
                yield pixels
    finally:
        decoder.close()


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item
