"""Masks of a released per-GPU batch (128 images, 16 x 16 patches): ours, and one image after another in plain torch.

All draw the same distribution, another step at each call. `loop` is our plain writing of the released algorithm, and
`released` the released collator itself, which always truncates and also stacks the images. Both draw the `reference`
sampler only; there is nothing to compare `corrected` with.
"""
import itertools
from pathlib import Path

import pytest
import torch

from bench.baselines.naive_masks import naive_masks, truncate
from bench.baselines.released import importable
from bench.harness.compare import Case, NotRun, Variant
from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, MultiBlockMasks

IMAGES, GRID = 128, 16


def check_ours(masks: MultiBlockMasks) -> None:
    """No context sees a target, and tokens are counted right."""
    context, target, context_of, _ = masks.sample(0, 0, IMAGES)
    check(*(patches_of(packed) for packed in (context, target)))
    assert masks.count_targets(0) == len(target.indices)
    assert context_of.equal(target.image)


def patches_of(packed) -> torch.Tensor:
    """bool [IMAGES, patches], those that the sequences of each image name."""
    seen = torch.zeros(IMAGES, GRID * GRID, dtype=torch.bool)
    seen[packed.image.repeat_interleave(packed.cu_seqlens.diff()).long(), packed.indices.long()] = True
    return seen


def check(visible: torch.Tensor, hidden: torch.Tensor) -> None:
    assert not (visible & hidden).any(), "a context sees a target"
    assert (visible.any(1) & hidden.any(1)).all(), "an image has no context, or no target"


def check_loop(drawn: tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]) -> None:
    seen = torch.zeros(2, IMAGES, GRID * GRID, dtype=torch.bool)
    for side, of_images in zip(seen, drawn, strict=True):
        for image, indices in enumerate(of_images):
            side[image, torch.cat(indices)] = True
    check(*seen)


def masks_case(sampler: str, collate: str, checkout: Path | None) -> Case:
    masks = MultiBlockMasks(MaskConfig(sampler=sampler, collate=collate), GRID, seed=0, global_batch=IMAGES)

    def ours():
        steps = itertools.count()

        def call() -> Masks:
            return masks.sample(next(steps), 0, IMAGES)

        return call

    def loop():
        if sampler != "reference":
            raise NotRun("the loop draws the reference sampler only")
        generator = torch.Generator().manual_seed(0)

        def call() -> None:
            contexts, targets = naive_masks(generator, GRID, IMAGES)
            if collate == "truncate":
                truncate(contexts), truncate(targets)

        return call

    def gate_loop() -> None:
        loop()
        check_loop(naive_masks(torch.Generator().manual_seed(0), GRID, IMAGES))

    def released():
        if (sampler, collate) != ("reference", "truncate"):
            raise NotRun("draws the reference sampler and truncates, and nothing else")
        if checkout is None:
            raise NotRun("needs --released CHECKOUT")
        with importable(checkout):
            from src.masks.multiblock import MaskCollator
        rules = MaskConfig()
        collate_batch = MaskCollator(
            input_size=(GRID, GRID),
            patch_size=1,
            enc_mask_scale=rules.context_scale,
            pred_mask_scale=rules.target_scale,
            aspect_ratio=rules.target_aspect,
            nenc=rules.num_contexts,
            npred=rules.num_targets,
            min_keep=rules.min_keep,
            allow_overlap=rules.allow_overlap,
        )
        images = [torch.zeros(())] * IMAGES  # which it stacks: as small as images can be
        return lambda: collate_batch(images)

    def gate_released() -> None:
        contexts, targets = ([m.unbind() for m in masks] for masks in released()()[1:])
        check_loop((list(zip(*contexts, strict=True)), list(zip(*targets, strict=True))))

    return Case(
        {
            "ours": Variant(ours, gate=lambda: check_ours(masks)),
            "loop": Variant(loop, gate=gate_loop),
            "released": Variant(released, gate=gate_released),
        },
        {"images": IMAGES, "grid": GRID},
        torch.int32,
        host=True,
        seconds=1.0,
        note=lambda seconds: {"us/image": 1e6 * seconds / IMAGES},
    )


@pytest.mark.quick
@pytest.mark.parametrize("provider", ["ours", "loop", "released"])
@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("sampler", ["reference", "corrected"])
def test_bench_masks(bench, sampler, collate, provider):
    bench(lambda: masks_case(sampler, collate, bench.released))
