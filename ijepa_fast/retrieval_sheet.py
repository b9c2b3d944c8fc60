"""The picture of `retrieval`: context, hidden block, and what the predictor picked for it before and after."""
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ijepa_fast.retrieval import Questions

# Colours of the mask sheet, so that the pictures of a run look alike.
_PAPER, _VEIL, _INK, _FAINT = "#12161c", "#1b212a", "#f2f4f7", "#93a0b0"
_RIGHT, _NEAR, _WRONG = "#8fd14f", "#ffb000", "#fe6f9c"
_PANEL, _GAP, _MARGIN, _LABEL, _HEADER, _DPI = 112, 10, 28, 150, 104, 144  # pixels, but for the last


def retrieval_sheet(questions: Questions, before: Tensor, after: Tensor, patch_size: int, out_path: Path) -> Path:
    """Write a PNG with a column a photograph: of its first crop, the first hidden block. Nothing is picked by hand.

    `before`, `after`: picks as `retrieve` returns them, int64 `[C, P * B]`. Returns `out_path`.
    """
    # Imported here: matplotlib takes a second, which the first step of a run need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    crops, photographs, size = questions.crops.shape[:3]
    grid = size // patch_size
    cell = max(_PANEL // grid, 1)  # whole pixels a patch, so that every edge is sharp
    panel, images = cell * grid, questions.crops.flatten(0, 1)
    owner = questions.masks.target.image.tolist()
    blocks, contexts = questions.blocks(), questions.contexts()
    rows = ("it is shown", "hidden", "its pick before", "its pick after")
    tops = [_HEADER + row * (panel + _GAP) for row in range(len(rows))]
    lefts = [_LABEL + column * (panel + _GAP) for column in range(photographs)]
    width, height = lefts[-1] + panel + _MARGIN, tops[-1] + panel + _MARGIN

    # Pixels are inches * dpi rounded down, hence the thousandth.
    figure = Figure(figsize=((width + 1e-3) / _DPI, (height + 1e-3) / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    sheet = figure.add_axes((0, 0, 1, 1))
    canvas = np.full((height, width, 3), _rgb(_PAPER), np.uint8)
    for photograph, left in enumerate(lefts):
        question = owner.index(photograph)
        context = _shape(contexts[int(questions.masks.context_of[question])], grid)
        block = _shape(blocks[question], grid)
        crop = _enlarged(images[photograph], panel)
        picks = [int(picked[0, question]) for picked in (before, after)]
        panels = [_show(crop, context, cell), _show(crop, block, cell)]
        edges = [_INK, _INK]
        for pick in picks:
            pasted = np.where(_pixels(block, cell), _enlarged(images[pick], panel), crop)
            panels.append(_show(pasted, context | block, cell))
            edges.append(_RIGHT if pick == photograph else _NEAR if pick % photographs == photograph else _WRONG)
        patch_rows, patch_columns = np.nonzero(block)
        x, y = left + int(patch_columns.min()) * cell, int(patch_rows.min()) * cell
        across, down = (int(np.ptp(part) + 1) * cell for part in (patch_columns, patch_rows))
        for top, pixels, edge in zip(tops, panels, edges, strict=True):
            canvas[top : top + panel, left : left + panel] = pixels
            sheet.add_patch(Rectangle((x, top + y), across, down, fill=False, edgecolor=edge, linewidth=1.2))

    title = "What is behind the frame? The predictor picks one of the blocks of all crops, before and after pretraining"
    sheet.text(_MARGIN, 18, title, color=_INK, fontsize=min(11, width / 118), fontweight="bold", va="top")
    facts = f"one of {len(images)} blocks from {crops} crops of each of {photographs} photographs;  its pick is"
    line: dict[str, Any] = {"fontsize": min(7.5, width / 170), "va": "top"}
    end = sheet.text(_MARGIN, 54, facts, color=_FAINT, **line)
    meanings = ("the hidden block", _RIGHT), ("from the same photograph", _NEAR), ("from another photograph", _WRONG)
    for words, colour in meanings:
        end = sheet.annotate(
            words, xy=(1, 1), xycoords=end, xytext=(8, 0), textcoords="offset points", color=colour, **line
        )  # fmt: skip
    for row, top in zip(rows, tops, strict=True):
        sheet.text(_LABEL - 12, top + panel / 2, row, color=_INK, fontsize=7.5, ha="right", va="center")

    sheet.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest")
    sheet.set(xlim=(0, width), ylim=(height, 0))
    sheet.axis("off")
    temporary = out_path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=_DPI, format="png")
    os.replace(temporary, out_path)
    return out_path


def _shape(patches: Tensor, grid: int) -> np.ndarray:
    """Patch indices as bool `[grid, grid]`."""
    out = np.zeros(grid * grid, bool)
    out[patches.numpy()] = True
    return out.reshape(grid, grid)


def _pixels(shape: np.ndarray, cell: int) -> np.ndarray:
    return shape.repeat(cell, axis=0).repeat(cell, axis=1)[..., None]


def _enlarged(crop: Tensor, panel: int) -> np.ndarray:
    return np.asarray(Image.fromarray(crop.numpy()).resize((panel, panel), Image.Resampling.LANCZOS))


def _show(crop: np.ndarray, visible: np.ndarray, cell: int) -> np.ndarray:
    """`crop` where it is visible, nothing elsewhere."""
    return np.where(_pixels(visible, cell), crop, _rgb(_VEIL)).astype(np.uint8)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
