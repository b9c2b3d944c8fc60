"""Order and crop boxes: functions of (seed, epoch, sample), drawn from the distribution of RandomResizedCrop."""
import math

import numpy as np
import pytest

from ijepa_fast.data.sampler import GlobalBatchSampler, center_boxes, crop_boxes
from ijepa_fast.errors import UserError


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (7, 7), (103, 10), (64, 16), (1000, 3)])
def test_an_epoch_is_a_permutation_cut_after_the_last_whole_batch(images, batch):
    sampler = GlobalBatchSampler(images, batch, seed=3)
    assert sampler.steps_per_epoch == images // batch
    for epoch in (0, 5):
        first = epoch * sampler.steps_per_epoch
        ids = np.concatenate([sampler.ids(step) for step in range(first, first + sampler.steps_per_epoch)])
        assert ids.dtype == np.int64
        assert ids.shape == (images // batch * batch,)
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() >= 0
        assert ids.max() < images


def test_ids_depend_on_seed_and_step_alone():
    straight = GlobalBatchSampler(100, 10, seed=1)
    in_order = [straight.ids(step).copy() for step in range(30)]
    jumping = GlobalBatchSampler(100, 10, seed=1)
    for step in (29, 0, 15, 14, 3, 29):
        assert np.array_equal(jumping.ids(step), in_order[step])
    assert not np.array_equal(in_order[0], GlobalBatchSampler(100, 10, seed=2).ids(0))
    assert not np.array_equal(in_order[0], in_order[10])  # another epoch, another order
    assert [straight.epoch_of(step) for step in (0, 9, 10, 29)] == [0, 0, 1, 2]


def test_every_image_is_equally_likely_at_every_place():
    counts = np.zeros((5, 5), int)
    for seed in range(2000):
        counts[np.arange(5), np.concatenate([GlobalBatchSampler(5, 5, seed).ids(0)])] += 1
    # Binomial(2000, 1/5): mean 400, standard deviation 17.9. Five of them; the seeds are fixed, so no flakiness.
    assert abs(counts - 400).max() < 5 * 17.9


def test_the_order_is_frozen():
    """A resumed run must see it again with another numpy: only bit generators are stable there, and we use no more."""
    assert GlobalBatchSampler(10, 10, seed=0).ids(0).tolist() == [8, 5, 2, 3, 4, 6, 1, 7, 0, 9]


def test_fewer_images_than_a_global_batch_is_a_user_error():
    with pytest.raises(UserError, match="9 images are fewer than one global batch of 10"):
        GlobalBatchSampler(9, 10, seed=0)


def scalar_crop(rng, width, height, scale, ratio):
    """torchvision's rule, one image at a time, from its description."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def quantile_gap(a, b):
    """The largest distance between two empirical distribution functions (Kolmogorov-Smirnov)."""
    grid = np.unique(np.concatenate([a, b]))
    return np.abs(np.searchsorted(np.sort(a), grid, "right") / len(a)
                  - np.searchsorted(np.sort(b), grid, "right") / len(b)).max()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (300, 1000), (1000, 200), (3, 2), (40, 1), (1, 1)])
def test_boxes_have_the_distribution_of_the_scalar_rule(width, height):
    n, scale, ratio = 4000, (0.3, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(0, 0, np.arange(n), np.full(n, width), np.full(n, height), scale)
    assert boxes.dtype == np.int32
    rng = np.random.default_rng(1)
    scalar = np.array([scalar_crop(rng, width, height, scale, ratio) for _ in range(n)])
    left, top, w, h = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()
    # The 1e-4 quantile of the two-sample Kolmogorov-Smirnov statistic is sqrt(-ln(1e-4 / 2) / n).
    limit = math.sqrt(-math.log(0.5e-4) / n)
    for of in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
               lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0] + b[:, 2] - b[:, 1]):
        assert quantile_gap(of(boxes).astype(float), of(scalar).astype(float)) < limit


def test_very_long_images_get_the_central_box_of_extreme_aspect():
    boxes = crop_boxes(0, 0, np.arange(3), np.array([5000, 40, 3]), np.array([40, 5000, 900]), (0.3, 1.0))
    assert boxes.tolist() == [[2473, 0, 53, 40], [0, 2473, 40, 53], [0, 448, 3, 4]]


def test_a_box_depends_on_its_own_sample_alone():
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(400, 600, 50), rng.integers(400, 600, 50)
    ids = rng.permutation(10**7)[:50]
    together = crop_boxes(7, 2, ids, widths, heights, (0.3, 1.0))
    order = rng.permutation(50)
    assert np.array_equal(crop_boxes(7, 2, ids[order], widths[order], heights[order], (0.3, 1.0)), together[order])
    one = crop_boxes(7, 2, ids[9:10], widths[9:10], heights[9:10], (0.3, 1.0))
    assert np.array_equal(one, together[9:10])
    for seed, epoch in ((8, 2), (7, 3)):
        assert (crop_boxes(seed, epoch, ids, widths, heights, (0.3, 1.0)) != together).any(1).mean() > 0.9


def test_whole_images_where_the_scale_says_so():
    boxes = crop_boxes(0, 0, np.arange(20), np.full(20, 64), np.full(20, 64), (1.0, 1.0), ratio=(1.0, 1.0))
    assert (boxes == [0, 0, 64, 64]).all()


def test_center_boxes():
    boxes = center_boxes(np.array([256, 256, 500, 1]), np.array([256, 400, 375, 1]))
    assert boxes.dtype == np.int32
    assert boxes.tolist() == [[16, 16, 224, 224], [16, 88, 224, 224], [86, 23, 328, 328], [0, 0, 1, 1]]
