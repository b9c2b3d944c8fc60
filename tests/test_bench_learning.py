"""bench/learn.py: three providers on the same batches from the same weights, the clock's schedules, the records."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bench.harness.compare import NotRun
from bench.learning import learn
from bench.learning.learners import LEARNERS, Ours, Paced, Straight, published, recipe
from bench.learning.report import report
from ijepa_fast.config import load_config
from ijepa_fast.distributed import World
from ijepa_fast.optim import Schedule
from ijepa_fast.run import build_run

CONFIG = """
model: {name: vit_tiny, patch_size: 4, predictor_depth: 1, predictor_dim: 48}
mask: {sampler: corrected, collate: ragged, min_keep: 1}
data: {root: nowhere, image_size: 32, decoder: pillow, threads: 1}
parallel: {cpu_threads: 1}
optim: {global_batch_size: 4, micro_batch: 2, epochs: 10, warmup_epochs: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ROOT with train and val of three classes of one colour each, and a config beside it."""
    root = tmp_path_factory.mktemp("learn")
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label in range(3):
            (root / "data" / part / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 40, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(root / "data" / part / f"class{label}" / f"{i}.png")
    (root / "small.yaml").write_text(CONFIG)
    return root


def config_of(folder):
    return load_config(folder / "small.yaml", [f"data.root={folder / 'data' / 'train'}", "log.probe_every=null"])[0]


def test_released_recipe_scales_with_the_root_of_the_batch(folder):
    config = published(config_of(folder))
    assert config.optim.lr == pytest.approx(1e-3 * (4 / 2048) ** 0.5)
    assert config.optim.warmup_epochs == pytest.approx(10 * 40 / 300)
    assert (config.mask.sampler, config.mask.collate, config.mask.group) == ("reference", "truncate", 4)
    assert config.model == config_of(folder).model


def test_only_the_target_s_products_tell_fp8_from_ours(folder):
    config = config_of(folder)
    low = recipe("ours_fp8", config)
    assert (low.model.target_dtype, low.model.fp8_blocks) == ("fp8", "all")
    assert low.model_copy(update={"model": config.model}) == config == recipe("ours", config)
    assert recipe("released", config) == published(config)


def test_schedule_is_read_at_a_share_of_the_time():
    schedule = Schedule(
        steps_per_epoch=10, epochs=10, warmup_epochs=2, start_lr=0.1, peak_lr=1.0, final_lr=0.01,
        start_weight_decay=0.0, final_weight_decay=0.4, start_momentum=0.9, final_momentum=1.0,
    )  # fmt: skip
    paced = Paced(schedule)
    for share, step in ((0.0, 0), (0.195, 19), (0.5, 50), (1.0, 99)):
        paced.share = share
        assert paced.lr(7) == schedule.lr(step)
        assert paced.weight_decay(7) == schedule.weight_decay(step)
        assert paced.momentum(7) == schedule.momentum(step)


def test_providers_make_the_same_updates(folder):
    """Two updates, two micro-batches each: the second loss depends on the first update of weights and target."""
    config = published(config_of(folder))
    losses = {}
    for name in ("ours", "straight"):
        with build_run(config, World(0, 1, torch.device("cpu"), "single"), write_cache=False) as run:
            learner = LEARNERS[name](run)
            batches = run.data.loader.batches(0, 2)
            learner.pace.share = 0.5
            losses[name] = [float(learner.step(step, batches)) for step in range(2)]
            weights = learner.target_encoder().blocks[0].mlp.fc1.weight.clone()
            losses[name].append(float(weights.abs().sum()))
    # fp32 sums in another order, through a network whose first update is +-lr for every weight.
    assert losses["ours"] == pytest.approx(losses["straight"], rel=2e-4)
    assert losses["ours"][0] != losses["ours"][1]


def test_released_needs_a_checkout(folder):
    with (
        build_run(config_of(folder), World(0, 1, torch.device("cpu"), "single"), write_cache=False) as run,
        pytest.raises(NotRun, match="--released"),
    ):
        LEARNERS["released"](run)
    assert issubclass(LEARNERS["released"], Straight)
    assert LEARNERS["ours"] is Ours


def test_record_and_report(folder, capsys):
    out = folder / "learning" / "results"
    arguments = ["--data", str(folder / "data"), "--minutes", "0.002", "--points", "2", "--config"]
    arguments += [str(folder / "small.yaml"), "--out", str(out), "--providers"]
    learn.main([*arguments, "ours,straight,released", "--seeds", "2", "--final", "--keep", str(folder / "kept")])
    learn.main([*arguments, "ours", "--seeds", "1", "--arm", "first"])
    learn.main([*arguments, "ours", "--seeds", "1", "--arm", "faster", "optim.lr=0.01"])
    assert "released: not run" in capsys.readouterr().out
    assert len(list(out.glob("*.json"))) == 6
    record = json.loads((out / "small-ours-1.json").read_text())
    assert [point["minutes"] >= 0.002 * i / 2 for i, point in enumerate(record["points"])] == [True] * 3
    assert record["images"] == {"train": 30, "evaluated": 9}
    assert str(folder) not in json.dumps(record)
    assert record["pixels"] == 100  # the classes differ by colour alone
    assert (folder / "kept" / "small-ours-1.safetensors").stat().st_size > 1e6
    text = report(out).read_text()
    assert "| random weights | 2 | 0 |" in text
    assert "| straight | 2 |" in text
    gained = [json.loads((out / f"small-ours-{seed}.json").read_text())["points"] for seed in (0, 1)]
    mean = sum(points[-1]["k-NN"] - points[0]["k-NN"] for points in gained) / 2
    (row,) = (line for line in text.splitlines() if line.startswith("| ours - random weights | 2 |"))
    assert row.split(" | ")[4].startswith(f"{mean:+.1f}")
    assert "| ours - straight | 2 |" in text
    assert "| first |  | 1 |" in text
    assert "| faster | optim.lr=0.01 | 1 |" in text
    assert (out.parent / "curves_small.png").stat().st_size > 1e4
