"""Which images a step sees, and which crop of each: functions of (seed, epoch, sample), with no state to save.

So the data state of a checkpoint is its step, any rank can compute any other rank's share, and another world size sees
the same global batches.
"""
import math
from typing import Literal

import numpy as np

from ijepa_fast.counter_rng import uniforms
from ijepa_fast.data.order import FullOrder, ShardOrder
from ijepa_fast.errors import UserError

_CROP = 0x6372  # first word of the random keys, so that order, crops and masks never share a stream
_TRIES = 10


class GlobalBatchSampler:
    """Shuffled global batches: every epoch is a permutation of all images, cut after the last whole batch.

    `shuffle`: see `order`. `num_images` less than `global_batch` is a `UserError`.
    """

    def __init__(self, num_images: int, global_batch: int, seed: int, shuffle: Literal["full", "shards"] = "full"):
        if num_images < global_batch:
            raise UserError(
                f"{num_images} images are fewer than one global batch of {global_batch}: "
                f"add images, or set optim.global_batch_size to at most {num_images}"
            )
        self.num_images, self.global_batch, self.seed = num_images, global_batch, seed
        self.steps_per_epoch = num_images // global_batch
        self._order = (FullOrder if shuffle == "full" else ShardOrder)(num_images, seed)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ids(self, step: int) -> np.ndarray:
        """Image ids of the whole global batch of `step` (from 0), int64 `[global_batch]`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._order.ids(epoch, np.arange(batch * self.global_batch, (batch + 1) * self.global_batch))


def crop_boxes(
    seed: int,
    epoch: int,
    ids: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of a random resized crop, int32 `[n, 4]` (left, top, width, height) in pixels; row i is that of `ids[i]`.

    The rule is torchvision's `RandomResizedCrop`: up to ten tries of an area (uniform in `scale`, a share of the image)
    and an aspect ratio (log-uniform in `ratio`); the first that fits lies anywhere; if none fits, the largest central
    box whose aspect ratio is within `ratio`.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    draws = uniforms((_CROP, seed, epoch), ids, 2 * _TRIES + 2)
    area = (widths * heights)[:, None] * _between(draws[:, :_TRIES], *scale)
    aspect = np.exp(_between(draws[:, _TRIES:-2], math.log(ratio[0]), math.log(ratio[1])))
    w, h = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first, row = fits.argmax(1), np.arange(len(widths))
    found, w, h = fits[row, first], w[row, first], h[row, first]

    central_w = np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64))
    central_h = np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64))
    w, h = np.where(found, w, central_w), np.where(found, h, central_h)
    left = np.where(found, (draws[:, -2] * (widths - w + 1)).astype(np.int64), (widths - w) // 2)
    top = np.where(found, (draws[:, -1] * (heights - h + 1)).astype(np.int64), (heights - h) // 2)
    return np.stack([left, top, w, h], 1).astype(np.int32)


def center_boxes(widths: np.ndarray, heights: np.ndarray, fraction: float = 0.875) -> np.ndarray:
    """Central squares, int32 `[n, 4]` (left, top, width, height): `fraction` of the shorter side.

    0.875 is the usual evaluation crop, 224 of 256 pixels.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    side = np.maximum(np.rint(np.minimum(widths, heights) * fraction).astype(np.int64), 1)
    return np.stack([(widths - side) // 2, (heights - side) // 2, side, side], 1).astype(np.int32)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u
