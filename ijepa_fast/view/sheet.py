"""A contact sheet: titled columns of equal panels on dark paper, drawn without matplotlib's global state.

Dark, so that what is hidden can sink into it, and one file serves light and dark pages.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ijepa_fast.errors import UserError

PAPER, VEIL, INK, FAINT = "#12161c", "#1b212a", "#f2f4f7", "#93a0b0"
COLOURS = ("#ffb000", "#3fc1c9", "#fe6f9c", "#9d8cff", "#8fd14f", "#ff8552")
PANEL, GAP, CAPTION, MARGIN, HEADER = 224, 14, 26, 36, 128  # pixels
_DPI = 144


class Sheet:
    """`rows` x `columns` panels of `panel` pixels a side; `save` writes the PNG.

    `title` is one bold line, `facts` a fainter one below it; `columns` the names above the panels, with their `colours`
    (all light where left out).
    """

    def __init__(
        self,
        title: str,
        facts: str,
        columns: Sequence[str],
        rows: int,
        *,
        panel: int = PANEL,
        colours: Sequence[str] | None = None,
    ):
        # Imported here: matplotlib takes a second, which the first step of a run need not wait for.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.panel = panel
        self.lefts = [MARGIN + column * (panel + GAP) for column in range(len(columns))]
        self.tops = [HEADER + row * (panel + CAPTION + GAP) for row in range(rows)]
        self.width, self.height = self.lefts[-1] + panel + MARGIN, self.tops[-1] + panel + CAPTION + MARGIN // 2
        # Pixels are inches * dpi rounded down, hence the thousandth.
        self._figure = Figure(figsize=((self.width + 1e-3) / _DPI, (self.height + 1e-3) / _DPI), dpi=_DPI)
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._pixels = np.full((self.height, self.width, 3), rgb(PAPER), np.uint8)

        self._text(MARGIN, 22, title, INK, _fitting(title, self.width, 12.5, bold=True), fontweight="bold")
        self._text(MARGIN, 56, facts, FAINT, _fitting(facts, self.width, 8.5))
        for left, name, colour in zip(self.lefts, columns, colours or [INK] * len(columns), strict=True):
            size = _fitting(name, panel + 2 * MARGIN, 9.5)
            self._text(left, HEADER - 9, name, colour, size, fontweight="bold", va="bottom")

    def draw(self, row: int, column: int, pixels: np.ndarray, caption: str = "") -> None:
        """Fill a panel with uint8 `[panel, panel, 3]`."""
        top, left = self.tops[row], self.lefts[column]
        self._pixels[top : top + self.panel, left : left + self.panel] = pixels
        size = _fitting(caption, self.panel + 2 * MARGIN, 7.5) if caption else 7.5
        self._text(left, top + self.panel + 6, caption, FAINT, size)

    def outline(self, row: int, column: int, visible: np.ndarray, colour: str, width: float = 1.0) -> None:
        """Draw the border between the visible patches and the others; `visible` bool `[grid, grid]`."""
        from matplotlib.collections import LineCollection

        padded, cell = np.pad(visible, 1), self.panel // len(visible)
        y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])  # horizontal edges: above cell (y, x)
        ends = [((c, r), (c + 1, r)) for r, c in zip(y, x, strict=True)]
        y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])  # vertical edges: left of it
        ends += [((c, r), (c, r + 1)) for r, c in zip(y, x, strict=True)]
        lines = list(np.array(ends, float).reshape(-1, 2, 2) * cell + (self.lefts[column], self.tops[row]))
        self._axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting", antialiased=False, zorder=2)
        )

    def save(self, path: str | Path) -> Path:
        """Write the PNG, folders and all; `UserError` where that cannot be."""
        self._axes.imshow(self._pixels, extent=(0, self.width, self.height, 0), interpolation="nearest")
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        self._axes.axis("off")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._figure.savefig(path, dpi=_DPI, format="png")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        return Path(path)

    def _text(self, x: int, y: int, text: str, colour: str, size: float, **style: Any) -> None:
        self._axes.text(x, y, text, color=colour, fontsize=size, **{"va": "top", **style})


def whole_cells(grid: int, panel: int = PANEL) -> int:
    """The side of a panel near `panel` pixels that gives every patch whole pixels, so that every edge is sharp."""
    return max(panel // grid, 1) * grid


def resized(pixels: np.ndarray, panel: int) -> np.ndarray:
    """uint8 `[S, S, 3]` as `[panel, panel, 3]`."""
    return np.asarray(Image.fromarray(pixels).resize((panel, panel), Image.Resampling.LANCZOS))


def dimmed(crop: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """`crop` `[panel, panel, 3]` with the patches that are not `visible` (bool `[grid, grid]`) grey and nearly gone."""
    grey = crop @ np.array([0.299, 0.587, 0.114])
    ghost = 0.8 * rgb(VEIL) + 0.2 * grey[..., None]
    return np.where(enlarged(visible, len(crop))[..., None], crop, ghost).astype(np.uint8)


def enlarged(cells: np.ndarray, panel: int) -> np.ndarray:
    """`[grid, grid, ...]` as `[panel, panel, ...]`, every cell a square of one value."""
    cell = panel // len(cells)
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def _fitting(text: str, width: int, most: float, *, bold: bool = False) -> float:
    """The font size at which `text` fits into `width` pixels less the margins, at most `most` points."""
    # A bold character is about 1.4 pixels a point wide, another 1.25.
    return min(most, (width - 2 * MARGIN) / ((1.4 if bold else 1.25) * max(len(text), 1)))
