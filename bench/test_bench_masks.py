"""Masks of a released per-GPU batch (128 images, 16 x 16 patches): ours, and one image after another in plain torch."""

import itertools
import statistics
import time

import pytest
import torch

from bench.naive_masks import naive_masks, truncate
from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import MultiBlockMasks

IMAGES, GRID = 128, 16


def _naive_seconds(repeats: int = 5) -> float:
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(repeats):
        begin = time.perf_counter()
        contexts, targets = naive_masks(generator, GRID, IMAGES)
        truncate(contexts), truncate(targets)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _check(masks: MultiBlockMasks) -> None:
    """No time is worth reporting of masks that let a context see a target, or that miscount."""
    context, target, context_of = masks.sample(0, 0, IMAGES)
    visible, hidden = torch.zeros(2, IMAGES, GRID * GRID, dtype=torch.bool)
    for seen, packed in ((visible, context), (hidden, target)):
        image = packed.image.repeat_interleave(packed.cu_seqlens.diff())
        seen[image.long(), packed.indices.long()] = True
    assert not (visible & hidden).any()
    assert visible.sum() == len(context.indices)
    assert masks.count_targets(0) == len(target.indices)
    assert context_of.equal(target.image)


@pytest.mark.benchmark(group="masks")
@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("sampler", ["reference", "corrected"])
def test_bench_masks(benchmark, sampler, collate):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        masks = MultiBlockMasks(MaskConfig(sampler=sampler, collate=collate), GRID, seed=0, global_batch=IMAGES)
        _check(masks)
        steps = itertools.count()
        benchmark(lambda: masks.sample(next(steps), 0, IMAGES))
        naive = _naive_seconds()
    finally:
        torch.set_num_threads(threads)
    ours = benchmark.stats.stats
    benchmark.extra_info.update(
        images=IMAGES,
        grid=GRID,
        sampler=sampler,
        collate=collate,
        ours_median_ms=1e3 * ours.median,
        ours_iqr_ms=1e3 * ours.iqr,
        naive_median_ms=1e3 * naive,
        ratio_to_naive=naive / ours.median,
    )
