"""RankMe and k-NN against closed forms and plain loops; splits; the probe that a run makes."""
import contextlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.index import build_index
from ijepa_fast.data.loader import eval_batches
from ijepa_fast.data.reader import Reader
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.knn import knn_accuracy
from ijepa_fast.evaluation.logistic import fit_logistic
from ijepa_fast.evaluation.probe import Probe, build_probe, held_out, pooled
from ijepa_fast.evaluation.rank import rankme, spread

ALONE = World(rank=0, size=1, device=torch.device("cpu"), strategy="single")


def test_rankme_of_orthogonal_rows_is_their_number():
    # The 1e-7 of the paper's equation moves it by about n * 1e-7 * log(1e7).
    assert math.isclose(rankme(torch.eye(12)), 12, rel_tol=1e-4)
    assert math.isclose(rankme(3 * torch.eye(12, 40)), 12, rel_tol=1e-4)


def test_rankme_of_one_direction_is_one():
    features = torch.arange(1.0, 31)[:, None] * torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert math.isclose(rankme(features), 1, rel_tol=1e-4)


def test_rankme_of_two_unequal_directions():
    # Singular values 3 and 1: exp(H(3/4, 1/4)).
    features = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert math.isclose(rankme(features), math.exp(entropy), rel_tol=1e-4)


def test_rankme_against_numpy():
    features = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8)
    singular = np.linalg.svd(features, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    # The same formula in float64 on both sides; the features themselves are exact in it.
    assert math.isclose(rankme(torch.from_numpy(features)), expected, rel_tol=1e-9)


def test_rankme_of_nothing_but_zeros():
    assert math.isclose(rankme(torch.zeros(10, 4)), 1, rel_tol=1e-4)


def plain_knn(bank, bank_labels, queries, labels) -> float:
    right = 0
    for query, label in zip(queries, labels, strict=True):
        similar = [
            (float(query @ other) / float(query.norm() * other.norm()), int(its))
            for other, its in zip(bank, bank_labels, strict=True)
        ]
        votes: dict[int, float] = {}
        for similarity, its in sorted(similar, reverse=True)[:20]:
            votes[its] = votes.get(its, 0.0) + math.exp(similarity / 0.07)
        right += max(votes, key=votes.__getitem__) == int(label)
    return right / len(labels)


@pytest.mark.parametrize("size", [5, 20, 73])  # fewer than the 20 neighbours, as many, more
def test_knn_against_a_plain_loop(size):
    generator = torch.Generator().manual_seed(size)
    classes = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    labels = [torch.randint(0, 4, (n,), generator=generator) for n in (size, 40)]
    bank, queries = (
        classes[its] + 1.5 * torch.randn(len(its), 6, generator=generator, dtype=torch.float64) for its in labels
    )
    accuracy = knn_accuracy(bank, labels[0], queries, labels[1])
    assert math.isclose(accuracy, plain_knn(bank, labels[0], queries, labels[1]), rel_tol=1e-6)
    assert 0.2 < accuracy < 1


def test_knn_weighs_by_similarity():
    # Two far neighbours of class 0 against one near neighbour of class 1.
    bank, labels = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0, 1])
    query = torch.tensor([[1.0, 0.2]])
    assert knn_accuracy(bank, labels, query, torch.tensor([1])) == 1


def test_knn_of_a_class_that_the_bank_lacks_is_wrong():
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([5, 1])) == 0.5


def test_knn_does_not_depend_on_the_scale_of_features():
    bank, queries = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    scale = torch.logspace(-3, 3, 30)[:, None]
    assert knn_accuracy(bank, labels, queries, labels) == knn_accuracy(bank * scale, labels, queries * scale, labels)


@pytest.mark.parametrize("most", [9, 31, 60, 1000])
def test_held_out_splits_every_class(most):
    labels = np.sort(np.random.default_rng(0).integers(0, 6, 60))
    bank, queries = held_out(labels, most)
    assert bank.dtype == queries.dtype == np.int64
    both = np.concatenate([bank, queries])
    assert len(both) == len(np.unique(both)) == min(most, 60)
    assert both.min() >= 0
    assert both.max() < 60
    for label, count in zip(*np.unique(labels[both], return_counts=True), strict=True):
        in_bank, in_queries = int((labels[bank] == label).sum()), int((labels[queries] == label).sum())
        assert in_bank + in_queries == count
        if count > 1:
            assert in_bank > 0
            assert in_queries == max(1, count // 5)
    again = held_out(labels, most)
    assert all(np.array_equal(a, b) for a, b in zip(again, (bank, queries), strict=True))


def test_held_out_takes_images_from_the_whole_set():
    bank, queries = held_out(np.arange(1000) // 250, 40)
    ids = np.sort(np.concatenate([bank, queries]))
    assert (ids[0], ids[-1]) == (0, 999)
    assert np.diff(ids).max() <= 26


def test_held_out_of_very_many_classes_takes_some_whole_enough_to_vote():
    bank, queries = held_out(np.arange(6000) // 6, 100)
    labels = np.concatenate([bank, queries]) // 6
    assert len(labels) == 100
    assert len(np.unique(labels)) == 25
    assert len(queries) == 25


def test_held_out_without_a_class_of_two():
    with pytest.raises(UserError, match="needs a class with two images; among 2 images there is none"):
        held_out(np.array([0, 1, 2]), 10)


def test_held_out_of_a_single_class_has_nothing_to_measure():
    with pytest.raises(UserError, match="needs two classes, and there is one"):
        held_out(np.zeros(10, np.int64), 10)


class MeanColour(nn.Module):
    """An encoder of one "patch": the mean colour, centred so that cosines tell hues apart."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2))[:, None] - 127.5


class Corner(nn.Module):
    """The colour of one pixel: tells classes apart better than chance and worse than perfectly."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1, 0].float() - 127.5


@pytest.fixture
def source():
    """(index, decoder, reader) of a folder."""
    with contextlib.ExitStack() as stack:

        def make(root):
            index = build_index(root, threads=1)
            return (
                index,
                stack.enter_context(contextlib.closing(PillowDecoder(1))),
                stack.enter_context(contextlib.closing(Reader(index, 1))),
            )

        yield make


def save(pixels: np.ndarray, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def probe_of(root, source, *, most=1000, must_have_labels=False, world=ALONE, batch=3) -> Probe:
    index, decoder, reader = source(root)
    return build_probe(
        index, most, lambda ids: eval_batches(index, ids, decoder, reader, 16, batch), world,
        must_have_labels=must_have_labels,
    )  # fmt: skip


def test_probe_of_a_labelled_folder(source, photographs):
    index, decoder, reader = source(photographs)
    values = probe_of(photographs, source)(Corner())
    bank, queries = held_out(index.records["label"], 1000)
    colour = [torch.cat([pooled(Corner(), b) for b in eval_batches(index, ids, decoder, reader, 16, 7)])
              for ids in (bank, queries)]  # fmt: skip
    labels = [torch.from_numpy(index.records["label"][ids].astype(np.int64)) for ids in (bank, queries)]
    assert values["knn"] == knn_accuracy(colour[0], labels[0], colour[1], labels[1])
    assert math.isclose(values["rankme"], rankme(torch.cat(colour)), rel_tol=1e-6)
    assert 0.3 < values["knn"] < 1
    fit = fit_logistic(colour[0], labels[0], C=0.1)
    assert values["linear"] == float((fit.predict(colour[1]) == labels[1]).float().mean())
    assert 0.25 < values["linear"] < 1
    assert values["cosine"] == pytest.approx(spread(torch.cat(colour))["cosine"])


@pytest.mark.parametrize("layout", ["flat", "one each"])
def test_probe_without_labels_has_rankme_alone(layout, source, tmp_path):
    for n in range(6):
        pixels = np.full((20, 20, 3), 40 * n, np.uint8)
        save(pixels, tmp_path / (f"{n}.png" if layout == "flat" else f"class{n}/0.png"))
    assert set(probe_of(tmp_path, source)(MeanColour())) == {"rankme", "std", "relative_std", "cosine"}
    with pytest.raises(UserError, match="k-NN probe needs"):
        probe_of(tmp_path, source, must_have_labels=True)


def test_probe_looks_at_no_more_images_than_told(source, photographs):
    seen = []

    class Watch(MeanColour):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    probe_of(photographs, source, most=13)(Watch())
    assert sum(seen) == 13


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_see_what_one_sees(size, source, photographs):
    """Each rank's forward passes, one after the other, gathered as its collective would."""

    class Share(World):
        def gather(self, x: Tensor) -> Tensor:
            shares.append(x)
            return torch.cat(shares) if len(shares) == size else x.repeat(size, 1)

    shares: list[Tensor] = []
    alone = probe_of(photographs, source, most=37)(Corner())
    for rank in range(size):
        values = probe_of(photographs, source, most=37, world=Share(rank, size, ALONE.device, "ddp"))(Corner())
    assert len({len(share) for share in shares}) == 1
    assert values["knn"] == alone["knn"]
    assert math.isclose(values["rankme"], alone["rankme"], rel_tol=1e-6)
