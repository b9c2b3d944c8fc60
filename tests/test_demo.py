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
from ijepa_fast.evaluation.probe import held_out
from ijepa_fast.flops import StepFlops, step_flops
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.metrics import read_log
from ijepa_fast.model import SIZES, Size
from ijepa_fast.retrieval import CANDIDATES

_SHARES = r"\d+\.\d% +│ +\d+\.\d%"
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
    # Crops of 0.3 of them are shrunk to the demo's pixels.
    assert index.records["width"].min() >= 2 * 112
    assert index.records["height"].min() >= 2 * 112


def test_a_second_call_writes_nothing_again(root):
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert sorted(write_photographs(root)) == sorted(before)
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_the_config_fits_the_photographs(root):
    config, _ = load_config(DEMO)
    assert len(list(root.iterdir())) == demo.IN_TABLE
    with pytest.raises(UserError, match="two images"):
        held_out(np.arange(10), config.log.probe_images)  # so the probe of the demo is RankMe alone


def test_its_work_is_at_most_ten_tflop():
    """Updates, probes and the table; a machine's FLOP/s then say how long it takes."""
    config, _ = load_config(DEMO)
    model, batch = config.model, config.optim.global_batch_size
    encoder = SIZES[model.name]
    predictor = Size(model.predictor_dim, model.predictor_depth, encoder.num_heads, 4 * model.predictor_dim)
    assert config.optim.epoch_length is not None
    steps = config.optim.epochs * config.optim.epoch_length

    def flops(step: int, images: int) -> StepFlops:
        masks = MultiBlockMasks(config.mask, config.grid, 0, images).sample(step, 0, images)
        lengths = [packed.cu_seqlens.diff().numpy() for packed in (masks.context, masks.target)]
        return step_flops(
            encoder, predictor, model.patch_size, images=images, patches=config.grid**2, context_lengths=lengths[0],
            target_lengths=lengths[1], context_of=masks.context_of.numpy(),
        )  # fmt: skip

    updates = sum(flops(step, batch).total for step in range(steps))
    asked = flops(0, demo.IN_TABLE)
    table = 3 * CANDIDATES * (asked.target + (asked.context + asked.predictor) / 3)  # no backward
    assert config.log.probe_every is not None
    probes = (1 + steps // config.log.probe_every) * config.log.probe_images * asked.target / demo.IN_TABLE
    assert updates + table + probes <= 10e12


def test_it_trains_and_ends_with_what_it_made(root, capfd, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(demo, "IN_TABLE", 3)
    small = (
        f"data.root={root}", f"train.folder={folder}", "optim.epochs=1", "optim.epoch_length=2", "data.image_size=64",
        "model.predictor_depth=1", "parallel.cpu_threads=1",
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

    for name, values in {
        "chance": r"3\.3% +│ +33\.3%",
        "mean colour of the context nearby": _SHARES,
        "predictor before": _SHARES,
        "predictor after": _SHARES,
        "predictor after, shown another photograph": _SHARES,
    }.items():
        assert re.search(rf"│ {name} +│ +{values} +│", out), out
    assert "30 crops of 3 photographs" in out
    with Image.open(folder / "retrieval.png") as image:
        assert image.format == "PNG"


def test_a_run_that_is_stopped_shows_no_table(root, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda run, console, resume: False)
    assert demo.main(["--config", str(DEMO), f"data.root={root}", f"train.folder={tmp_path / 'run'}"]) == 0
    assert "Which block" not in capfd.readouterr().out
