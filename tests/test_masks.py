"""The masks against a plain per-image implementation, in distribution, and against their own rules, exactly."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baselines.naive_masks import block_size, naive_masks
from ijepa_fast.config import MaskConfig
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks, check_masks

# Statistical comparisons allow this many standard errors. Seeds are fixed, so a pass stays a pass; for a correct
# sampler, about one of 15,000 comparisons would have failed when the seeds were first tried.
SIGMAS = 4.0


def sequences(packed):
    """One int array a sequence."""
    return np.split(packed.indices.numpy(), packed.cu_seqlens.numpy()[1:-1])


def lengths(packed):
    return packed.cu_seqlens.diff().numpy()


def shown(packed, grid):
    """Which patches each sequence holds: bool [S, grid, grid]."""
    out = np.zeros((len(packed.image), grid * grid), bool)
    out[np.repeat(np.arange(len(out)), lengths(packed)), packed.indices.numpy()] = True
    return out.reshape(-1, grid, grid)


def block_shapes(packed, grid):
    """(height, width) of each sequence that is a whole block."""
    blocks = shown(packed, grid)
    return list(zip(blocks.any(2).sum(1).tolist(), blocks.any(1).sum(1).tolist(), strict=True))


def assert_frequencies(found, expected):
    """`found`: a list of outcomes; `expected`: their exact probabilities."""
    counts, total = Counter(found), len(found)
    assert counts.keys() <= expected.keys()
    for outcome, p in expected.items():
        error = math.sqrt(p * (1 - p) / total) + 1 / total
        assert abs(counts[outcome] / total - p) < SIGMAS * error, (outcome, counts[outcome] / total, p)


def assert_same_mean(ours, naive):
    """Rows are independent draws. Every column's mean is the same but for sampling error."""
    ours, naive = np.asarray(ours, float), np.asarray(naive, float)
    error = np.sqrt(ours.var(0) / len(ours) + naive.var(0) / len(naive))
    assert (np.abs(ours.mean(0) - naive.mean(0)) <= SIGMAS * error).all(), (ours.mean(0), naive.mean(0), error)


# The released distribution


@pytest.mark.parametrize("grid", [14, 16, 28])
def test_reference_draws_block_sizes_with_the_released_probabilities(grid):
    draws, steps = (np.arange(50_000) + 0.5) / 50_000, 2000
    masks = MultiBlockMasks(MaskConfig(allow_overlap=True, collate="ragged"), grid, seed=1, global_batch=1)
    drawn = [masks.sample(step, 0, 1) for step in range(steps)]
    for part, scale, aspect in [("target", (0.15, 0.2), (0.75, 1.5)), ("context", (0.85, 1.0), (1.0, 1.0))]:
        exact = Counter(block_size(u, grid, scale, aspect) for u in draws)
        found = [block_shapes(getattr(m, part), grid)[0] for m in drawn]
        assert_frequencies(found, {size: count / len(draws) for size, count in exact.items()})


def test_reference_draws_context_sizes_independently_of_target_sizes():
    config, steps = MaskConfig(allow_overlap=True, collate="ragged", context_scale=(0.3, 1.0)), 1000
    masks = MultiBlockMasks(config, 16, seed=18, global_batch=1)
    areas = [[lengths(packed)[0] for packed in masks.sample(step, 0, 1)[:2]] for step in range(steps)]
    assert abs(np.corrcoef(areas, rowvar=False)[0, 1]) < SIGMAS / math.sqrt(steps)


def test_reference_places_blocks_uniformly_off_the_last_row_and_column():
    grid, side = 8, 3  # 0.15 of 64 patches: 9
    config = MaskConfig(target_scale=(0.15, 0.15), target_aspect=(1.0, 1.0), min_keep=0, collate="ragged")
    masks = MultiBlockMasks(config, grid, seed=2, global_batch=2000).sample(0, 0, 2000)
    corners = [divmod(int(block[0]), grid) for block in sequences(masks.target)]
    places = list(product(range(grid - side), repeat=2))
    assert_frequencies(corners, {place: 1 / len(places) for place in places})
    assert set(block_shapes(masks.target, grid)) == {(side, side)}


def test_reference_agrees_with_the_plain_loop_in_lengths_and_coverage():
    grid, images, steps, naive_steps = 16, 24, 600, 150
    masks = MultiBlockMasks(MaskConfig(collate="ragged"), grid, seed=3, global_batch=images)
    drawn = [masks.sample(step, 0, images) for step in range(steps)]
    generator = torch.Generator().manual_seed(3)
    naive = [naive_masks(generator, grid, images) for _ in range(naive_steps)]

    def statistics(full, cut, target, visible, predicted):
        """Lengths, then tokens an image by row and by column, of context and target."""
        spread = [m.mean(0).sum(axis) for m in (visible, predicted) for axis in (1, 0)]
        return np.concatenate([[full, cut, target], *spread])

    ours = [
        statistics(
            lengths(m.context).mean(), lengths(m.context).min(), lengths(m.target).mean(),
            shown(m.context, grid), shown(m.target, grid),
        )
        for m in drawn
    ]  # fmt: skip

    def planes(per_image):
        out = np.zeros((images, len(per_image[0]), grid * grid))
        for i, j in product(range(images), range(len(per_image[0]))):
            out[i, j, per_image[i][j].numpy()] = 1
        return out.reshape(-1, grid, grid)

    plain = []
    for contexts, targets in naive:
        size = [len(context) for (context,) in contexts]
        plain.append(statistics(np.mean(size), min(size), len(targets[0][0]), planes(contexts), planes(targets)))
    assert_same_mean(ours, plain)


@pytest.mark.parametrize(
    ("grid", "group", "cut", "full", "target"), [(16, 128, 69, 112, 43), (28, 32, 257, 357, 135), (14, 16, 61, 83, 33)]
)
def test_mean_lengths_are_those_of_the_released_collator(grid, group, cut, full, target):
    """Context tokens kept by `truncate` and by `ragged`, and target tokens, as measured on the released collator.

    5 %: images of a step share their block sizes, so means of single steps scatter by 6 to 15 %, and the figures are
    from a limited number of steps. The tests above are the sharp ones; this one is about what users see.
    """
    steps = 400
    means = {}
    for collate in ("truncate", "ragged"):
        masks = MultiBlockMasks(MaskConfig(collate=collate, group=group), grid, seed=4, global_batch=group)
        drawn = [masks.sample(step, 0, group) for step in range(steps)]
        means[collate] = np.mean([lengths(m.context).mean() for m in drawn])
        assert np.mean([lengths(m.target).mean() for m in drawn]) == pytest.approx(target, rel=0.05)
    assert means["truncate"] == pytest.approx(cut, rel=0.05)
    assert means["ragged"] == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("min_keep", [6, 10])
def test_relaxation_agrees_with_the_plain_loop(min_keep):
    """Targets that leave too little of many contexts: how often each is let in again is part of the distribution."""
    grid, images, naive_images = 7, 3000, 300
    sizes = dict(target_scale=(0.35, 0.35), target_aspect=(1.0, 1.0), context_scale=(0.5, 0.5))
    rules = dict(num_targets=5, min_keep=min_keep, **sizes)  # one size each, so that images are independent draws
    masks = MultiBlockMasks(MaskConfig(collate="ragged", **rules), grid, 5, images).sample(0, 0, images)
    assert lengths(masks.context).min() > rules["min_keep"]
    hit = (shown(masks.context, grid)[masks.context_of.numpy()] & shown(masks.target, grid)).any((1, 2))
    ours = np.column_stack([hit.reshape(images, -1), lengths(masks.context)])
    assert 0.02 < ours[:, 1].mean() < ours[:, 4].mean() < 0.98  # contexts were relaxed by one target and by more

    plain = []
    contexts, targets = naive_masks(torch.Generator().manual_seed(5), grid, naive_images, **rules)
    for (context,), blocks in zip(contexts, targets, strict=True):
        plain.append([*(bool(torch.isin(block, context).any()) for block in blocks), len(context)])
    assert_same_mean(ours, plain)


# The corrected distribution


def test_corrected_draws_scale_and_aspect_independently_for_every_block():
    grid, images, points = 10, 3000, 700
    config = MaskConfig(sampler="corrected", collate="ragged", target_scale=(0.15, 0.3))
    masks = MultiBlockMasks(config, grid, seed=6, global_batch=images)
    found = block_shapes(masks.sample(0, 0, images).target, grid)
    u = (np.arange(points) + 0.5) / points
    exact = Counter()
    for area, count in Counter(int(grid * grid * (0.15 + 0.15 * x)) for x in u).items():
        for ratio in 0.75 + 0.75 * u:
            exact[round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))] += count
    assert_frequencies(found, {size: count / points**2 for size, count in exact.items()})
    assert len(set(found[:4])) > 1  # blocks of one image differ


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
def test_last_row_and_column_are_reached_by_corrected_only(sampler):
    grid, images = 8, 600
    config = MaskConfig(sampler=sampler, collate="ragged", target_scale=(0.25, 1.0), num_targets=1, allow_overlap=True)
    masks = MultiBlockMasks(config, grid, seed=7, global_batch=images).sample(0, 0, images)
    for packed in masks[:2]:
        covered = shown(packed, grid).any(0)
        assert covered[:-1, :-1].all()
        edge = np.concatenate([covered[-1], covered[:, -1]])
        assert edge.all() if sampler == "corrected" else not edge.any()
    tallest = max(height for height, _ in block_shapes(masks.target, grid))
    assert tallest == grid if sampler == "corrected" else tallest < grid


# The rules, exactly


@st.composite
def cases(draw):
    """(config, grid, global batch) of every kind, small enough to be quick."""
    grid = draw(st.integers(4, 9))
    collate = draw(st.sampled_from(["truncate", "ragged"]))
    low = draw(st.floats(0.15, 0.4))
    aspect = draw(st.floats(0.5, 1.5))
    config = MaskConfig(
        sampler=draw(st.sampled_from(["reference", "corrected"])),
        collate=collate,
        group=draw(st.integers(1, 12)),
        views=draw(st.integers(1, 2)),
        num_contexts=draw(st.integers(1, 2)),
        num_targets=draw(st.integers(1, 5)),
        min_keep=draw(st.integers(0, 1)),
        max_keep=draw(st.none() | st.integers(2, 30)) if collate == "ragged" else None,
        target_scale=(low, low + draw(st.floats(0, 0.2))),
        target_aspect=(aspect, aspect + draw(st.floats(0, 0.5))),
        context_scale=(0.6, draw(st.floats(0.6, 1.0))),
        allow_overlap=draw(st.booleans()),
    )
    try:
        check_masks(config, grid)
    except UserError:  # a block of a single patch
        config = config.model_copy(update={"min_keep": 0})
    return config, grid, draw(st.integers(1, 12))


@given(cases(), st.integers(0, 10**6), st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_rules_hold_for_any_config(case, step, data):
    config, grid, batch = case
    masks = MultiBlockMasks(config, grid, seed=8, global_batch=batch)
    whole = masks.sample(step, 0, batch)
    context, target, context_of, covered = whole

    contexts, targets = batch * config.views * config.num_contexts, config.num_targets
    assert len(context.image) == contexts
    assert len(target.image) == len(context_of) == contexts * targets
    assert context.image.tolist() == np.repeat(np.arange(batch), contexts // batch).tolist()
    assert context_of.tolist() == np.repeat(np.arange(contexts), targets).tolist()
    assert target.image.tolist() == context.image[context_of].tolist()
    for packed in (context, target):
        assert {tensor.dtype for tensor in (*packed[:3], context_of)} == {torch.int32}
        assert packed.cu_seqlens[0] == 0
        assert packed.cu_seqlens[-1] == len(packed.indices)
        assert config.min_keep < lengths(packed).min() <= lengths(packed).max() <= packed.max_seqlen <= grid * grid
        for sequence in sequences(packed):
            assert (np.diff(sequence) > 0).all()
            assert 0 <= sequence[0] <= sequence[-1] < grid * grid
    # Every context of a view comes with the same targets.
    blocks = shown(target, grid).reshape(batch, config.views, config.num_contexts, targets, -1)
    assert (blocks == blocks[:, :, :1]).all()
    assert masks.count_targets(step) == len(target.indices)
    # Each covered patch once, and every token of a target block found among them.
    tokens = np.repeat(target.image.numpy(), lengths(target)) * grid**2 + target.indices.numpy()
    assert covered.rows.tolist() == np.unique(tokens).tolist()
    assert covered.rows[covered.target].tolist() == tokens.tolist()
    assert (covered.rows.dtype, covered.target.dtype) == (torch.int64, torch.int32)

    start = data.draw(st.integers(0, batch - 1))
    stop = data.draw(st.integers(start + 1, batch))
    parts = [masks.sample(step, *span) for span in [(0, start), (start, stop), (stop, batch)] if span[0] < span[1]]
    assert np.concatenate([p.context.indices for p in parts]).tolist() == context.indices.tolist()
    assert np.concatenate([p.target.indices for p in parts]).tolist() == target.indices.tolist()
    assert np.concatenate([lengths(p.context) for p in parts]).tolist() == lengths(context).tolist()
    assert np.concatenate([lengths(p.target) for p in parts]).tolist() == lengths(target).tolist()
    assert all(p.context.image[0] == 0 and p.context.max_seqlen == context.max_seqlen for p in parts)


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
@pytest.mark.parametrize("views", [1, 2])
def test_truncate_keeps_the_first_tokens_of_what_ragged_draws(sampler, views):
    grid, batch, group = 12, 22, 8
    rules = dict(sampler=sampler, group=group, views=views, num_contexts=2)
    cut = MultiBlockMasks(MaskConfig(collate="truncate", **rules), grid, 9, batch).sample(3, 0, batch)
    full = MultiBlockMasks(MaskConfig(collate="ragged", **rules), grid, 9, batch).sample(3, 0, batch)
    kept = []
    for part in ("context", "target"):
        cut_rows, full_rows = sequences(getattr(cut, part)), sequences(getattr(full, part))
        groups = getattr(full, part).image.numpy() // group
        for g in range(math.ceil(batch / group)):
            members = np.flatnonzero(groups == g)
            shortest = min(len(full_rows[s]) for s in members)
            kept.append(shortest)
            for s in members:
                assert cut_rows[s].tolist() == full_rows[s][:shortest].tolist()
    assert len(set(kept[:3])) > 1  # groups differ, or the test would pass with one cut for all


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
@pytest.mark.parametrize("allow_overlap", [False, True])
def test_contexts_hold_no_target_unless_overlap_is_allowed(sampler, allow_overlap):
    grid, images = 14, 64
    config = MaskConfig(sampler=sampler, collate="ragged", num_contexts=2, views=2, allow_overlap=allow_overlap)
    masks = MultiBlockMasks(config, grid, seed=10, global_batch=images).sample(0, 0, images)
    contexts, targets = shown(masks.context, grid), shown(masks.target, grid)
    overlap = (contexts[masks.context_of.numpy()] & targets).any((1, 2))
    assert overlap.mean() > 0.9 if allow_overlap else not overlap.any()
    hidden = targets.reshape(-1, config.num_targets, grid, grid).any(1)
    for s, context in enumerate(contexts):  # and a context is otherwise the whole of its block
        rows, columns = context.any(1).nonzero()[0], context.any(0).nonzero()[0]
        box = np.zeros((grid, grid), bool)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert (context == (box if allow_overlap else box & ~hidden[s])).all()


def test_views_and_images_and_steps_differ():
    config = MaskConfig(collate="ragged", views=2)
    masks = MultiBlockMasks(config, 16, seed=11, global_batch=8)
    drawn = [sequence.tobytes() for step in range(3) for sequence in sequences(masks.sample(step, 0, 8).context)]
    drawn += [s.tobytes() for s in sequences(MultiBlockMasks(config, 16, 12, 8).sample(0, 0, 8).context)]
    assert len(set(drawn)) == len(drawn) == 4 * 16


def test_max_keep_keeps_a_random_subset_without_favouring_a_row():
    grid, images, max_keep = 12, 1500, 30
    rules = dict(collate="ragged", num_contexts=2)
    full = MultiBlockMasks(MaskConfig(**rules), grid, 13, images).sample(0, 0, images).context
    thin = MultiBlockMasks(MaskConfig(max_keep=max_keep, **rules), grid, 13, images).sample(0, 0, images).context
    assert thin.max_seqlen == max_keep
    assert lengths(thin).tolist() == np.minimum(lengths(full), max_keep).tolist()
    assert (lengths(full) <= max_keep).any()  # some are short enough already
    every, kept = shown(full, grid), shown(thin, grid)
    assert not (kept & ~every).any()
    # Of a row's tokens a context keeps the same share as of all its tokens, on average.
    share = (lengths(thin) / lengths(full))[:, None]
    surplus = kept.sum(2) - every.sum(2) * share
    error = surplus.std(0) / math.sqrt(len(surplus))
    assert (np.abs(surplus.mean(0)) <= SIGMAS * error).all()


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
def test_max_seqlen_is_the_largest_block_that_can_be_drawn(sampler):
    grid = 8
    rules = dict(context_scale=(0.85, 0.99), target_scale=(0.25, 0.49), num_targets=2, allow_overlap=True)
    masks = MultiBlockMasks(MaskConfig(sampler=sampler, collate="ragged", **rules), grid, seed=14, global_batch=4)
    drawn = [masks.sample(step, 0, 4) for step in range(600)]
    for part in ("context", "target"):
        bounds = {getattr(m, part).max_seqlen for m in drawn}
        assert bounds == {max(lengths(getattr(m, part)).max() for m in drawn)}


def test_wide_grids_do_not_overflow_the_narrow_integers():
    for grid in (254, 255, 256):
        rules = dict(context_scale=(0.5, 0.501), target_scale=(0.998, 1.0), num_targets=1, allow_overlap=True)
        masks = MultiBlockMasks(MaskConfig(sampler="corrected", collate="ragged", **rules), grid, 15, 8).sample(0, 0, 8)
        for packed in masks[:2]:
            for block, (height, width) in zip(shown(packed, grid), block_shapes(packed, grid), strict=True):
                assert block.sum() == height * width


@pytest.mark.parametrize(
    ("rules", "context", "target"),
    [
        (dict(), [0, 1, 4, 6, 7, 10, 12, 13, 16, 18, 19, 20, 21, 22, 24, 25, 26, 27, 28], [2, 3, 8, 9, 14, 15]),
        (dict(sampler="corrected", max_keep=9), [3, 6, 7, 8, 14, 28, 30, 32, 35], [9, 10, 15, 16, 21, 22]),
    ],
)
def test_masks_are_a_function_of_seed_step_and_position(rules, context, target):
    """The same numbers for ever: a run resumed with a later version goes on with the masks it would have had."""
    config = MaskConfig(collate="ragged", num_targets=1, min_keep=3, **rules)
    masks = MultiBlockMasks(config, 6, seed=2026, global_batch=4).sample(7, 2, 3)
    assert masks.context.indices.tolist() == context
    assert masks.target.indices.tolist() == target


# Errors


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"min_keep": 30}, "mask.min_keep=30 cannot be met: a target block .* on a grid of 14 x 14 patches"),
        ({"context_scale": (0.05, 0.3)}, "mask.min_keep=10 cannot be met: a context block .* draws blocks of 3 x 3"),
        ({"max_keep": 10, "collate": "ragged"}, "mask.max_keep=10 must be more than mask.min_keep=10"),
        ({"target_scale": (0.001, 0.2), "min_keep": 0}, "draws blocks of 0 x 0"),
    ],
)
def test_what_cannot_be_met_is_refused_at_once(sampler, change, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        MultiBlockMasks(MaskConfig(sampler=sampler, **change), 14, seed=0, global_batch=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", ["reference", "corrected"])
def test_refuses_exactly_the_min_keep_of_the_smallest_block(sampler):
    """A bound that errs on either side would refuse released configs or loop until it gives up."""
    grid = 9
    config = MaskConfig(sampler=sampler, collate="ragged", allow_overlap=True, min_keep=0)
    masks = MultiBlockMasks(config, grid, seed=16, global_batch=16)
    smallest = min(int(lengths(masks.sample(step, 0, 16).target).min()) for step in range(500))
    check_masks(config.model_copy(update={"min_keep": smallest - 1}), grid)
    with pytest.raises(UserError):
        check_masks(config.model_copy(update={"min_keep": smallest}), grid)


def test_the_tightest_min_keep_ends_and_is_met():
    """Targets over nearly the whole grid: only the last round, which hides nothing, leaves a context."""
    config = MaskConfig(num_targets=6, target_scale=(0.8, 0.9), context_scale=(0.85, 0.85), min_keep=12, group=16)
    context, *_ = MultiBlockMasks(config, 5, seed=17, global_batch=16).sample(0, 0, 16)
    assert lengths(context).tolist() == [16] * 16


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_positions_outside_the_global_batch_are_refused(start, stop):
    masks = MultiBlockMasks(MaskConfig(), 14, seed=0, global_batch=4)
    with pytest.raises(ValueError, match="global batch of 4"):
        masks.sample(0, start, stop)
