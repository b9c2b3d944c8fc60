"""Files that are not what they seem: one sentence that names what and where, and nothing half loaded."""
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from released_file import SMALL, Training, new_training, released_dict, write_released

import ijepa_fast
from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.config import load_config
from ijepa_fast.convert import main as convert
from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES
from ijepa_fast.weights.load import read
from ijepa_fast.weights.ours import ALONE, write


class Runs:
    """A pickle of it creates a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def training() -> Training:
    return new_training()


@pytest.fixture(scope="module")
def exported(training, tmp_path_factory) -> Path:
    """The same weights as one safetensors file."""
    folder = tmp_path_factory.mktemp("exported")
    write(folder / "weights.safetensors", read(write_released(folder / "weights.pth.tar", training)))
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def run_folder(training, tiny_config, tmp_path_factory):
    """A run with the checkpoints of steps 2 and 4, and a third that is being written."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_tiny", SMALL)
        config, _ = load_config(tiny_config)
        run = Checkpoints(folder, 3, ALONE)
        tensors = {name: getattr(training, name).state_dict() for name in ("encoder", "predictor", "target_encoder")}
        run.write(2, tensors, config)
        tensors["target_encoder"] = {name: value + 1 for name, value in tensors["target_encoder"].items()}
        run.write(4, tensors, config)
        half = run.folder / ".writing_step_00000006"
        shutil.copytree(run.path(4), half)
        (half / "checkpoint.json").unlink()
        yield folder


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        ijepa_fast.load(path)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert str(path) in sentence
    return sentence


def changed(training: Training, tmp_path: Path, change) -> str:
    """What is said of a file whose target encoder `change` has changed."""
    held = released_dict(training)
    change(held["target_encoder"])
    torch.save(held, tmp_path / "weights.pth.tar")
    return refused(tmp_path / "weights.pth.tar")


def without(block: int):
    return lambda weights: [weights.pop(name) for name in list(weights) if f"blocks.{block}." in name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: w.update({"module.blocks.1.mlp.fc1.bias": torch.zeros(5)}),
            "target_encoder: blocks.1.mlp.fc1.bias has shape [5]; with its other tensors it must be [768]",
        ),
        (without(0), "target_encoder holds nothing of blocks.0, a block that the model must have"),
        (without(1), "encoder and target_encoder are of different architectures"),
        (lambda w: w.pop("module.norm.weight"), "target_encoder holds no norm.weight, so it is not an I-JEPA encoder"),
        (
            lambda w: w.update({"module.cls_token": torch.zeros(1, 1, 192)}),
            "target_encoder holds cls_token, which an I-JEPA encoder does not have",
        ),
        (lambda w: w.update({"module.norm.bias": 3}), "target_encoder holds 'module.norm.bias', a int, where a named"),
        (
            lambda w: w.update({"module.norm.bias": torch.zeros(192, dtype=torch.int64)}),
            "target_encoder: norm.bias is torch.int64, not floating point",
        ),
        (
            lambda w: w.update({"module.pos_embed": torch.zeros(1, 35, 192)}),
            "target_encoder: pos_embed has 35 positions, which are not the patches of a square",
        ),
        (lambda w: w.pop("module.patch_embed.proj.weight"), "target_encoder holds no patch_embed.proj.weight"),
    ],
)
def test_tensors_that_are_no_encoder(training, tmp_path, change, said):
    assert said in changed(training, tmp_path, change)


def test_a_width_that_is_none_of_ours(training, tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(100, 3, 4, 4), "pos_embed": torch.zeros(1, 36, 100),
                "blocks.0.mlp.fc1.weight": torch.zeros(400, 100)}, tmp_path / "w.pth")  # fmt: skip
    assert "the number of heads cannot be told from its width 100" in refused(tmp_path / "w.pth")


def test_a_predictor_of_another_encoder(training, tmp_path):
    held = released_dict(training)
    held["predictor"]["module.predictor_pos_embed"] = torch.zeros(1, 49, 48)
    torch.save(held, tmp_path / "weights.pth.tar")
    said = "predictor: predictor_pos_embed has shape [1, 49, 48]; with its other tensors it must be [1, 36, 48]"
    assert said in refused(tmp_path / "weights.pth.tar")


def test_a_pickle_that_runs_code(tmp_path, training):
    runs = Runs(tmp_path / "ran")
    for name, held in {"bare": runs, "inside": released_dict(training) | {"notes": runs}}.items():
        torch.save(held, tmp_path / f"{name}.pth.tar")
        assert "so loading it could run code, and it is refused" in refused(tmp_path / f"{name}.pth.tar")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999999])
def test_truncated_files(training, exported, tmp_path, share):
    whole = write_released(tmp_path / "whole.pth.tar", training)
    for path, said in ((whole, "is no whole PyTorch file"), (exported, "is no whole safetensors file")):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: int(len(data) * share)])
        assert said in refused(tmp_path / path.name)


def test_a_safetensors_header_that_lies(exported, tmp_path):
    data = exported.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = "target_encoder.norm.bias"
    for number, change in enumerate(
        (
            {"shape": [193]},  # another number of values than it has bytes
            {"data_offsets": [0, 4 * 192]},  # the bytes of another tensor
            {"data_offsets": [len(data), len(data) + 4 * 192]},  # beyond the end
            {"dtype": "F64"},
        )
    ):
        text = json.dumps(header | {name: header[name] | change}).encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        assert "is no whole safetensors file" in refused(path)
    for number, begin in enumerate((struct.pack("<Q", 2**60), struct.pack("<Q", len(data)))):
        path = tmp_path / f"header{number}.safetensors"
        path.write_bytes(begin + data[8:])
        assert "is no whole safetensors file" in refused(path)


def test_a_run_in_the_middle_of_a_save_gives_what_is_whole(run_folder, training):
    model = ijepa_fast.load(run_folder)
    assert (model.about["step"], model.which) == (4, "target")
    assert torch.equal(model.encoder.norm.bias, training.target_encoder.norm.bias + 1)
    assert ijepa_fast.load(run_folder / "checkpoints" / "step_00000002").about["step"] == 2
    assert "holds no weights that are known here" in refused(run_folder / "checkpoints" / ".writing_step_00000006")


def test_a_run_that_has_saved_nothing_yet(run_folder, tmp_path):
    shutil.copytree(run_folder / "checkpoints" / ".writing_step_00000006", tmp_path / "checkpoints" / ".writing_step_1")
    assert "is neither a checkpoint nor a run folder that holds one" in refused(tmp_path)


def test_a_damaged_checkpoint(run_folder, tmp_path):
    shutil.copytree(run_folder / "checkpoints" / "step_00000004", tmp_path / "step")
    (shard,) = (tmp_path / "step").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "is damaged: size or checksum differ" in refused(tmp_path / "step")


def test_another_depth_than_the_config_says(run_folder, monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", SMALL._replace(depth=3))
    assert "encoder: by its tensors its number of blocks is 2, by its config 3" in refused(run_folder)


def test_what_is_nothing_of_the_kind(tmp_path):
    assert "there is no " in refused(tmp_path / "nowhere")
    assert "holds no weights that are known here" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("weights")
    assert "holds no weights that are known here" in refused(tmp_path / "notes.txt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list, not a checkpoint or a state dict" in refused(tmp_path / "list.pt")


def test_a_conversion_that_cannot_be_leaves_nothing(exported, run_folder, tmp_path, capfd):
    for words, said in (
        ([exported, "--to", "released"], "a released checkpoint needs opt, epoch, which the source does not hold"),
        ([run_folder, "--to", "released"], "does not say over how many images it was trained"),
        ([exported, "--to", "hf", "optim.lr=1"], "--to hf takes no config; a run needs one"),
        ([tmp_path / "nowhere", "--to", "hf"], "there is no"),
    ):
        assert convert([str(words[0]), str(tmp_path / "out"), *words[1:]]) == 2
        error = capfd.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not list(tmp_path.iterdir())
    assert convert([str(exported), str(exported), "--to", "safetensors"]) == 2
    assert "is there already" in capfd.readouterr().err
