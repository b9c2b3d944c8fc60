"""Multi-block masks drawn the plain way: image by image and block by block, with torch, as the released collator does.

The reference for `ijepa_fast.masks`: of its distribution in the tests, of its speed in the benchmark. The two share no
code and no random numbers.
"""
import math

import torch


def block_size(u: float, grid: int, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
    """(height, width) for one random number in [0, 1), which fixes both the area and the shape."""
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, grid - 1), min(width, grid - 1)


def draw_block(generator: torch.Generator, grid: int, size: tuple[int, int]) -> torch.Tensor:
    """bool [grid, grid], True inside a block of `size` somewhere; the last row and column are never inside."""
    top = torch.randint(0, grid - size[0], (1,), generator=generator)
    left = torch.randint(0, grid - size[1], (1,), generator=generator)
    block = torch.zeros(grid, grid, dtype=torch.bool)
    block[top : top + size[0], left : left + size[1]] = True
    return block


def draw_context(
    generator: torch.Generator, grid: int, size: tuple[int, int], targets: list[torch.Tensor], min_keep: int
) -> torch.Tensor:
    """bool [grid, grid]: a block without the targets; each time 20 tries fail, the last target left is let in."""
    excluded = list(targets)
    while True:
        for _ in range(20):
            context = draw_block(generator, grid, size)
            for target in excluded:
                context &= ~target
            if int(context.sum()) > min_keep:
                return context
        excluded.pop()


def naive_masks(
    generator: torch.Generator,
    grid: int,
    images: int,
    *,
    context_scale: tuple[float, float] = (0.85, 1.0),
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    num_contexts: int = 1,
    num_targets: int = 4,
    min_keep: int = 10,
    allow_overlap: bool = False,
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """One batch: for each image its contexts, and for each its targets, as int64 patch indices in raster order."""
    target_size = block_size(torch.rand(1, generator=generator).item(), grid, target_scale, target_aspect)
    context_size = block_size(torch.rand(1, generator=generator).item(), grid, context_scale, (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(images):
        blocks = [draw_block(generator, grid, target_size) for _ in range(num_targets)]
        hidden = [] if allow_overlap else blocks
        shown = [draw_context(generator, grid, context_size, hidden, min_keep) for _ in range(num_contexts)]
        targets.append([block.flatten().nonzero().squeeze(1) for block in blocks])
        contexts.append([context.flatten().nonzero().squeeze(1) for context in shown])
    return contexts, targets


def truncate(masks: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Cut all to the shortest and stack: `[images, K]` for each of an image's masks, as `torch.gather` wants them."""
    shortest = min(len(mask) for of_image in masks for mask in of_image)
    return [torch.stack([mask[:shortest] for mask in column]) for column in zip(*masks, strict=True)]
