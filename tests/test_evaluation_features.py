"""Probes on given features, against scikit-learn, closed forms and plain loops in float64."""
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.knn import knn_predictions
from ijepa_fast.evaluation.logistic import choose_logistic, fit_logistic
from ijepa_fast.evaluation.rank import lidar, spread
from ijepa_fast.evaluation.split import shots, stratified

HALF_A_POINT = 0.005  # what the project promises beside scikit-learn
CLASSES, WIDTH = 5, 24


def clouds(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 features of overlapping classes, in unequal directions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    features = centres[labels] + 2 * torch.randn(n, WIDTH, generator=generator)
    return features * torch.logspace(-2, 2, WIDTH) + 3, labels


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, ...]:
    return (*clouds(600, 0), *clouds(1000, 1))


@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
def test_logistic_is_scikit_learns(C, sets):
    x, y, x_val, y_val = sets
    fit = fit_logistic(x, y, C=C)
    standard = [((part.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy() for part in (x, x_val)]
    reference = LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(standard[0], y.numpy())
    ours = (fit.predict(x_val) == y_val).double().mean()
    assert abs(ours - reference.score(standard[1], y_val.numpy())) <= HALF_A_POINT
    assert 0.3 < ours < 0.95
    # One convex problem, so the weights too; ours stops at a gradient of 1e-5, and the penalty curves it by 1 / (C n).
    largest = np.abs(reference.coef_).max()
    np.testing.assert_allclose(fit.weight.numpy(), reference.coef_, atol=0.01 * largest)


def test_logistic_of_a_dimension_that_never_varies(sets):
    x, y, x_val, _ = sets
    dead = [torch.cat([part, torch.full((len(part), 1), 7.3)], 1) for part in (x, x_val)]
    with_it, without = fit_logistic(dead[0], y), fit_logistic(x, y)
    torch.testing.assert_close(with_it.logits(dead[1]), without.logits(x_val), atol=1e-3, rtol=0)


def test_logistic_chooses_on_a_part_of_train_alone(sets):
    x, y, *_ = sets
    chosen = choose_logistic(x, y, grid=(1e-5, 0.1, 1e3))
    fit, held = stratified(y, 0.2, 0)
    fits = {C: fit_logistic(x[fit], y[fit], C=C) for C in (1e-5, 0.1, 1e3)}
    accuracy = {C: (one.predict(x[held]) == y[held]).double().mean() for C, one in fits.items()}
    assert accuracy[chosen.C] == max(accuracy.values())
    torch.testing.assert_close(chosen.logits(x), fit_logistic(x, y, C=chosen.C).logits(x))


def test_logistic_of_one_class():
    with pytest.raises(UserError, match="all training images are of one class"):
        fit_logistic(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64))


def test_knn_is_scikit_learns(sets):
    x, y, x_val, y_val = sets
    predictions = knn_predictions(x, y, x_val, k=(1, 10, 200), temperature=0.07)
    bank, queries = (torch.nn.functional.normalize(part.double(), dim=1).numpy() for part in (x, x_val))
    for k, ours in predictions.items():
        # On the unit sphere the similarity is 1 - distance^2 / 2.
        reference = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(bank, y.numpy())
        assert abs((ours == y_val).double().mean() - reference.score(queries, y_val.numpy())) <= HALF_A_POINT
        assert (ours.numpy() == reference.predict(queries)).mean() > 0.995  # fp32 orders a near tie differently


def test_knn_in_parts_is_knn_at_once(sets, monkeypatch):
    x, y, x_val, _ = sets
    whole = knn_predictions(x, y, x_val, k=[20])[20]
    monkeypatch.setattr("ijepa_fast.evaluation.knn._SIMILARITIES", 600 * 7)
    assert (knn_predictions(x, y, x_val, k=[20])[20] == whole).all()


def test_knn_of_more_neighbours_than_images(sets):
    with pytest.raises(UserError, match="the 601 nearest of 600 images; k must be from 1 to 600"):
        knn_predictions(sets[0], sets[1], sets[2], k=[5, 601])


def test_spread_of_numbers_done_by_hand():
    features = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    values = spread(features)
    assert math.isclose(values["mean"], 8 / 6)
    assert math.isclose(values["variance"], 1 / 3)
    assert math.isclose(values["std"], 1 / 3)
    assert math.isclose(values["relative_std"], math.sqrt((1 / 3) / (18 / 6)))
    assert math.isclose(values["dead"], 2 / 3)
    assert math.isclose(values["cosine"], 7 / math.sqrt(5 * 13))


def test_spread_of_collapsed_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 30, generator=generator) + 1e-4 * torch.randn(50, 30, generator=generator)
    values = spread(features)
    assert values["dead"] == 1
    assert values["relative_std"] < 1e-3
    assert values["cosine"] > 0.9999
    assert spread(5 * features)["dead"] == 1  # no matter the scale


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Views of an image vary in all 8 dimensions alike; images differ in 3: by the formula nearly 3 eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(2000, 1, 8)
    images[..., :3] = 100 * torch.randn(2000, 1, 3, generator=generator)
    features = images + torch.randn(2000, 10, 8, generator=generator)
    # Between-variances 100^2 in three directions, sampled from 2000 images: a few per cent apart.
    assert math.isclose(lidar(features), 3, rel_tol=0.01)
    everything = features.clone()
    everything[..., :3] *= 50
    # What scales both within and between changes nothing, where RankMe sees another spectrum.
    assert math.isclose(lidar(everything), lidar(features), rel_tol=1e-3)


def test_lidar_against_scipy():
    from scipy.linalg import eigh

    features = np.random.default_rng(0).normal(size=(40, 5, 6)) + np.random.default_rng(1).normal(size=(40, 1, 6)) * 2
    means = features.mean(1)
    inside = (features - means[:, None]).reshape(-1, 6)
    eigenvalues = eigh(np.cov(means.T), inside.T @ inside / (40 * 4) + 1e-4 * np.eye(6), eigvals_only=True)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    assert math.isclose(lidar(torch.from_numpy(features)), np.exp(-(p * np.log(p)).sum()), rel_tol=1e-9)
    assert 1 < lidar(torch.from_numpy(features)) < 6


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_held_out_part_has_its_share_of_every_class(share):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2 + [3])[torch.randperm(63)]
    rest, held = stratified(labels, share, seed=3)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(63))
    counts = [int((labels[held] == c).sum()) for c in range(4)]
    assert counts == [round(40 * share), round(20 * share), 1, 0]
    assert [part.tolist() for part in stratified(labels, share, seed=3)] == [rest.tolist(), held.tolist()]
    assert stratified(labels, share, seed=4)[1].tolist() != held.tolist()


def test_shots_are_as_many_of_every_class():
    labels = torch.arange(60) % 6
    chosen = shots(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3] * 6
    assert shots(labels, 3, seed=1).tolist() != chosen.tolist()
    assert len(shots(labels, 100, seed=0)) == 60
