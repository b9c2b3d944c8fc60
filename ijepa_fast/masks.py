"""Multi-block masks, drawn on the host: which patches the context encoder sees and which the predictor predicts.

An image gets `num_targets` rectangular target blocks, and `num_contexts` rectangular context blocks less what the
targets cover (I-JEPA, arXiv 2301.08243, section 3). What a step draws is a function of (seed, step, position in the
global batch) alone: no state to save, and no trace of how the batch is split over ranks or micro-batches.

Two samplers, named in every result because accuracy is very sensitive to them:

- `reference`: the distribution of the released code. One random number decides both scale and aspect ratio, so large
  blocks are tall; one target size and one context size serve the whole global batch of a step; blocks stay out of the
  last row and the last column.
- `corrected`: every block of every image draws its own scale and, independently, its own aspect ratio, may span the
  grid, and every position is reachable.

Both draw the place of a context again until more than `min_keep` tokens are left of it, and after every 20 tries let
one more target, the last first, overlap it: the released rule. `check_masks` refuses what even that cannot satisfy.

Two collations: `truncate` cuts every context, in raster order, to the shortest of its group (`group` consecutive
positions of the global batch: a released per-GPU batch), and targets likewise where their lengths differ; `ragged` cuts
nothing unless `max_keep` is set. Then a longer context keeps a random subset of that many tokens: a cut in raster order
would hide the bottom rows from the encoder more often than the top ones.
"""

from typing import NamedTuple

import numpy as np
import torch
from ijepa_kernels import Packed
from torch import Tensor

from ijepa_fast.config import MaskConfig
from ijepa_fast.counter_rng import uniforms
from ijepa_fast.errors import UserError

_TRIES = 20  # places tried for a context before one target fewer is kept out of it
_PURPOSE = int.from_bytes(b"mask", "big")  # first word of our random keys: no stream is shared with order or crops
# The streams of random numbers. Contexts come last: their k-th try is stream _CONTEXT_PLACE + k.
_TARGET_SIZE, _TARGET_PLACE, _CONTEXT_SIZE, _SUBSET, _CONTEXT_PLACE = range(5)


class Covered(NamedTuple):
    """The patches that a target block covers: of the target encoder's features, no others are read."""

    rows: Tensor  # int64 [R], ascending: image * N + patch
    target: Tensor  # int32 [T_tgt]: which of `rows` each token of the target blocks is


class Masks(NamedTuple):
    """The masks of some images, listed image by image, view by view, context by context.

    Targets are listed once for each context of their view, so `target` has one row for every predicted token.
    """

    context: Packed
    target: Packed
    context_of: Tensor  # int32 [S_tgt]: the context sequence from which each target sequence is predicted
    covered: Covered | None = None  # without it the target encoder finishes every patch


class _Kind(NamedTuple):
    """What a config says of the targets, or of the contexts, of a view."""

    name: str
    number: int
    scale: tuple[float, float]  # share of the grid's patches
    aspect: tuple[float, float]  # height / width
    size_stream: int


class _Blocks(NamedTuple):
    """Rectangles of patches: arrays of unsigned integers, all of one shape [images, blocks of an image]."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


class MultiBlockMasks:
    """Draws the masks of any part of any step. Nothing changes after construction, so threads may share one."""

    def __init__(self, config: MaskConfig, grid: int, seed: int, global_batch: int):
        """`grid`: patches along a side; `global_batch`: images a step. Raises `UserError` as `check_masks` does."""
        check_masks(config, grid)
        self.config, self.grid, self.seed, self.global_batch = config, grid, seed, global_batch
        self._target, self._context = _kinds(config)
        self._side = _side(config.sampler, grid)
        self._max_target = int(_possible_sizes(self._target, config.sampler, grid).prod(1).max())
        self._max_context = int(_possible_sizes(self._context, config.sampler, grid).prod(1).max())
        if config.max_keep is not None:
            self._max_context = min(self._max_context, config.max_keep)
        # In unsigned arithmetic `row - top < height` is the whole test: above the block the difference wraps around.
        # The narrowest type is the fastest; the largest number it must hold is `side + 1`, in `_place`.
        self._dtype = np.min_scalar_type(grid + 1)
        self._row, self._column = (axis.astype(self._dtype) for axis in np.divmod(np.arange(grid * grid), grid))
        # _offset[w, t]: how far the t-th patch, in raster order, of a block of width w lies behind its first.
        width, token = np.maximum(np.arange(grid + 1), 1)[:, None], np.arange(self._max_target)
        self._offset = (token // width * grid + token % width).astype(np.int32)

    def sample(self, step: int, start: int, stop: int) -> Masks:
        """Masks of positions [start, stop) of the global batch of `step`; image ids count from 0 at `start`."""
        if not 0 <= start < stop <= self.global_batch:
            raise ValueError(f"positions [{start}, {stop}) are not part of a global batch of {self.global_batch}")
        config = self.config
        first, last = start, stop
        if config.collate == "truncate":  # lengths are those of whole groups, so every group in touch is drawn whole
            first -= start % config.group
            last = min(last + -stop % config.group, self.global_batch)
        targets = self._targets(step, first, last)
        visible, lengths = self._contexts(step, first, last, targets)
        target_keep, context_keep = self._cut(_area(targets.height, targets.width)), self._cut(lengths)

        part = slice(start - first, stop - first)
        targets, target_keep = _Blocks(*(field[part] for field in targets)), target_keep[part]
        visible, lengths, context_keep = visible[part], lengths[part], context_keep[part]
        if config.max_keep is not None:
            visible = self._thin(step, start, visible, lengths)
            lengths = context_keep = np.minimum(lengths, config.max_keep)
        context = _pack(_first_patches(visible, lengths, context_keep), context_keep, self._max_context)
        if config.num_contexts > 1:
            targets, target_keep = _Blocks(*map(self._once_per_context, targets)), self._once_per_context(target_keep)
        target = _pack(self._block_patches(targets, target_keep), target_keep, self._max_target)
        context_of = np.repeat(np.arange(lengths.size, dtype=np.int32), config.num_targets)
        covered = covered_by(target, stop - start, self.grid**2)
        return Masks(context, target, torch.from_numpy(context_of), covered)

    def count_targets(self, step: int) -> int:
        """Predicted rows in the whole global batch of `step`: from block sizes alone, so that any rank can know it."""
        area = _area(*self._sizes(step, self._target, 0, self.global_batch))
        return int(self._cut(area).sum()) * self.config.num_contexts

    # Below, [first, last) are positions of the global batch and arrays are [images, blocks of an image, view by view].

    def _targets(self, step: int, first: int, last: int) -> _Blocks:
        height, width = self._sizes(step, self._target, first, last)
        number = first * height.shape[1] + np.arange(height.size).reshape(height.shape)
        return self._place(step, _TARGET_PLACE, number, height, width)

    def _contexts(self, step: int, first: int, last: int, targets: _Blocks) -> tuple[np.ndarray, np.ndarray]:
        """Which patches the contexts show, bool [images, contexts, N], and how many, int32 [images, contexts]."""
        config = self.config
        height, width = self._sizes(step, self._context, first, last)
        shape, height, width = height.shape, height.ravel(), width.ravel()
        number = first * shape[1] + np.arange(height.size)
        view = np.arange(height.size) // config.num_contexts
        covered = self._cover(targets).reshape(-1, config.num_targets, self.grid**2)
        visible, lengths = np.empty((height.size, self.grid**2), bool), np.empty(height.size, np.int32)
        short = np.arange(height.size)  # the contexts that still lack tokens
        # The last round hides nothing, and check_masks has seen that every whole block is long enough.
        for attempt in range(_TRIES * config.num_targets + 1):
            if attempt % _TRIES == 0:
                hidden = np.logical_or.reduce(covered[:, : config.num_targets - attempt // _TRIES], axis=1)
            shown = self._cover(self._place(step, _CONTEXT_PLACE + attempt, number[short], height[short], width[short]))
            if not config.allow_overlap:
                shown &= ~hidden[view[short]]
            visible[short], lengths[short] = shown, shown.view(np.uint8).sum(-1, dtype=np.int32)
            short = short[lengths[short] <= config.min_keep]
            if not short.size:
                break
        return visible.reshape(*shape, -1), lengths.reshape(shape)

    def _sizes(self, step: int, kind: _Kind, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths of the targets or contexts."""
        shape = (last - first, self.config.views * kind.number)
        if self.config.sampler == "reference":
            scale = aspect = self._uniforms(step, kind.size_stream, np.zeros(1), 1)
        else:
            draws = self._uniforms(step, kind.size_stream, np.arange(first, last), 2 * shape[1])
            scale, aspect = draws[:, ::2], draws[:, 1::2]
        area = np.floor(self.grid**2 * _between(kind.scale, scale))
        height, width = _block_size(area, _between(kind.aspect, aspect), self._side)
        return np.broadcast_to(height.astype(self._dtype), shape), np.broadcast_to(width.astype(self._dtype), shape)

    def _place(self, step: int, stream: int, number: np.ndarray, height: np.ndarray, width: np.ndarray) -> _Blocks:
        """Blocks of these sizes at uniform places; `number` counts the blocks of the kind over the global batch."""
        draws = self._uniforms(step, stream, number.ravel(), 2).reshape(*number.shape, 2)
        top = draws[..., 0] * (self._side + 1 - height)
        left = draws[..., 1] * (self._side + 1 - width)
        return _Blocks(top.astype(self._dtype), left.astype(self._dtype), height, width)

    def _uniforms(self, step: int, stream: int, counters: np.ndarray, draws: int) -> np.ndarray:
        return uniforms((_PURPOSE, self.seed, step, stream), counters, draws)

    def _cover(self, blocks: _Blocks) -> np.ndarray:
        """Which patches lie in a block: bool [..., N]."""
        top, left, height, width = (field[..., None] for field in blocks)
        return (self._row - top < height) & (self._column - left < width)

    def _cut(self, lengths: np.ndarray) -> np.ndarray:
        """How many tokens the collation leaves of sequences this long."""
        if self.config.collate == "ragged":
            return lengths
        shortest = np.minimum.reduceat(lengths.min(1), np.arange(0, len(lengths), self.config.group))
        return np.broadcast_to(shortest.repeat(self.config.group)[: len(lengths), None], lengths.shape)

    def _thin(self, step: int, first: int, visible: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`visible` with a random `max_keep` of the patches of each context that shows more."""
        max_keep, flat = self.config.max_keep, visible.reshape(-1, self.grid**2)
        assert max_keep is not None
        long = np.flatnonzero(lengths > max_keep)
        if not long.size:
            return visible
        rank = self._uniforms(step, _SUBSET, first * lengths.shape[1] + long, self.grid**2)
        chosen = np.where(flat[long], rank, 1.0).argpartition(max_keep - 1, axis=1)[:, :max_keep]
        flat = flat.copy()
        flat[long] = False
        flat[long[:, None], chosen] = True
        return flat.reshape(visible.shape)

    def _once_per_context(self, blocks: np.ndarray) -> np.ndarray:
        views = blocks.reshape(len(blocks), self.config.views, 1, self.config.num_targets)
        return views.repeat(self.config.num_contexts, axis=2).reshape(len(blocks), -1)

    def _block_patches(self, blocks: _Blocks, keep: np.ndarray) -> np.ndarray:
        """The first `keep` patches of each block, in raster order, block after block."""
        keep = keep.ravel()
        offset = self._offset.ravel()[_ranges(blocks.width.ravel().astype(np.int64) * self._max_target, keep)]
        return offset + np.repeat(blocks.top.ravel().astype(np.int32) * self.grid + blocks.left.ravel(), keep)


def covered_by(target: Packed, images: int, patches: int) -> Covered:
    """What target blocks of `images` images with `patches` patches each cover; on the host, where alone R is known."""
    rows = target.rows(patches).numpy()
    covered = np.zeros(images * patches, bool)
    covered[rows] = True
    place = covered.cumsum(dtype=np.int32) - 1
    return Covered(torch.from_numpy(np.flatnonzero(covered)), torch.from_numpy(place[rows]))


def check_masks(config: MaskConfig, grid: int) -> None:
    """Raise `UserError` where blocks of this config on a `grid` x `grid` patch grid cannot keep enough tokens."""
    for kind in _kinds(config):
        sizes = _possible_sizes(kind, config.sampler, grid)
        height, width = sizes[sizes.prod(1).argmin()]
        if height * width <= config.min_keep:
            raise UserError(
                f"mask.min_keep={config.min_keep} cannot be met: a {kind.name} block must keep more patches than that, "
                f"and on a grid of {grid} x {grid} patches mask.{kind.name}_scale={list(kind.scale)} draws blocks of "
                f"{height} x {width}; lower mask.min_keep or raise mask.{kind.name}_scale"
            )
    if config.max_keep is not None and config.max_keep <= config.min_keep:
        raise UserError(f"mask.max_keep={config.max_keep} must be more than mask.min_keep={config.min_keep}")


def _kinds(config: MaskConfig) -> tuple[_Kind, _Kind]:
    return (
        _Kind("target", config.num_targets, config.target_scale, config.target_aspect, _TARGET_SIZE),
        _Kind("context", config.num_contexts, config.context_scale, (1.0, 1.0), _CONTEXT_SIZE),
    )


def _side(sampler: str, grid: int) -> int:
    """Blocks lie in the first `side` rows and columns; the released code draws tops from [0, grid - height)."""
    return grid - 1 if sampler == "reference" else grid


def _between(limits: tuple[float, float], fraction: np.ndarray) -> np.ndarray:
    return limits[0] + fraction * (limits[1] - limits[0])


def _block_size(area: np.ndarray | int, aspect: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of blocks of about `area` patches, `aspect` = height / width, no side longer than `side`."""
    return np.minimum(np.rint(np.sqrt(area * aspect)), side), np.minimum(np.rint(np.sqrt(area / aspect)), side)


def _possible_sizes(kind: _Kind, sampler: str, grid: int) -> np.ndarray:
    """Every (height, width) that can be drawn, int64 [sizes, 2]."""
    patches, side = grid * grid, _side(sampler, grid)
    low, high = kind.scale
    rounding = (np.arange(side) + 0.5) ** 2  # squares of the sides at which the rounded side steps up
    sizes = []
    for area in range(int(patches * low), int(patches * high) + 1):
        aspects = np.array(kind.aspect)
        if sampler == "reference" and high > low:  # only aspect ratios that come with scales of this area
            part = (np.array([area, area + 1]) / patches - low) / (high - low)
            aspects = _between(kind.aspect, part.clip(0, 1))
        with np.errstate(divide="ignore"):
            steps = np.concatenate([rounding / area, area / rounding])
        edges = np.sort(np.concatenate([aspects, steps[(steps > aspects[0]) & (steps < aspects[1])]]))
        # Sizes are constant between two edges; at the ends, where the interval may be a point, they are their own.
        sizes.append(np.stack(_block_size(area, np.concatenate([aspects, (edges[1:] + edges[:-1]) / 2]), side), axis=1))
    return np.unique(np.concatenate(sizes).astype(np.int64), axis=0)


def _area(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    return height.astype(np.int64) * width


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each pair, one range after the other."""
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def _first_patches(visible: np.ndarray, lengths: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The first `keep` of the `lengths` visible patches of each context, in raster order, context after context."""
    lengths, keep = lengths.ravel(), keep.ravel()
    found = np.flatnonzero(visible)[_ranges(lengths.cumsum() - lengths, keep)]
    return found - np.repeat(np.arange(lengths.size) * visible.shape[-1], keep)


def _pack(indices: np.ndarray, lengths: np.ndarray, max_seqlen: int) -> Packed:
    cu_seqlens = np.zeros(lengths.size + 1, np.int32)
    lengths.cumsum(out=cu_seqlens[1:])
    image = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths.shape[1])
    patches = indices.astype(np.int32)
    return Packed(torch.from_numpy(patches), torch.from_numpy(cu_seqlens), torch.from_numpy(image), max_seqlen)
