"""Released checkpoints: read, continued as a run of ours, and written back."""
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from released_file import SMALL, Training, new_training, released_dict, released_optimizer, write_released

import ijepa_fast
from bench.baselines.straight import straight_step
from ijepa_fast.checkpoint import digest
from ijepa_fast.config import load_config
from ijepa_fast.convert import main as convert
from ijepa_fast.model import SIZES
from ijepa_fast.run import build_run
from ijepa_fast.weights.load import read
from ijepa_fast.weights.ours import ALONE

pytestmark = pytest.mark.long

EPOCH, STEPS_PER_EPOCH, EPOCHS, WARMUP, STRETCH = 2, 1, 3, 1, 2
# One group and one micro-batch, so that masks are rectangles of the whole batch.
RECIPE = (
    f"optim.epoch_length={STEPS_PER_EPOCH}", f"optim.epochs={EPOCHS}", f"optim.schedule_stretch={STRETCH}",
    "mask.group=8",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_tiny", SMALL)
        yield


@pytest.fixture(scope="module")
def training() -> Training:
    return new_training()


@pytest.fixture(scope="module")
def released(training, tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "jepa-ep2.pth.tar", training)


@pytest.fixture(scope="module")
def run_folder(released, tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert convert([str(released), str(folder), "--to", "run", "--config", str(tiny_config), *RECIPE]) == 0
    return folder


@pytest.mark.parametrize("which", ["target", "context"])
def test_features_and_predictions_are_those_of_plain_modules(released, training, which):
    model = ijepa_fast.load(released, which)
    assert (model.which, model.image_size, model.patch_size) == (which, 24, 4)
    assert model.about["epoch"] == EPOCH
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    twin = training.target_encoder if which == "target" else training.encoder
    with torch.no_grad():
        torch.testing.assert_close(model.features(images, pool=None), twin(images), rtol=0, atol=1e-5)
        masks = [torch.tensor([[0, 1, 7], [2, 3, 4]])], [torch.tensor([[14, 15], [20, 21]])]
        expected = training.predictor(training.encoder(images, masks[0]), *masks).flatten(0, 1)
    packed = [ijepa_fast.Packed.from_masks(mask, 36) for mask in masks]
    # The context encoder looks, whichever encoder was asked for.
    torch.testing.assert_close(model.predict(images, *packed), expected, rtol=0, atol=1e-5)


def test_a_released_run_goes_on_as_it_would_have(released, training, run_folder, train):
    """By the released formulas: the rates of the third update, AdamW, and the moving average."""
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step_00000002"]
    outcome = train("--resume", config=run_folder / "config.yaml")
    assert outcome.code == 0, outcome.err
    (row,) = csv.DictReader((run_folder / "log.csv").open())
    ours = read(run_folder)

    step, total = EPOCH * STEPS_PER_EPOCH, STRETCH * EPOCHS * STEPS_PER_EPOCH
    warmup = WARMUP * STEPS_PER_EPOCH
    cosine = 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup)))
    lr = max(1e-6, 1e-6 + (1e-3 - 1e-6) * cosine)
    weight_decay = min(0.4, 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * (step + 1) / total)))
    momentum = 0.996 + step * (1 - 0.996) / total
    assert (int(row["step"]), int(row["epoch"])) == (step + 1, EPOCH + 1)
    assert [float(row[k]) for k in ("lr", "weight_decay", "momentum")] == pytest.approx([lr, weight_decay, momentum])

    twin = new_training()  # the same once more
    optimizer = released_optimizer(twin.encoder, twin.predictor)
    optimizer.load_state_dict(torch.load(released)["opt"])
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not group.get("WD_exclude"):
            group["weight_decay"] = weight_decay
    with build_run(load_config(run_folder / "config.yaml")[0], ALONE) as run:
        batch = next(run.data.loader.batches(step, step + 1))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (batch.images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    contexts = [batch.masks.context.indices.long().view(8, -1)]
    targets = list(batch.masks.target.indices.long().view(8, 4, -1).unbind(1))
    straight_step(*twin[:3], optimizer, images, contexts, targets, momentum)

    moved = 0.0
    for weights, model, before in (
        (ours.encoders["context"], twin.encoder, training.encoder),
        (ours.predictor, twin.predictor, training.predictor),
        (ours.encoders["target"], twin.target_encoder, training.target_encoder),
    ):
        for name, expected in model.state_dict().items():
            moved = max(moved, float((expected - before.state_dict()[name]).abs().max()))
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert moved > 1e-4  # a hundred times the tolerance


def test_written_back_every_tensor_is_the_same_byte_for_byte(released, tiny_config, tmp_path):
    folder, back = tmp_path / "run", tmp_path / "back.pth.tar"
    assert convert([str(released), str(folder), "--to", "run", "--config", str(tiny_config)]) == 0
    assert convert([str(folder), str(back), "--to", "released"]) == 0
    before, after = torch.load(released), torch.load(back)
    for name in ("encoder", "predictor", "target_encoder"):
        assert list(before[name]) == list(after[name])
        assert all(same_bytes(before[name][key], after[name][key]) for key in before[name])
    assert before["opt"]["state"].keys() == after["opt"]["state"].keys()
    for index, state in before["opt"]["state"].items():
        assert all(same_bytes(value, after["opt"]["state"][index][key]) for key, value in state.items())
    for old, new in zip(before["opt"]["param_groups"], after["opt"]["param_groups"], strict=True):
        assert (old["params"], old.get("WD_exclude"), old.keys()) == (new["params"], new.get("WD_exclude"), new.keys())
    for key in ("epoch", "batch_size", "world_size", "lr"):
        assert before[key] == after[key]
    # The released code catches what its GradScaler raises, and begins again at epoch 0.
    torch.amp.GradScaler("cpu").load_state_dict(after["scaler"])


def test_in_the_middle_of_an_epoch_it_says_so(released, tiny_config, tmp_path, capfd):
    assert convert([str(released), str(tmp_path / "run"), "--to", "run", "--config", str(tiny_config)]) == 0
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    about = json.loads((path / "checkpoint.json").read_text())
    assert about["data"]["images"] == 40
    about |= {"step": 13}
    (path / "checkpoint.json").write_text(json.dumps(about | {"digest": digest(about)}))
    assert convert([str(tmp_path / "run"), str(tmp_path / "back.pth.tar"), "--to", "released"]) == 0
    assert "note: the source is 3 of 5 updates into the next epoch" in capfd.readouterr().out
    assert torch.load(tmp_path / "back.pth.tar")["epoch"] == 2
    # A run of ours has its recipe in it.
    assert convert([str(tmp_path / "run"), str(tmp_path / "copy"), "--to", "run"]) == 0
    assert read(tmp_path / "copy").about["step"] == 13
    assert load_config(tmp_path / "copy" / "config.yaml")[0].train.folder == tmp_path / "copy"


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def test_as_it_is_from_released_to_released(released, tmp_path):
    assert convert([str(released), str(tmp_path / "same.pth.tar"), "--to", "released"]) == 0
    before, after = torch.load(released), torch.load(tmp_path / "same.pth.tar")
    assert before.keys() == after.keys()
    assert before["opt"]["param_groups"] == after["opt"]["param_groups"]
    assert torch.equal(before["opt"]["state"][3]["exp_avg"], after["opt"]["state"][3]["exp_avg"])


def test_a_bare_state_dict_is_taken_for_a_context_encoder(training, tmp_path):
    torch.save(released_dict(training)["target_encoder"], tmp_path / "weights.pth")
    model = ijepa_fast.load(tmp_path / "weights.pth")
    assert (model.which, model.predictor) == ("context", None)
    torch.testing.assert_close(dict(model.encoder.state_dict()), dict(training.target_encoder.state_dict()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "does not hold the recipe of its run: name it with --config"),
        (["--config", "TINY", "model.predictor_dim=96"], "has model.predictor_dim=48, and the config says 96: give"),
        (["--config", "TINY", "optim.global_batch_size=4"], "has optim.global_batch_size=8, and the config says 4"),
        (["--config", "TINY", "data.image_size=48"], "has data.image_size=24, and the config says 48"),
        (["--config", "TINY", "data.root=/nowhere"], "data folder /nowhere does not exist"),
        (["--config", "TINY", "--which", "target"], "--to run writes both encoders; leave out --which"),
    ],
)
def test_what_a_run_cannot_go_on_from(released, tiny_config, tmp_path, capfd, words, said):
    words = [str(tiny_config) if word == "TINY" else word for word in words]
    assert convert([str(released), str(tmp_path / "run"), "--to", "run", *words]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_optimizer_of_another_model(training, tiny_config, tmp_path, capfd):
    opt = training.optimizer.state_dict()
    state = {index: dict(values) for index, values in opt["state"].items()}
    words = ["--to", "run", "--config", str(tiny_config)]
    for name, change, said in (
        ("missing", lambda: state.pop(3), "opt holds no step and moments of parameter 3, encoder.blocks.0.attn.proj.w"),
        ("shape", lambda: state[3].update(exp_avg=torch.zeros(2)), "exp_avg of parameter 3 has shape [2], where enc"),
    ):
        kept = dict(state[3])
        change()
        path = write_released(tmp_path / f"{name}.pth.tar", training, opt=opt | {"state": state})
        assert convert([str(path), str(tmp_path / "run"), *words]) == 2
        assert said in capfd.readouterr().err
        state[3] = kept
    path = write_released(tmp_path / "none.pth.tar", training, opt=None)
    assert convert([str(path), str(tmp_path / "run"), *words]) == 2
    assert "opt is no state of an optimizer" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
