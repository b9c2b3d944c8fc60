"""Parts of a labelled set: held out for choosing, or a few images of each class; functions of a seed alone."""
import numpy as np
import torch
from torch import Tensor


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions (the rest, the held-out part) of labels int64 `[n]`, sorted int64 on the CPU.

    `share` of each class is held out, rounded; of a class with two images or more at least one, and at least one stays.
    """
    rest, held = [], []
    for members in _shuffled_classes(labels, seed):
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.append(members[:count])
        rest.append(members[count:])
    return _sorted(rest), _sorted(held)


def shots(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Positions of `per_class` images of each class (all of a smaller one), sorted int64 on the CPU."""
    return _sorted([members[:per_class] for members in _shuffled_classes(labels, seed)])


def _shuffled_classes(labels: Tensor, seed: int) -> list[np.ndarray]:
    every = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(every))
    order = order[np.argsort(every[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(every[order])) + 1)


def _sorted(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate(parts)).astype(np.int64))
