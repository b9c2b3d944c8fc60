"""The probe of a run: what the target encoder's features are worth while it trains.

The loss of I-JEPA says little (its targets move, and it is low after a collapse too), so this is what to watch.
"""
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ijepa_fast.data.index import Index
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.knn import knn_accuracy
from ijepa_fast.evaluation.logistic import fit_logistic
from ijepa_fast.evaluation.rank import rankme, spread

CLASS_AT_LEAST = 4  # images of a class that a probe wants
HELD_OUT = 5  # one image in so many of each class is a query, the rest are the bank


def held_out(labels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a labelled set: indices of bank and of queries, int64, every class in both where it has two images.

    Takes at most `most` images, evenly over the set; of a set with more than `most` / 4 classes, from that many of
    them, since one image a class would leave nothing to vote. Raises UserError where no class has two, and
    where there is one class alone.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UserError("a k-NN probe needs two classes, and there is one: everything would be right")
    classes = classes[evenly(len(classes), max(most // CLASS_AT_LEAST, 1))]
    chosen = np.flatnonzero(np.isin(labels, classes))
    chosen = chosen[evenly(len(chosen), most)]
    bank, queries = [], []
    for label in classes:
        members = chosen[labels[chosen] == label]
        is_query = np.arange(len(members)) % HELD_OUT == HELD_OUT - 1
        if not is_query.any() and len(members) > 1:
            is_query[-1] = True
        bank.append(members[~is_query])
        queries.append(members[is_query])
    if not sum(map(len, queries)):
        raise UserError(f"a k-NN probe needs a class with two images; among {len(chosen)} images there is none")
    return np.concatenate(bank), np.concatenate(queries)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 ... count - 1, evenly, int64."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


@torch.no_grad()
def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features of whole images, fp32 `[B, D]`: the mean over all patches, as the paper evaluates (A.2)."""
    return encoder(images).float().mean(dim=1)


class Probe:
    """RankMe and spread, and k-NN and logistic regression where there are labels, of one set of images.

    All ranks see them together. The regression is not tuned: C is 0.1.

    `split`: bank and query ids into `index`, or None for RankMe alone.
    """

    def __init__(
        self,
        index: Index,
        split: tuple[np.ndarray, np.ndarray] | None,
        ids: np.ndarray,
        read_batches: Callable[[np.ndarray], Iterator[Tensor]],
        world: World,
        unlabelled: str = "",
    ):
        self.unlabelled = unlabelled  # why there is no accuracy to measure
        self.index, self.split, self.ids, self.read_batches, self.world = index, split, ids, read_batches, world

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`rankme`, `std`, `relative_std` and `cosine`; `knn` and `linear`, both accuracies; the same on every rank."""
        features = self._features(encoder)
        spreads = spread(features)
        values = {"rankme": rankme(features)} | {name: spreads[name] for name in ("std", "relative_std", "cosine")}
        if self.split is not None:
            bank = len(self.split[0])
            labels = torch.as_tensor(self.index.records["label"][self.ids].astype(np.int64), device=features.device)
            values["knn"] = knn_accuracy(features[:bank], labels[:bank], features[bank:], labels[bank:])
            if len(labels[:bank].unique()) > 1:
                right = fit_logistic(features[:bank], labels[:bank]).predict(features[bank:]) == labels[bank:]
                values["linear"] = float(right.float().mean())
        return values

    def _features(self, encoder: nn.Module) -> Tensor:
        # Every rank takes as many images (the last are repeated), so that all make the same number of forward passes.
        rank, size = self.world.rank, self.world.size
        share = np.resize(self.ids, -(-len(self.ids) // size) * size)[rank::size]
        batches = self.read_batches(share)
        mine = torch.cat([pooled(encoder, images.to(self.world.device)) for images in batches])
        every = self.world.gather(mine).view(size, len(share), -1)
        return every.transpose(0, 1).flatten(0, 1)[: len(self.ids)]


def build_probe(
    index: Index,
    most: int,
    read_batches: Callable[[np.ndarray], Iterator[Tensor]],
    world: World,
    *,
    must_have_labels: bool,
) -> Probe:
    """A probe of at most `most` images of `index`, spread evenly over it; k-NN where its classes allow it."""
    labels = index.records["label"]
    try:
        if not index.class_names or (labels < 0).any():
            raise UserError(f"{index.root} holds no class folders, which a k-NN probe needs")
        split = held_out(labels, most)
    except UserError as error:
        if must_have_labels:
            raise
        ids = evenly(len(index), most)
        return Probe(index, None, ids, read_batches, world, unlabelled=str(error))
    return Probe(index, split, np.concatenate(split), read_batches, world)
