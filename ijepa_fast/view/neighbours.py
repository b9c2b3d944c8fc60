"""What is nearest in feature space: a query a row, and beside it the images whose features are most like its own."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijepa_fast.data.images import center_crops
from ijepa_fast.data.index import Index
from ijepa_fast.view.sheet import Sheet, resized

NEIGHBOURS = 7
_PANEL = 168  # pixels
_CHUNK = 8192  # rows of features in memory at once


def nearest(features: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `features` `[n, D]` most similar to each of `queries` `[q, D]` by cosine: `[q, count]`, best first.

    Returns their similarities and row numbers (int64). `features` is read in parts, so it may be memory-mapped.
    """
    queries = _unit(queries)
    best, rows = np.full((len(queries), 0), -np.inf, np.float32), np.zeros((len(queries), 0), np.int64)
    for first in range(0, len(features), _CHUNK):
        similar = queries @ _unit(features[first : first + _CHUNK]).T
        best = np.concatenate([best, similar], axis=1)
        rows = np.concatenate([rows, np.tile(first + np.arange(similar.shape[1]), (len(queries), 1))], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :count]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return best, rows


def neighbours_sheet(
    features: np.ndarray, index: Index, queries: Sequence[int], image_size: int, out_path: str | Path
) -> Path:
    """Write a PNG of the images `queries` of `index`, each with its nearest others; row i of `features` is image i."""
    count = min(NEIGHBOURS, len(index) - 1)
    similar, rows = nearest(features, features[list(queries)], count + 1)
    sheet = Sheet(
        "Nearest neighbours",
        f"by cosine similarity of the mean over patches, among {len(index)} images",
        ["query", *(f"{i + 1}" for i in range(count))],
        len(queries),
        panel=_PANEL,
    )
    for row, query in enumerate(queries):
        others = [(query, "")]
        others += [(i, f"{s:.3f} ") for s, i in zip(similar[row], rows[row], strict=True) if i != query][:count]
        crops = center_crops(index, [i for i, _ in others], image_size, batch=1)
        for column, (crop, (i, said)) in enumerate(zip(crops, others, strict=True)):
            sheet.draw(row, column, resized(crop[0].numpy(), _PANEL), said + _class(index, i))
    return sheet.save(out_path)


def _class(index: Index, image: int) -> str:
    label = index.records["label"][image]
    return index.class_names[label] if label >= 0 else ""


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
