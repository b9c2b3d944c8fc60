"""The command: its table and JSON against scikit-learn on the same features, its cache, ranks, and bad input."""
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from outcome import Outcome
from photographs import write_photographs
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.evaluate import main
from ijepa_fast.evaluation.dataset import open_dataset
from ijepa_fast.evaluation.features import Extractor, Features
from ijepa_fast.evaluation.frozen import open_weights, prepare
from ijepa_fast.model import SIZES, Size

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
RANDOM = "random:vit_tiny/8@24"
TRAIN, VAL = 7, 5  # images of a class


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """ViT-Ti of two blocks: tests of what is done with features have no use for good ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_tiny", Size(dim=24, depth=2, num_heads=3, mlp_dim=32))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """train/ and val/ of four classes."""
    folder = tmp_path_factory.mktemp("labelled") / "a[red]b[" / "exp]:dog:"  # is no markup
    write_photographs(folder / "train", images=TRAIN + VAL)
    for file in sorted((folder / "train").glob("*/*.jpg")):
        if int(file.stem) >= TRAIN:
            moved = folder / "val" / file.parent.name / file.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            file.rename(moved)
    return folder


@pytest.fixture
def evaluate(root, capfd) -> Callable[..., Outcome]:
    def run(*words: object, weights: str = RANDOM, data: Path = root) -> Outcome:
        capfd.readouterr()
        code = main([weights, "--data", str(data), "--threads", "1", "--batch", "8", *map(str, words)])
        return Outcome(code, *capfd.readouterr())

    return run


def extract(weights: str, root: Path, *, cache: Path | None = None, part: str = "train") -> Features:
    model = prepare(open_weights(weights), CPU)
    data = open_dataset(root, threads=1)
    extractor = Extractor(model, build_decoder("auto", 1), World(0, 1, CPU, "single"), cache=cache, batch=8, threads=1)
    features = extractor.features(getattr(data, part), part)
    assert features is not None
    return features


def results(file: Path) -> dict[tuple[str, str, str], dict]:
    """Accuracies and others by probe, features and setting or metric."""
    rows = json.loads(file.read_text())["results"]
    return {(r["probe"], r["features"], r["setting"] if r["metric"] == "accuracy" else r["metric"]): r for r in rows}


def test_the_command_agrees_with_scikit_learn(evaluate, root, tmp_path):
    outcome = evaluate("--json", tmp_path / "new" / "results.json", "--k", "3,10")
    assert (outcome.code, outcome.err) == (0, "")
    rows = results(tmp_path / "new" / "results.json")
    train, val = (extract(RANDOM, root, part=part) for part in ("train", "val"))
    labels = [np.repeat(np.arange(4), n) for n in (TRAIN, VAL)]
    for name, x, x_val in (("last layer", train.last, val.last), ("last four layers", train.last_four, val.last_four)):
        unit = [torch.nn.functional.normalize(part.double(), dim=1).numpy() for part in (x, x_val)]
        for k in (3, 10):
            reference = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit[0], labels[0])
            row = rows["knn", name, f"k {k}"]
            assert row["value"] == reference.score(unit[1], labels[1])
            assert row["low"] < row["value"] < row["high"]
            assert f"{100 * row['value']:.1f} %" in outcome.out
        setting = next(s for probe, features, s in rows if (probe, features) == ("logistic", name))
        standard = [((part - x.mean(0)) / x.std(0, correction=0)).numpy() for part in (x, x_val)]
        C = float(setting.split()[1])
        reference = LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(standard[0], labels[0])
        assert rows["logistic", name, setting]["value"] == reference.score(standard[1], labels[1])
    singular = np.linalg.svd(train.last.double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    assert rows["rank", "last layer", "RankMe"]["value"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    about = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (about["train_images"], about["val_images"], about["weights"]) == (4 * TRAIN, 4 * VAL, RANDOM)
    assert f"{RANDOM}on{root}" in "".join(outcome.out.split())
    assert "evaluated on" in outcome.out


def test_views_give_lidar_and_serve_the_linear_probe(evaluate, tmp_path):
    outcome = evaluate("--views", 2, "--probe", "linear", "--optimizer", "sgd", "--json", tmp_path / "r.json")
    assert (outcome.code, outcome.err) == (0, "")
    rows = results(tmp_path / "r.json")
    assert rows["rank", "last layer", "LiDAR"]["setting"] == "2 views"
    assert any(probe == "linear" and setting.startswith("sgd, lr") for probe, _, setting in rows)
    assert not any(probe in ("knn", "logistic") for probe, *_ in rows)


def test_features_are_the_means_over_patches_of_the_last_blocks(root):
    model = prepare(open_weights(RANDOM), CPU)
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = model.features(images, layers=2)
    encoder = model.encoder
    blocks = list(encoder.blocks)
    last = encoder(images)
    encoder.blocks = torch.nn.ModuleList(blocks[:1])
    first = encoder(images)
    torch.testing.assert_close(features, torch.cat([first.mean(1), last.mean(1)], 1))
    encoder.blocks = torch.nn.ModuleList(blocks)
    torch.testing.assert_close(model.features(images, pool=None), last)


def test_cached_features_are_the_recomputed_ones(root, tmp_path):
    fresh = extract(RANDOM, root)
    stored = extract(RANDOM, root, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    cached = extract(RANDOM, root, cache=tmp_path)
    for features in (stored, cached):
        assert torch.equal(features.last_four, fresh.last_four)
        assert torch.equal(features.digests, fresh.digests)
        assert features.dim == fresh.dim
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-9])  # damaged: computed and written anew
    assert torch.equal(extract(RANDOM, root, cache=tmp_path).last_four, fresh.last_four)
    assert torch.equal(extract(RANDOM, root, cache=tmp_path).last_four, fresh.last_four)


def test_a_cache_that_cannot_be_written_costs_no_results(evaluate, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = evaluate("--probe", "knn", "--k", 3, "--cache", tmp_path / "file" / "cache")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: the features of train are computed anew next time, for ")
    assert outcome.err.count("\n") == 2


def test_the_cache_tells_weights_data_and_crops_apart(root, tmp_path):
    extract(RANDOM, root, cache=tmp_path)
    extract(f"{RANDOM}#1", root, cache=tmp_path)
    extract(RANDOM, root, cache=tmp_path, part="val")
    assert len(list(tmp_path.iterdir())) == 3
    data, model = open_dataset(root, threads=1), prepare(open_weights(RANDOM), CPU)
    extractor = Extractor(model, PillowDecoder(1), World(0, 1, CPU, "single"), cache=tmp_path, batch=8, threads=1)
    views = [extractor.features(data.train, "view", number) for number in (0, 1)]
    assert len(list(tmp_path.iterdir())) == 5
    assert not torch.equal(views[0].last, views[1].last)
    assert torch.equal(views[0].digests, views[1].digests)


def test_pixels_are_pixels(root):
    features = extract("pixels", root)
    assert features.last_four.shape == (4 * TRAIN, 768)
    assert features.last.equal(features.last_four)
    data = open_dataset(root, threads=1).train
    with Image.open(data.index.path(0)) as image:
        side = round(min(image.size) * 0.875)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(features.last[0].numpy() * 255, np.asarray(small).reshape(-1), atol=1)


def test_weights_of_a_file_are_evaluated_like_those_in_memory(evaluate, tmp_path):
    encoder = open_weights(f"{RANDOM}#3").encoder
    file = tmp_path / "target.safetensors"
    save_file({f"target_encoder.{name}": value for name, value in encoder.state_dict().items()}, file)
    assert evaluate("--json", tmp_path / "a.json", "--probe", "knn", weights=str(file)).code == 0
    evaluate("--json", tmp_path / "b.json", "--probe", "knn", weights=f"{RANDOM}#3")
    assert results(tmp_path / "a.json") == results(tmp_path / "b.json")
    assert json.loads((tmp_path / "a.json").read_text())["which"] == "target"
    sentence = evaluate("--which", "context", weights=str(file)).error
    assert sentence == f"{file} holds the target encoder alone, not the context encoder"
    assert evaluate(weights="runs/absent").error == "there is no runs/absent"


def test_a_fifth_is_held_out_of_a_folder_without_val(evaluate, photographs, tmp_path):
    outcome = evaluate("--json", tmp_path / "r.json", "--probe", "knn", data=photographs)
    about = json.loads((tmp_path / "r.json").read_text())
    assert (about["train_images"], about["val_images"]) == (32, 8)
    assert "held out by a fixed seed" in outcome.out


def test_images_that_train_and_val_share_are_warned_of(evaluate, root, tmp_path):
    for part in ("train", "val"):
        for file in (root / part).glob("*/*.jpg"):
            copy = tmp_path / part / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for number in (0, 1):
        leak = tmp_path / "val" / "class_2" / f"{number}.jpg"
        leak.write_bytes((tmp_path / "train" / "class_1" / f"{number}.jpg").read_bytes())
    outcome = evaluate("--probe", "knn", data=tmp_path)
    assert outcome.code == 0
    assert outcome.err.startswith("warning: 2 of the 22 evaluated images are, byte for byte, among the training images")


def test_a_table_of_labels(evaluate, root, tmp_path):
    """Classes from a column, in images of one folder, and the split from another column."""
    rows = ["file,animal,split"]
    for part in ("train", "val"):
        files = sorted((root / part).glob("*/*.jpg"))
        rows += [f"{part}/{file.parent.name}/{file.name},{file.parent.name},{part}" for file in files]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    words = "--labels", tmp_path / "labels.csv", "--probe", "knn,logistic", "--json"
    assert evaluate(*words, tmp_path / "csv.json", "--column", "animal").code == 0
    evaluate("--probe", "knn,logistic", "--json", tmp_path / "folders.json")
    assert results(tmp_path / "csv.json") == results(tmp_path / "folders.json")
    sentence = evaluate(*words, tmp_path / "csv.json").error
    assert sentence.endswith("labels.csv has no column label; it has animal, split")


@pytest.mark.parametrize(
    ("words", "layout", "sentence"),
    [
        ([], "flat", "has no labels: its images lie in no class folder; put each class into a folder of its own"),
        ([], "one class", "holds one class only, only; a classifier needs at least two"),
        ([], "val of another class", "holds the class other, which"),
        (["--k", "29"], "", "k-NN was asked for the 29 nearest of 28 images; k must be from 1 to 28"),
        (["--labels", "absent.csv"], "", "absent.csv cannot be read as CSV: No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence(words, layout, sentence, evaluate, root, tmp_path):
    data = root
    if layout:
        data, image = tmp_path, next(root.glob("train/*/*.jpg")).read_bytes()
        paths = {
            "flat": ["a.jpg", "b.jpg"],
            "one class": ["only/a.jpg", "only/b.jpg"],
            "val of another class": ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/other/1.jpg"],
        }[layout]
        for path in paths:
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            (data / path).write_bytes(image)
    assert sentence in evaluate("--probe", "knn", *words, data=data).error


@pytest.mark.parametrize("name", ["random:vit_none/8@24", "random:vit_tiny/7@24", "random:vit_tiny"])
def test_random_weights_of_no_model(name, evaluate):
    assert "random:" in evaluate(weights=name).error


def test_features_that_are_not_finite(root, monkeypatch):
    def broken(images, layers=1, pool="mean"):
        return torch.full((len(images), layers * 24), float("nan"))

    model = SimpleNamespace(encoder=open_weights(RANDOM).encoder, features=broken)
    extractor = Extractor(model, PillowDecoder(1), World(0, 1, CPU, "single"), cache=None, batch=8, threads=1)
    with pytest.raises(UserError, match="features of val are not finite: the weights are those of a run that diverged"):
        extractor.features(open_dataset(root, threads=1).val, "val")
