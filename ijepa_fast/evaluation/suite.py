"""The probes that need no more than features: each gives rows of results, for both representations."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_fast.evaluation.features import Features
from ijepa_fast.evaluation.knn import NEIGHBOURS, knn_predictions
from ijepa_fast.evaluation.linear import choose_heads
from ijepa_fast.evaluation.logistic import choose_logistic
from ijepa_fast.evaluation.rank import lidar, rankme, spread
from ijepa_fast.evaluation.results import Row, accuracy_row

LAST, LAST_FOUR = "last layer", "last four layers"
_SPREAD = {
    "mean": "mean",
    "variance": "variance over images",
    "relative_std": "relative std",
    "dead": "share of dead dimensions",
    "cosine": "cosine between images",
}
Tick = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Task:
    """Features of both parts of a set, and their labels int64 `[n]`, on the CPU; probes compute on `device`."""

    train: Features
    val: Features
    train_labels: Tensor
    val_labels: Tensor
    classes: int
    device: torch.device
    views: tuple[Features, ...] = ()  # of train, in random crops
    seed: int = 0

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        return self.train_labels.to(self.device), self.val_labels.to(self.device)

    def representations(self) -> Iterator[tuple[str, Tensor, Tensor, list[Tensor]]]:
        """Name, and features of train, val and the views: one at a time, since both may not fit on a device."""
        for name in (LAST, LAST_FOUR):
            parts = [f.last if name == LAST else f.last_four for f in (self.train, self.val, *self.views)]
            train, val, *views = (part.to(self.device) for part in parts)
            yield name, train, val, views
            if self.train.last_four.shape == self.train.last.shape:
                return


def rank_rows(task: Task) -> list[Row]:
    """RankMe, the spread of features, and LiDAR where there are two views of each image or more; of train images."""
    rows = []
    for name, train, _, views in task.representations():
        rows.append(Row("rank", name, "RankMe", rankme(train), images=len(train)))
        if len(views) > 1:
            setting = f"{len(views)} views"
            rows.append(Row("rank", name, "LiDAR", lidar(torch.stack(views, 1)), setting=setting, images=len(train)))
        if name == LAST:
            values = spread(train)
            rows += [Row("rank", name, shown, values[key], images=len(train)) for key, shown in _SPREAD.items()]
    return rows


def knn_rows(task: Task, neighbours: Sequence[int] | None = None) -> list[Row]:
    """k-NN for each of `neighbours`; left out, for those of 10, 20, 100 and 200 that train has images for."""
    rows = []
    labels, val_labels = task.labels
    k = neighbours or [one for one in NEIGHBOURS if one <= len(labels)] or [len(labels)]
    for name, train, val, _ in task.representations():
        for one, predicted in knn_predictions(train, labels, val, k=k).items():
            rows.append(accuracy_row("knn", name, predicted, val_labels, f"k {one}"))
    return rows


def logistic_rows(task: Task) -> tuple[list[Row], Tensor]:
    """Exact logistic regression; also its probabilities for the last layer, `[m, classes]` on the CPU."""
    rows, probabilities = [], torch.empty(0)
    labels, val_labels = task.labels
    for name, train, val, _ in task.representations():
        fit = choose_logistic(train, labels, classes=task.classes, seed=task.seed)
        logits = fit.logits(val)
        rows.append(accuracy_row("logistic", name, logits.argmax(1), val_labels, f"C {fit.C:g}"))
        if name == LAST:
            probabilities = logits.softmax(1).cpu()
    return rows, probabilities


def linear_rows(task: Task, optimizer: str = "lars", tick: Tick = lambda epochs: None) -> list[Row]:
    """The paper's linear probe; on random crops of train, an epoch each, where there are views. See `linear`."""
    rows = []
    labels, val_labels = task.labels
    for name, train, val, views in task.representations():
        heads = choose_heads(
            views or [train], labels, classes=task.classes, optimizer=optimizer, seed=task.seed, tick=tick
        )
        predicted = heads.logits(val).argmax(2)[:, 0]
        rows.append(accuracy_row("linear", name, predicted, val_labels, f"{optimizer}, {heads.settings[0]}"))
    return rows
