"""Low-shot and regression against scikit-learn; lists and tables of labels; the intervals of results."""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from test_evaluation_features import HALF_A_POINT, clouds

from ijepa_fast.data.index import build_index
from ijepa_fast.errors import UserError
from ijepa_fast.evaluation.dataset import DataSet, Labelled
from ijepa_fast.evaluation.features import Features
from ijepa_fast.evaluation.labels import Table, find_images, read_list, read_table
from ijepa_fast.evaluation.lowshot import listed, listed_rows, lowshot_rows
from ijepa_fast.evaluation.regress import fit_ridge, r2, regress_rows
from ijepa_fast.evaluation.results import bootstrap, over_splits, wilson
from ijepa_fast.evaluation.split import shots
from ijepa_fast.evaluation.suite import Task


def features(x: torch.Tensor) -> Features:
    return Features(x, x.shape[1], torch.zeros(len(x), dtype=torch.int64))


@pytest.fixture(scope="module")
def task() -> Task:
    (x, y), (x_val, y_val) = clouds(200, 0), clouds(400, 1)
    return Task(features(x), features(x_val), y, y_val, 5, torch.device("cpu"))


def sklearn_accuracy(task: Task, chosen: torch.Tensor) -> float:
    x, x_val = task.train.last[chosen].double(), task.val.last.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    fit = LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000)
    fit.fit(((x - mean) / scale).numpy(), task.train_labels[chosen].numpy())
    return fit.score(((x_val - mean) / scale).numpy(), task.val_labels.numpy())


def test_lowshot_is_scikit_learns_over_splits(task):
    (row,) = lowshot_rows(task, [6], splits=3)
    reference = [sklearn_accuracy(task, shots(task.train_labels, 6, seed)) for seed in range(3)]
    assert abs(row.value - np.mean(reference)) <= HALF_A_POINT
    interval = stats.t.interval(0.95, 2, np.mean(reference), stats.sem(reference))
    assert (row.low, row.high) == pytest.approx(interval, abs=HALF_A_POINT)
    assert (row.setting, row.interval, row.images) == ("6 a class, 3 splits", "Student", 30)
    assert np.std(reference) > 0.001


def test_lowshot_with_a_list_is_scikit_learns(task, tmp_path):
    chosen = torch.arange(0, 200, 5)
    (row,) = listed_rows(task, chosen, tmp_path / "1percent.txt")
    assert abs(row.value - sklearn_accuracy(task, chosen)) <= HALF_A_POINT
    assert (row.setting, row.images) == ("40 images of 1percent.txt", 400)


def test_lowshot_of_more_images_than_any_class_has(task):
    largest = int(task.train_labels.bincount().max())
    with pytest.raises(UserError, match=f"asked for {largest + 1} images a class; the largest class has {largest}"):
        lowshot_rows(task, [1, largest + 1])


def test_ridge_is_scikit_learns(task):
    x, values = task.train.last.double(), task.train.last.double()[:, 3] ** 2
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    for fit in fit_ridge(x, values, (1e-3, 10.0)):
        reference = Ridge(alpha=fit.penalty * len(x)).fit(standard, values.numpy())
        np.testing.assert_allclose(fit.predict(x).numpy(), reference.predict(standard), rtol=1e-8)


def table_of(task: Task, **columns: list[str]) -> DataSet:
    n, m = len(task.train_labels), len(task.val_labels)
    rows = np.arange(n), np.arange(n, n + m)
    table = Table("a.csv", [f"{i}.jpg" for i in range(n + m)], columns)
    part = Labelled(None, np.arange(n), task.train_labels.numpy())
    return DataSet(part, part, ("all",), "", table, rows)


def test_regress_finds_classes_and_values(task):
    everything = torch.cat([task.train.last, task.val.last])
    noise = torch.randn(len(everything), generator=torch.Generator().manual_seed(5))
    values = everything @ torch.linspace(-1, 1, everything.shape[1]) + 30 * noise
    labels = torch.cat([task.train_labels, task.val_labels])
    columns = {"count": [str(3 + 2 * int(y)) for y in labels], "size": [f"{float(v):.6f}" for v in values]}
    rows = regress_rows(task, table_of(task, **columns), ["count", "size"])
    assert [(row.probe, row.metric) for row in rows] == [
        ("regress count", "accuracy"), ("regress size", "R2"), ("regress size", "mean absolute error"),
    ]  # fmt: skip
    assert rows[0].setting.startswith("5 classes, C ")
    assert 0.6 < rows[0].value < 0.95
    for row in rows[1:]:
        assert row.low < row.value < row.high
        assert row.interval == "bootstrap"
    # What cannot be known is noise with a standard deviation of 30, and a mean absolute value of 30 * sqrt(2 / pi).
    assert rows[2].value == pytest.approx(30 * math.sqrt(2 / math.pi), rel=0.15)
    n = len(task.train_labels)
    assert rows[1].value == pytest.approx(1 - 900 / float(values[n:].var()), abs=0.05)
    assert regress_rows(task, table_of(task, **columns), ["count"], "values")[0].metric == "R2"


@pytest.mark.parametrize(
    ("columns", "name", "sentence"),
    [
        ({"count": ["1", "2"]}, "size", "a.csv has no column size; it has count"),
        ({"count": ["1", "two"]}, "count", "a.csv: column count of 1.jpg is 'two', which is no number"),
        ({"count": ["7", "7"]}, "count", "a.csv: column count is 7 for all training images"),
    ],
)
def test_regress_of_columns_that_cannot_be(columns, name, sentence, task):
    n = len(task.train_labels) + len(task.val_labels)
    columns = {key: [values[0], *[values[1]] * (n - 1)] for key, values in columns.items()}
    with pytest.raises(UserError, match=sentence):
        regress_rows(task, table_of(task, **columns), [name])


def test_regress_without_a_table(task):
    data = table_of(task)._replace(table=None)
    with pytest.raises(UserError, match="regress reads numbers from a CSV file: name that with --labels"):
        regress_rows(task, data, ["count"])


def test_r2_of_the_mean_is_0_and_of_the_truth_1():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert r2(values.mean().expand(3), values) == 0
    assert r2(values, values) == 1


def test_intervals_are_scipys():
    for right, n in ((0, 10), (7, 10), (250, 341), (10, 10)):
        reference = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-6)
    for n in (2, 3, 5, 11, 12, 30):
        values = np.random.default_rng(n).normal(size=n).tolist()
        mean, low, high = over_splits(values)
        expected = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        # The table has three digits.
        assert (mean, low, high) == pytest.approx((np.mean(values), *expected), rel=3e-3, abs=3e-3)
    assert over_splits([0.5]) == (0.5, None, None)


def test_bootstrap_of_a_mean_has_the_width_of_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    assert low < float(values.mean()) < high


def test_images_are_found_by_path_and_by_name(photographs, tmp_path):
    index = build_index(photographs, threads=1)
    paths = [index.path(i) for i in range(len(index))]
    names = ["class_1/3.jpg", "class_1/3", str(photographs / "class_1" / "3.jpg"), "train/class_1/3.jpg"]
    assert {paths[i] for i in find_images(index, names, tmp_path)} == {str(photographs / "class_1" / "3.jpg")}
    with pytest.raises(UserError, match=r"names 3\.jpg, and several images below .* have that file name"):
        find_images(index, ["3.jpg"], tmp_path)
    with pytest.raises(UserError, match=r"names 2 images that are not below .*, the first class_9/1\.jpg"):
        find_images(index, ["class_9/1.jpg", "class_1/3.jpg", "77.jpg"], tmp_path)


def test_a_list_names_training_images(photographs, tmp_path):
    index = build_index(photographs, threads=1)
    file = tmp_path / "list.txt"
    file.write_text("class_2/1.jpg 2\n\nclass_0/4.jpg 0\n")
    assert read_list(file) == ["class_2/1.jpg", "class_0/4.jpg"]
    ids = np.arange(len(index))
    rows = listed(Labelled(index, ids, ids), file)
    assert [index.path(int(i)).removeprefix(f"{index.root}/") for i in rows] == ["class_0/4.jpg", "class_2/1.jpg"]
    with pytest.raises(UserError, match="names 1 images that are held out for evaluation"):
        listed(Labelled(index, ids[:20], ids[:20]), file)
    file.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        read_list(file)


def test_a_list_of_images_and_classes_is_a_table(tmp_path):
    (tmp_path / "list.txt").write_text("a/my photograph.jpg 3\n\nb.jpg 0\n")
    table = read_table(tmp_path / "list.txt")
    assert (table.images, table.columns) == (["a/my photograph.jpg", "b.jpg"], {"label": ["3", "0"]})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,label\n", "holds no rows"),
        ("path,label\na.jpg,1\nb.jpg\n", "row 2 has 1 fields, its header 2"),
    ],
)
def test_tables_that_are_none(text, sentence, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_table(tmp_path / "a.csv")
