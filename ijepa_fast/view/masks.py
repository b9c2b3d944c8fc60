"""What a step sees: its real crops, and of each the patches that the context encoder is shown and the target blocks.

`python -m ijepa_fast.view masks --config configs/demo.yaml`
"""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ijepa_kernels import Packed
from PIL import Image
from torch import Tensor

from ijepa_fast.config import MaskConfig, load_config
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.errors import UserError
from ijepa_fast.masks import Masks, MultiBlockMasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dark, so that what is hidden can sink into it, and one file serves light and dark pages.
_PAPER, _VEIL, _INK, _FAINT = "#12161c", "#1b212a", "#f2f4f7", "#93a0b0"
_TARGET_COLOURS = ("#ffb000", "#3fc1c9", "#fe6f9c", "#9d8cff", "#8fd14f", "#ff8552")
_PANEL, _GAP, _CAPTION, _MARGIN, _HEADER = 224, 14, 26, 36, 128  # pixels
_DPI = 144


def masks_sheet(
    images: Tensor | np.ndarray, masks: Masks, patch_size: int, out_path: str | Path, title: str, *, rows: int = 8
) -> Path:
    """Write a PNG of the first `rows` context sequences: the crop, its visible patches, and every target block.

    `images`: uint8 `[B, S, S, 3]`; `masks`: of these images, as `MultiBlockMasks` lists them (both on any device);
    `title`: one line. Returns `out_path`.
    """
    # Imported here: matplotlib takes a second, which the first step of a run need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, grid = images.shape[1], images.shape[1] // patch_size
    contexts, targets = _visible(masks.context, grid), _visible(masks.target, grid)
    context_of, rows = masks.context_of.cpu().numpy(), min(rows, len(contexts))
    targets_of = [targets[context_of == row] for row in range(rows)]

    cell = max(_PANEL // grid, 1)  # whole pixels a patch, so that every edge is sharp
    panel, columns = cell * grid, 2 + max(map(len, targets_of))
    lefts = [_MARGIN + column * (panel + _GAP) for column in range(columns)]
    tops = [_HEADER + row * (panel + _CAPTION + _GAP) for row in range(rows)]
    width, height = lefts[-1] + panel + _MARGIN, tops[-1] + panel + _CAPTION + _MARGIN // 2
    # Pixels are inches * dpi rounded down, hence the thousandth.
    figure = Figure(figsize=((width + 1e-3) / _DPI, (height + 1e-3) / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    sheet = figure.add_axes((0, 0, 1, 1))

    names = ["crop", "context", *(f"target {i + 1}" for i in range(columns - 2))]
    colours = [_INK, _INK, *itertools.islice(itertools.cycle(_TARGET_COLOURS), columns - 2)]
    points = min(12.5, (width - 2 * _MARGIN) / (1.4 * len(title)))  # a bold character is about 1.4 pixels a point wide
    sheet.text(_MARGIN, 22, title, color=_INK, fontsize=points, fontweight="bold", va="top")
    facts = f"{size} x {size} pixels in {grid} x {grid} patches; what a panel does not hold is dimmed"
    sheet.text(_MARGIN, 56, facts, color=_FAINT, fontsize=min(8.5, points), va="top")
    for left, name, colour in zip(lefts, names, colours, strict=True):
        sheet.text(left, _HEADER - 9, name, color=colour, fontsize=9.5, fontweight="bold", va="bottom")

    canvas = np.full((height, width, 3), _rgb(_PAPER), np.uint8)
    for row, top in enumerate(tops):
        image = int(masks.context.image[row])
        pixels = np.asarray(images[image].cpu() if isinstance(images, Tensor) else images[image])
        crop = np.asarray(Image.fromarray(pixels).resize((panel, panel), Image.Resampling.LANCZOS))
        panels = [np.ones_like(contexts[row]), contexts[row], *targets_of[row]]
        for left, visible in zip(lefts, panels, strict=False):
            canvas[top : top + panel, left : left + panel] = _dim(crop, visible)
            kept = f"{visible.sum()} of {grid * grid} tokens" if left > lefts[0] else _name(masks.context.image, row)
            sheet.text(left, top + panel + 6, kept, color=_FAINT, fontsize=7.5, va="top")
        for block, left, colour in zip(targets_of[row], lefts[2:], colours[2:], strict=False):
            _outline(sheet, block, left, top, cell, colour, width=1.0)
            _outline(sheet, block, lefts[1], top, cell, colour, width=0.5)  # why the context has its holes
        _outline(sheet, contexts[row], lefts[1], top, cell, _INK, width=1.0)

    sheet.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest")
    sheet.set(xlim=(0, width), ylim=(height, 0))
    sheet.axis("off")
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_path, dpi=_DPI, format="png")
    return Path(out_path)


def masks_title(config: MaskConfig, step: int) -> str:
    """The heading of a sheet: which step it is of, and how its masks were drawn and collated."""
    cut = f"truncated within groups of {config.group}" if config.collate == "truncate" else "ragged"
    if config.max_keep is not None:
        cut += f", contexts of {config.max_keep} tokens at most"
    return f"Masks of step {step}: {config.sampler} sampler, {cut}"


def _visible(packed: Packed, grid: int) -> np.ndarray:
    """Which patches each sequence holds: bool [S, grid, grid]."""
    cu_seqlens = packed.cu_seqlens.cpu().numpy()
    out = np.zeros((len(cu_seqlens) - 1, grid * grid), bool)
    out[np.repeat(np.arange(len(out)), np.diff(cu_seqlens)), packed.indices.cpu().numpy()] = True
    return out.reshape(-1, grid, grid)


def _name(image: Tensor, row: int) -> str:
    """What the crop of context sequence `row` is called."""
    same = (image == image[row]).nonzero().flatten().tolist()
    return f"image {image[row]}" + (f", context {same.index(row) + 1} of {len(same)}" if len(same) > 1 else "")


def _dim(crop: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """`crop` [panel, panel, 3] with the patches that are not visible grey and nearly gone."""
    cell = len(crop) // len(visible)
    grey = crop @ np.array([0.299, 0.587, 0.114])
    ghost = 0.8 * _rgb(_VEIL) + 0.2 * grey[..., None]
    shown = visible.repeat(cell, axis=0).repeat(cell, axis=1)[..., None]
    return np.where(shown, crop, ghost).astype(np.uint8)


def _outline(sheet: "Axes", visible: np.ndarray, left: int, top: int, cell: int, colour: str, width: float) -> None:
    """Draw the border between visible and other patches."""
    from matplotlib.collections import LineCollection

    padded = np.pad(visible, 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])  # horizontal edges: above cell (row, column)
    lines = [((x, y), (x + 1, y)) for y, x in zip(row, column, strict=True)]
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])  # vertical edges: left of it
    lines += [((x, y), (x, y + 1)) for y, x in zip(row, column, strict=True)]
    pixels = list(np.array(lines, float).reshape(-1, 2, 2) * cell + (left, top))
    sheet.add_collection(
        LineCollection(pixels, colors=colour, linewidths=width, capstyle="projecting", antialiased=False, zorder=2)
    )


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def add_command(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    masks = pictures.add_parser(
        "masks",
        help="crops of a step, with their context and target blocks",
        description="Draw a contact sheet of crops of one step, exactly as a run of this config sees them: each crop, "
        "the patches that the context encoder is shown, and each of the target blocks that are predicted.",
        epilog="Example: python -m ijepa_fast.view masks --config configs/vith14_in1k.yaml --images 4 "
        "data.root=PHOTOGRAPHS optim.global_batch_size=128 mask.collate=ragged",
    )
    masks.add_argument("--config", required=True, metavar="YAML", help="a config of ours, or a released I-JEPA one")
    masks.add_argument("--out", default="masks.png", type=Path, metavar="PNG", help="default: masks.png")
    masks.add_argument("--images", default=8, type=int, metavar="N", help="at most a global batch; default: 8")
    masks.add_argument("--step", default=0, type=int, metavar="N", help="step of the run, from 0; default: 0")
    masks.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    masks.set_defaults(draw=_draw)


def _draw(args: argparse.Namespace, rest: list[str]) -> None:
    if args.images < 1 or args.step < 0:
        raise UserError(f"--images must be at least 1 and --step at least 0, not {args.images} and {args.step}")
    config, notes = load_config(args.config, [*args.overrides, *rest])
    for note in notes:
        print(f"released config: {note}")
    batch = config.optim.global_batch_size
    images = min(args.images, batch)
    masks = MultiBlockMasks(config.mask, config.grid, config.train.seed, batch)
    with build_pipeline(config.data, masks, micro_batch=images, prefetch=1) as data:
        first = next(data.loader.batches(args.step, args.step + 1))
    title = masks_title(config.mask, args.step)
    rows = len(first.masks.context.image)
    try:
        print(masks_sheet(first.images, first.masks, config.model.patch_size, args.out, title, rows=rows))
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from None
