"""From a folder of images to batches: index, sampler, reader, decoder and loader, put together in one place."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from ijepa_fast.config import DataConfig
from ijepa_fast.data.decoder import Decoder, build_decoder
from ijepa_fast.data.index import Index, build_index
from ijepa_fast.data.loader import Loader, eval_batches
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.sampler import GlobalBatchSampler
from ijepa_fast.data.subset import select
from ijepa_fast.masks import MultiBlockMasks


class ImageSource:
    """The images of an index, as pixels. Closes what it opened: a decoder that was passed in stays the caller's."""

    def __init__(
        self, index: Index, data: DataConfig, device: torch.device | str = "cpu", decoder: Decoder | None = None
    ):
        self.index, self.image_size = index, data.image_size
        self._own_decoder = decoder is None
        self.decoder = build_decoder(data.decoder, data.threads, device) if decoder is None else decoder
        self.reader = Reader(index, data.threads, data.max_pixels)

    def center_crops(self, ids: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
        """Central crops of the images `ids`, in order: uint8 `[<= batch, image_size, image_size, 3]`."""
        return eval_batches(self.index, ids, self.decoder, self.reader, self.image_size, batch)

    def close(self) -> None:
        self.reader.close()
        if self._own_decoder:
            self.decoder.close()


@dataclass(frozen=True)
class Pipeline:
    """The images of an index and the loader of their batches; `close` it, or use it as a context manager."""

    source: ImageSource
    sampler: GlobalBatchSampler
    loader: Loader

    def close(self) -> None:
        self.loader.close()
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def build_pipeline(
    data: DataConfig,
    masks: MultiBlockMasks,
    *,
    micro_batch: int,
    index: Index | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    prefetch: int = 2,
    padded: bool = False,
) -> Pipeline:
    """The batches of `data.root` with `masks`, whose seed and global batch are those of order and crops as well.

    `index`: left out, that of `data.root` is read or built, and what `data` selects of it is taken. The other arguments
    are those of `Loader`. Raises `UserError` as `build_index`, `select`, `GlobalBatchSampler` and `build_decoder` do.
    """
    index = select(build_index(data.root, threads=data.threads), data) if index is None else index
    sampler = GlobalBatchSampler(len(index), masks.global_batch, masks.seed, data.shuffle)
    source = ImageSource(index, data, device)
    loader = Loader(
        index,
        sampler,
        source.decoder,
        source.reader,
        masks,
        image_size=data.image_size,
        crop_scale=data.crop_scale,
        seed=masks.seed,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        device=device,
        prefetch=prefetch,
        padded=padded,
    )
    return Pipeline(source, sampler, loader)
