"""Embedding: the rows are those of a plain loop, in any format, whatever stopped the command; and what is alike."""
import csv
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny_model import tiny_model

import ijepa_fast
from ijepa_fast.data import images as images_module
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.embed import embed, main
from ijepa_fast.errors import UserError
from ijepa_fast.view.neighbours import nearest


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def _weights(model, monkeypatch, tmp_path):
    monkeypatch.setattr(ijepa_fast, "load", lambda path, which: model)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def expected(model, photographs):
    """fp32 [40, 192], one image after another."""
    index = index_images([photographs])
    crops = center_crops(index, range(len(index)), 24, batch=1)
    return np.concatenate([model.features(crop, pool="mean").numpy() for crop in crops])


def run(capfd, *words):
    capfd.readouterr()
    code = main(["weights", *map(str, words), "--device", "cpu"])
    return code, *capfd.readouterr()


def close(rows, expected):
    # Batches of another size sum in another order; features are of order 1.
    return rows.shape == expected.shape and np.abs(rows - expected).max() < 1e-5


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_rows_are_those_of_a_plain_loop(suffix, photographs, expected, capfd):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    code, out, _ = run(capfd, photographs, "--out", f"new/a{suffix}", "--batch", 7)
    assert (code, out.split()[0]) == (0, "40")
    if suffix == ".parquet":
        from pyarrow.parquet import read_table

        table = read_table("new/a.parquet").to_pydict()
        rows, names = np.array(table["features"], np.float32), list(zip(table["path"], table["class"], strict=True))
    else:
        rows = np.load("new/a.npy") if suffix == ".npy" else load_file("new/a.safetensors")["features"]
        with open("new/a.csv") as file:
            names = [tuple(line) for line in csv.reader(file)][1:]
    assert close(rows, expected)
    assert names == [(str(p), p.parent.name) for p in sorted(photographs.rglob("*.jpg"))]
    assert not list(os.scandir("new"))[2:]


@pytest.mark.parametrize("cut", [0, 5])
def test_a_stopped_command_goes_on_after_the_last_whole_row(cut, model, photographs, expected, tmp_path, monkeypatch):
    index, real, seen = index_images([photographs]), model.features, []

    def stopping(images, **options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return real(images, **options)

    def counting(images, **options):
        seen.append(len(images))
        return real(images, **options)

    monkeypatch.setattr(model, "features", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(model, index, tmp_path / "a.npy", batch=8)
    assert not (tmp_path / "a.npy").exists()
    if cut:  # as a kill in the middle of a write leaves it
        os.truncate(tmp_path / "a.npy.partial", os.path.getsize(tmp_path / "a.npy.partial") - cut)
    monkeypatch.setattr(model, "features", counting)
    assert close(embed(model, index, tmp_path / "a.npy", batch=8), expected)
    assert sum(seen) == 40 + bool(cut)


def test_a_bad_image_is_named_and_the_rows_before_it_count(photographs, expected, tmp_path, capfd):
    folder = tmp_path / "copy"
    shutil.copytree(photographs, folder)
    bad = folder / "class_2" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    code, out, err = run(capfd, folder, "--batch", 5)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {bad} cannot be decoded: ")
    assert err.endswith("; remove or replace it\n")
    assert err.count("\n") == 1
    bad.unlink()
    assert os.path.getsize("features.npy.partial") > 20 * 192 * 4
    assert run(capfd, folder, "--batch", 5)[0] == 0
    assert close(np.load("features.npy"), np.delete(expected, 20, axis=0))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere cannot be read as an image"),
        (["text.jpg"], "text.jpg cannot be read as an image"),
        (["PHOTOGRAPHS", "--out", "a.txt"], "--out a.txt: features are written as .npy, .safetensors, .parquet"),
        (["PHOTOGRAPHS", "--out", "there.npy"], "--out there.npy exists already"),
        (["PHOTOGRAPHS", "--out", "text.jpg/a.npy"], "--out text.jpg/a.npy cannot be written"),
        (["PHOTOGRAPHS", "--out", "other.npy"], "other.npy.partial was begun with other weights or options"),
        (["PHOTOGRAPHS", "--batch", "0"], "--batch and --layers must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, photographs, tmp_path, capfd):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "there.npy").write_text("")
    (tmp_path / "other.npy.partial").write_text("")
    (tmp_path / "other.npy.partial.json").write_text("{}")
    code, out, err = run(capfd, *(photographs if word == "PHOTOGRAPHS" else word for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_other_images_under_a_partial_file_are_refused(model, photographs, tmp_path, monkeypatch):
    index = index_images([photographs / "class_0"])
    monkeypatch.setattr(model, "features", lambda images, **_: torch.zeros(len(images), 192))
    file = tmp_path / "a.npy"
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_fast.embed.FeatureFile.finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(model, index, file)
    with pytest.raises(UserError, match="was begun over other images"):
        embed(model, index_images([photographs / "class_1"]), file)


def test_parquet_without_pyarrow_is_one_sentence(photographs, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    code, _, err = run(capfd, photographs, "--out", "a.parquet")
    assert code == 2
    assert "needs pyarrow: pip install pyarrow" in err


def test_pairs_of_files_are_told(photographs, expected, capfd):
    files = sorted(photographs.rglob("*.jpg"))
    code, out, _ = run(capfd, files[3], files[0], files[30], "--similar")
    assert code == 0
    a, b, c = (expected[i] / np.linalg.norm(expected[i]) for i in (3, 0, 30))
    lines = [line.split() for line in out.splitlines()]
    assert [float(line[0]) for line in lines] == pytest.approx([a @ b, a @ c, b @ c], abs=1e-4)
    assert [line[1:] for line in lines] == [[str(files[i]), str(files[j])] for i, j in ((3, 0), (3, 30), (0, 30))]
    assert not os.path.exists("features.npy")


@pytest.mark.long
@pytest.mark.parametrize("with_query", [False, True])
def test_neighbours_in_a_folder_are_drawn(with_query, photographs, capfd, tmp_path):
    query = tmp_path / "query.jpg"
    shutil.copy(photographs / "class_1" / "4.jpg", query)
    words = [query] * with_query + [photographs]
    code, out, _ = run(capfd, *words, "--similar", "--sheet", "new/s.png")
    assert (code, out) == (0, "new/s.png\n")
    with Image.open("new/s.png") as sheet:
        panels = round((sheet.height - 128) / (168 + 26 + 14))
    assert panels == (1 if with_query else 6)


def test_nearest_equals_a_full_sort_over_parts(monkeypatch):
    monkeypatch.setattr("ijepa_fast.view.neighbours._CHUNK", 7)
    rows = np.random.default_rng(0).normal(size=(50, 5))
    similar, found = nearest(rows, rows[:3], 6)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    every = unit[:3] @ unit.T
    assert (found == np.argsort(-every, axis=1)[:, :6]).all()
    assert similar == pytest.approx(np.take_along_axis(every, found, 1), abs=1e-6)


def test_an_index_of_files_and_folders_keeps_their_order(photographs):
    files = sorted((photographs / "class_0").iterdir())
    index = index_images([files[5], photographs / "class_1", files[2]])
    expected = [files[5], *sorted((photographs / "class_1").iterdir()), files[2]]
    assert [index.path(i) for i in range(len(index))] == [str(path) for path in expected]
    sizes = [Image.open(path).size for path in expected]
    assert [(r["width"], r["height"]) for r in index.records] == sizes


def test_decoding_runs_one_batch_ahead_and_no_more():
    made = []
    items = images_module._one_ahead(made.append(i) or str(i) for i in range(5))
    assert next(items) == "0"
    assert next(items) == "1"
    items.close()
    assert len(made) <= 3
