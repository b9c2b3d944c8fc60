"""The demo's photographs are real ones, and its config goes all the way to the table, in a few seconds of it."""
import contextlib
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_fast import demo
from ijepa_fast.config import load_config
from ijepa_fast.data.index import build_index
from ijepa_fast.demo import PHOTOGRAPHS, write_photographs
from ijepa_fast.errors import UserError
from ijepa_fast.evaluate import held_out
from ijepa_fast.metrics import read_log

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
MISSING = [package for package in ("skimage", "sklearn") if find_spec(package) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed, and they ship the photographs: {MISSING}"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "photographs"
    write_photographs(folder)
    return folder


def test_about_ten_colour_photographs_in_jpeg(root):
    files = sorted(root.iterdir())
    assert len(files) == sum(map(len, PHOTOGRAPHS.values())) == 10
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            pixels = np.asarray(image.resize((64, 64))).astype(float)
        assert np.ptp(pixels, axis=2).max() > 20, f"{path} is gray"
        assert pixels.std() > 10, f"{path} shows nothing"


def test_every_photograph_is_another_and_large_enough(root):
    index = build_index(root)
    assert len(index) == 10
    assert len({(root / name).read_bytes() for name in map(index.path, range(10))}) == 10
    # Halves of them are cropped to the demo's pixels: none is enlarged by much.
    assert index.records["width"].min() >= 2 * 112
    assert index.records["height"].min() >= 2 * 112


def test_a_second_call_writes_nothing_again(root):
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert sorted(write_photographs(root)) == sorted(before)
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_the_config_fits_the_photographs(root):
    config, _ = load_config(DEMO)
    assert config.optim.global_batch_size == demo.IN_TABLE == len(list(root.iterdir()))
    with pytest.raises(UserError, match="two images"):
        held_out(np.arange(10), config.log.probe_images)  # so the probe of the demo is RankMe alone


def test_it_trains_and_ends_with_what_it_made(root, capfd, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(demo, "IN_TABLE", 3)
    small = (
        f"data.root={root}", f"train.folder={folder}", "optim.epochs=1", "optim.epoch_length=2", "data.image_size=64",
        "model.predictor_depth=1", "mask.min_keep=2", "parallel.cpu_threads=1",
    )  # fmt: skip
    code = demo.main(["--config", str(DEMO), *small])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert [row["step"] for row in read_log(folder)[0]] == [1, 2]
    assert f"checkpoint  {folder}/checkpoints/step_00000002\n" in out
    for name, file in (("curves", "curves.png"), ("mask sheet", "masks.png")):
        assert re.search(rf"{name} +{folder}/{file}\n", out)
        with contextlib.closing(Image.open(folder / file)) as image:
            image.load()
            assert image.format == "PNG"

    table = {name: re.search(rf"{name} +│ +(\d+\.\d)% ", out) for name in
             ("chance", "mean colour", "features before", "features after")}  # fmt: skip
    assert all(table.values()), out
    assert float(table["chance"][1]) == 33.3
    assert "3 photographs" in out
    assert "Minutes on a few images show that every part works" in out
