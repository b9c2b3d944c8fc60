"""Order and crop boxes: functions of (seed, epoch, sample), drawn from the distribution of RandomResizedCrop."""
import math

import numpy as np
import pytest

from ijepa_fast.data.order import BLOCK, WINDOW, FullOrder, KeyedPermutation, ShardOrder
from ijepa_fast.data.sampler import GlobalBatchSampler, center_boxes, crop_boxes
from ijepa_fast.errors import UserError

SHUFFLES = ["full", "shards"]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize(("images", "batch"), [(1, 1), (7, 7), (103, 10), (64, 16), (1000, 3), (40_001, 8000)])
def test_an_epoch_is_a_permutation_cut_after_the_last_whole_batch(images, batch, shuffle):
    sampler = GlobalBatchSampler(images, batch, seed=3, shuffle=shuffle)
    assert sampler.steps_per_epoch == images // batch
    for epoch in (0, 5):
        first = epoch * sampler.steps_per_epoch
        ids = np.concatenate([sampler.ids(step) for step in range(first, first + sampler.steps_per_epoch)])
        assert ids.dtype == np.int64
        assert ids.shape == (images // batch * batch,)
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() >= 0
        assert ids.max() < images


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 31, 1000, 4096, 4097, 100_003])
def test_the_keyed_permutation_is_a_bijection(n):
    for key in range(3):
        assert np.array_equal(np.sort(KeyedPermutation(n, (key,))(np.arange(n))), np.arange(n))


def rank_correlation(a, b):
    return np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_orders_of_epochs_and_seeds_have_nothing_in_common(shuffle):
    n = 200_000
    order = FullOrder if shuffle == "full" else ShardOrder
    orders = [np.arange(n)]
    orders += [order(n, seed).ids(epoch, np.arange(n)) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))]
    # Spearman's rho of independent orders has standard deviation 1 / sqrt(n); with blocks, one over their number.
    limit = 5 / math.sqrt(n if shuffle == "full" else n // BLOCK)
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(rank_correlation(a, b)) < limit
            if shuffle == "full":
                # Neighbours in one order are nowhere near each other in another: lag-1 correlation.
                assert abs(np.corrcoef(a[np.argsort(b)][:-1], a[np.argsort(b)][1:])[0, 1]) < limit


def test_places_of_images_are_uniform():
    n, steps = 1 << 16, 16
    order = FullOrder(n, 5)
    for epoch in range(4):
        table = np.zeros((steps, steps))
        ids = order.ids(epoch, np.arange(n))
        np.add.at(table, (np.arange(n) * steps // n, ids * steps // n), 1)
        # 225 degrees of freedom: mean 225, standard deviation 21.
        chi = ((table - n / steps**2) ** 2).sum() / (n / steps**2)
        assert abs(chi - 225) < 5 * 21.3


def test_shards_read_few_regions_at_a_time_and_mix_them():
    n = BLOCK * 400
    ids = ShardOrder(n, 0).ids(3, np.arange(n))
    reach = BLOCK * WINDOW
    for first in range(0, n - 2 * reach, reach):
        regions = np.unique(ids[first : first + reach] // BLOCK)
        assert len(regions) == WINDOW
        batch = np.unique(ids[first : first + 2048] // BLOCK)
        assert len(batch) == WINDOW  # a batch of 2048 sees every region of its window
        assert abs(rank_correlation(ids[first : first + reach // 2], np.arange(reach // 2))) < 0.1


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_part_of_an_epoch_is_the_same_alone(shuffle):
    order = (FullOrder if shuffle == "full" else ShardOrder)(50_000, 1)
    whole = order.ids(7, np.arange(50_000))
    for first, last in ((0, 1), (16_000, 17_000), (49_999, 50_000)):
        assert np.array_equal(order.ids(7, np.arange(first, last)), whole[first:last])


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
    assert GlobalBatchSampler(10, 10, seed=0).ids(0).tolist() == [2, 5, 4, 9, 0, 8, 7, 6, 1, 3]
    assert GlobalBatchSampler(1000, 4, seed=0, shuffle="shards").ids(0).tolist() == [7, 74, 111, 704]


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
