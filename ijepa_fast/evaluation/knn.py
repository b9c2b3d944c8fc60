"""k-nearest neighbours by cosine similarity: classification with nothing trained."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.errors import UserError

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_SIMILARITIES = 2**26  # at once: 256 MiB in fp32


def knn_predictions(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: Sequence[int] = NEIGHBOURS, temperature=TEMPERATURE
) -> dict[int, Tensor]:
    """For each of `k` the predicted class of each query, int64 `[m]`, by a weighted vote of the nearest of the bank.

    Features `[n, D]` and `[m, D]`, labels int64 `[n]`. A neighbour's weight is exp(similarity / temperature), as in Wu
    et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294). Raises UserError where a k is larger than the bank.
    """
    most = max(k)
    if most > len(bank) or min(k) < 1:
        raise UserError(f"k-NN was asked for the {most} nearest of {len(bank)} images; k must be from 1 to {len(bank)}")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    predictions: dict[int, list[Tensor]] = {one: [] for one in k}
    for some in queries.split(max(_SIMILARITIES // len(bank), 1)):
        similarity, nearest = (some @ bank.T).topk(most, dim=1)
        # exp((s - largest s) / T): the same vote, and no overflow at a low temperature.
        weight, label = ((similarity - similarity[:, :1]) / temperature).exp(), bank_labels[nearest]
        for one in k:
            votes = torch.zeros(len(some), classes, device=some.device)
            votes.scatter_add_(1, label[:, :one], weight[:, :one])
            predictions[one].append(votes.argmax(1))
    return {one: torch.cat(parts) for one, parts in predictions.items()}


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20) -> float:
    """Top-1 accuracy of `knn_predictions` with the `k` nearest, or the whole bank where it is smaller."""
    k = min(k, len(bank))
    return float((knn_predictions(bank, bank_labels, queries, k=[k])[k] == labels).float().mean())
