"""Classification with few labels: a few seeded images of each class, or those of a list file, on frozen features.

Logistic regression with C = 0.1 on features standardised by the labelled images, which are too few to choose C on. Of
seeded images several independent splits are drawn, and the interval is that of their mean.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.dataset import Labelled
from ijepa_fast.evaluation.labels import find_images, read_list
from ijepa_fast.evaluation.logistic import fit_logistic
from ijepa_fast.evaluation.results import Row, accuracy_row, over_splits
from ijepa_fast.evaluation.split import shots
from ijepa_fast.evaluation.suite import Task

SHOTS, SPLITS = (1, 5, 10), 5
C = 0.1


def lowshot_rows(task: Task, per_class: Sequence[int] | None = None, splits: int = SPLITS) -> list[Row]:
    """Accuracy on all of val with `per_class` training images of each class (all of a smaller one).

    Left out, 1, 5 and 10, as far as any class has as many. `images` of a row: the labels used. Raises UserError for
    more than the largest class has.
    """
    largest = int(task.train_labels.bincount().max())
    for count in per_class or ():
        if not 1 <= count <= largest:
            raise UserError(f"low-shot was asked for {count} images a class; the largest class has {largest}")
    rows = []
    labels, val_labels = task.labels
    for name, train, val, _ in task.representations():
        for count in per_class or [one for one in SHOTS if one <= largest]:
            values, used = [], 0
            for seed in range(splits):
                chosen = shots(task.train_labels, count, task.seed + seed).to(task.device)
                right = _predict(train[chosen], labels[chosen], val, task.classes) == val_labels
                values.append(float(right.double().mean()))
                used = len(chosen)
            setting = f"{count} a class, {splits} splits"
            rows.append(Row("lowshot", name, "accuracy", *over_splits(values), "Student", setting, used))
    return rows


def listed_rows(task: Task, chosen: Tensor, file: Path) -> list[Row]:
    """Accuracy on all of val with the training images at positions `chosen` (see `listed`)."""
    rows = []
    labels, val_labels = task.labels
    chosen = chosen.to(task.device)
    for name, train, val, _ in task.representations():
        predicted = _predict(train[chosen], labels[chosen], val, task.classes)
        rows.append(accuracy_row("lowshot", name, predicted, val_labels, f"{len(chosen)} images of {file.name}"))
    return rows


def listed(train: Labelled, file: Path) -> Tensor:
    """Positions in `train` of the images that a list file names, int64; for instance ImageNet's official 1 %."""
    ids = np.unique(find_images(train.index, read_list(file), file))
    rows = np.flatnonzero(np.isin(train.ids, ids))
    if len(rows) < len(ids):
        raise UserError(
            f"{file} names {len(ids) - len(rows)} images that are held out for evaluation; give train and val folders"
        )
    return torch.from_numpy(rows)


def _predict(train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    return fit_logistic(train, labels, C=C, classes=classes).predict(val)
