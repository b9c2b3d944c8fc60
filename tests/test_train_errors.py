"""What can go wrong for a user, through the command line: one sentence, exit code 2, nothing lost or left behind."""
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ijepa_fast.train as driver
from ijepa_fast import distributed
from ijepa_fast.config import load_config
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.memory import memory_advice
from ijepa_fast.metrics import read_log
from ijepa_fast.run import build_run
from ijepa_fast.run_folder import MARKER

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> Path:
    """A run of 4 updates, with checkpoints of steps 2 and 4; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["optim.epochs=1", "optim.epoch_length=4", "train.checkpoint_every=2", f"train.folder={folder}"]
    assert driver.main(["--config", str(tiny_config), *words]) == 0
    return folder


FINISHED = ("optim.epochs=1", "optim.epoch_length=4", "train.checkpoint_every=2")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of `finished` to resume in: the words that do, and the folder."""

    def copy(*, without: str = "nothing") -> tuple[tuple[str, ...], Path]:
        folder = tmp_path / "run"
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(without))
        return (*FINISHED, f"train.folder={folder}", "--resume"), folder

    return copy


def snapshot(folder: Path) -> dict[Path, bytes]:
    """All files but the one that names the last process that came to write."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != MARKER}


# --- configs that cannot be -------------------------------------------------------------------------------------------


EARLY = {
    "optim.epoch=3": "unknown key optim.epoch; did you mean optim.epochs?",
    "optim.lr=fast": "optim.lr='fast' should be a valid number",
    "data.image_size=26": "data.image_size 26 is not divisible by model.patch_size 4",
    "mask.group=3": "mask.group 3 does not divide optim.global_batch_size 8",
    "mask.min_keep=30": "mask.min_keep=30 cannot be met",
    "data.root=/nowhere/at/all": "data folder /nowhere/at/all does not exist",
    "data.probe_root=/nowhere/at/all": "data folder /nowhere/at/all does not exist",
    "optim.global_batch_size=48": "40 images are fewer than one global batch of 48",
    "parallel.strategy=ddp": "parallel.strategy=ddp needs torchrun",
}
LATE = {  # what a dry run, which opens neither run folder nor checkpoint, does not see
    "train.folder=/proc/none": "train.folder=/proc/none cannot be written",
    "train.init_from=/nowhere/at/all": "train.init_from: there is no /nowhere/at/all",
}


@pytest.mark.parametrize(
    ("override", "mode"), [(o, "train") for o in (*EARLY, *LATE)] + [(o, "dry run") for o in EARLY]
)
def test_a_config_that_cannot_be(override, mode, train, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    options = ["--dry-run"] if mode == "dry run" else []
    outcome = train(f"train.folder={tmp_path / 'run'}", "log.probe_every=5", override, *options)
    assert (EARLY | LATE)[override] in outcome.error
    assert not (tmp_path / "run").exists()  # the next try is not told that there is a run already


def test_no_such_config(train, tmp_path):
    assert "none.yaml cannot be read: No such file or directory" in train(config=tmp_path / "none.yaml").error


@pytest.mark.parametrize("make", ["empty", "other files", "a file", "damaged header", "train and val"])
def test_data_folder_that_is_none(make, train, tmp_path):
    root, sentence = tmp_path / "data", None
    if make != "a file":
        root.mkdir()
    if make == "empty":
        sentence = f"no image below {root}: no other files seen"
    elif make == "other files":
        (root / "notes.txt").write_text("words")
        (root / "images.tar").write_bytes(b"tar")
        sentence = f"no image below {root}: 2 other files seen"
    elif make == "a file":
        root.write_text("words")
        sentence = f"data folder {root} is a file"
    elif make == "damaged header":
        (root / "a.jpg").write_bytes(b"\xff\xd8 nonsense")
        sentence = f"{root}/a.jpg cannot be read as an image"
    else:
        for name in ("train/a.png", "val/b.png"):
            (root / name).parent.mkdir()
            Image.new("RGB", (30, 30)).save(root / name)
        sentence = f"name one: data.root={root}/train"
    assert sentence in train(f"data.root={root}", f"train.folder={tmp_path / 'run'}").error


def test_probe_folder_without_labels(train, tmp_path):
    for n in range(3):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{n}.png")
    outcome = train(f"data.probe_root={tmp_path}", f"train.folder={tmp_path / 'run'}", "log.probe_every=5")
    assert f"{tmp_path} holds no class folders, which a k-NN probe needs" in outcome.error


# --- the command line -------------------------------------------------------------------------------------------------


def test_exit_code_and_stderr_of_the_real_command(tiny_config, tmp_path):
    command = [sys.executable, "-m", "ijepa_fast.train", "--config", str(tiny_config), f"train.folder={tmp_path}/run"]
    done = subprocess.run([*command, "data.root=/nowhere/at/all"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: data folder /nowhere/at/all does not exist\n"
    assert done.stdout == ""


def test_help_mentions_what_matters(capsys):
    with pytest.raises(SystemExit) as left:
        driver.main(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--config", "--resume", "--dry-run", "--print-config", "section.key=value", "train.folder", "torchrun",
                 "log.csv", "log.jsonl", "tensorboard/", "curves.png", "masks.png", "checkpoints/", "Ctrl-C",
                 "SIGTERM", "released I-JEPA", "optim.micro_batch=64"):  # fmt: skip
        assert word in text


def test_without_a_config(capsys):
    with pytest.raises(SystemExit) as left:
        driver.main([])
    assert left.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_options_and_overrides_in_any_order(train, tmp_path):
    outcome = train("optim.epochs=9", "--print-config", "optim.lr=0.5", f"train.folder={tmp_path}")
    assert outcome.code == 0
    assert "epochs: 9" in outcome.out
    assert "lr: 0.5" in outcome.out


def test_printed_config_is_a_config_and_the_same_one(train, tmp_path):
    outcome = train("--print-config", "optim.momentum=[0.9, 1]", "data.root=some where", "log.probe_every=null")
    assert outcome.err == ""
    (tmp_path / "printed.yaml").write_text(outcome.out)
    again = train("--print-config", config=tmp_path / "printed.yaml")
    assert again.out == outcome.out
    assert load_config(tmp_path / "printed.yaml")[0].optim.momentum == (0.9, 1.0)


def test_ctrl_c_before_the_first_step(train, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ijepa_fast.train.train", interrupt)
    outcome = train(f"train.folder={tmp_path / 'run'}")
    assert outcome.code == 130
    assert outcome.err == "interrupted; --resume goes on from the last checkpoint, if there is one\n"


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_a_run_is_not_written_over(train, finished):
    before = snapshot(finished)
    sentence = train(*FINISHED, f"train.folder={finished}").error
    assert sentence.startswith(f"{finished} already holds a run; go on with --resume, or choose another train.folder, ")
    assert snapshot(finished) == before


def test_nothing_to_resume(train, tmp_path):
    sentence = train("--resume", f"train.folder={tmp_path}").error
    assert sentence == f"there is no run in {tmp_path} to resume; leave out --resume to start one"


@pytest.mark.parametrize(
    "override",
    ["model.predictor_dim=96", "mask.sampler=corrected", "optim.lr=0.01", "train.seed=1", "data.image_size=28",
     "data.crop_scale=[0.5, 1]", "data.root=OTHER", "optim.global_batch_size=4"],
)  # fmt: skip
def test_another_config_does_not_continue_a_run(override, train, copy, photographs, tmp_path):
    words, folder = copy()
    if override == "data.root=OTHER":
        shutil.copytree(photographs, tmp_path / "other")
        override = f"data.root={tmp_path / 'other'}"
    before = snapshot(folder)
    key = override.partition("=")[0]
    sentence = train(*words, override).error
    assert sentence.startswith(f"{folder}/config.yaml was written with {key}=")
    assert snapshot(folder) == before


def test_what_may_change_may_change(train, copy):
    words, folder = copy(without="step_00000004")
    allowed = ("log.every=2", "log.probe_every=4", "parallel.strategy=single", "data.threads=1",
               "data.decoder=auto", "optim.micro_batch=3", "train.keep_last=1")  # fmt: skip
    outcome = train(*words, *allowed)
    assert outcome.code == 0, outcome.err
    assert f"resumed from {folder}/checkpoints/step_00000002\n" in outcome.out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_damaged_checkpoint_is_passed_over_and_later_replaced(train, copy, finished):
    words, folder = copy()
    latest = folder / "checkpoints" / "step_00000004"
    (shard,) = latest.glob("*.safetensors")
    os.truncate(shard, 1000)
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert f"checkpoint passed over: {shard} is damaged" in outcome.out
    assert f"resumed from {folder}/checkpoints/step_00000002\n" in outcome.out
    undisturbed, again = load_file(finished / "checkpoints" / latest.name / shard.name), load_file(shard)
    assert all(torch.equal(again[name], tensor) for name, tensor in undisturbed.items())


def test_nothing_but_damaged_checkpoints(train, copy):
    words, folder = copy()
    for about in folder.glob("checkpoints/*/checkpoint.json"):
        about.write_text("{")
    before = snapshot(folder)
    assert f"no checkpoint in {folder}/checkpoints is whole" in train(*words).error
    assert snapshot(folder) == before


def test_a_file_that_is_no_checkpoint_to_init_from(train, tmp_path):
    (tmp_path / "checkpoint.json").write_text("garbage")
    outcome = train(f"train.init_from={tmp_path}", f"train.folder={tmp_path / 'run'}")
    assert f"train.init_from: {tmp_path} is no readable checkpoint: checkpoint.json" in outcome.error


def test_weights_of_another_model_to_init_from(train, finished, tmp_path):
    words = (f"train.init_from={finished}", f"train.folder={tmp_path / 'run'}", "model.predictor_dim=96")
    assert "holds another model than the config describes: its predictor." in train(*words).error


def test_init_from_starts_at_step_0_with_those_weights(train, finished, tmp_path):
    words = (*FINISHED, f"train.init_from={finished}", f"train.folder={tmp_path / 'run'}")
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    said = "step_00000004 of a run of ijepa_fast: both encoders and the predictor\n"
    assert f"weights from {finished}, {said}" in outcome.out
    fresh, (first, *_) = read_log(finished)[0], read_log(tmp_path / "run")[0]
    assert first["step"] == 1
    # With the weights after 4 updates, the first loss is not that of new weights but near that of the last update.
    assert abs(first["loss"] - fresh[-1]["loss"]) < 0.5 * abs(first["loss"] - fresh[0]["loss"])


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_disk_full_while_saving_keeps_the_checkpoint_before(train, copy, finished):
    words, folder = copy(without="step_00000004")
    before = snapshot(folder / "checkpoints")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, limit[1]))  # no file beyond 10 MiB: a checkpoint has 80
    try:
        outcome = train(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "the checkpoint of step 4 could not be written" in outcome.error
    assert "File too large; that of step 2 is intact; make room, then go on with --resume" in outcome.error
    assert snapshot(folder / "checkpoints") == before

    assert train(*words).code == 0
    again, undisturbed = read_log(folder)[0], read_log(finished)[0]
    assert [row["loss"] for row in again] == [row["loss"] for row in undisturbed]


def no_memory_cpu() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def no_memory_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("fail", [no_memory_cpu, no_memory_cuda])
@pytest.mark.parametrize("mode", ["train", "dry run"])
def test_out_of_memory_names_the_micro_batch_to_lower(fail, mode, train, monkeypatch, tmp_path):
    monkeypatch.setattr("ijepa_fast.step.ijepa_loss", lambda *args, **kwargs: fail())
    outcome = train(f"train.folder={tmp_path / 'run'}", *(["--dry-run"] if mode == "dry run" else []))
    assert outcome.error.startswith("out of memory with optim.micro_batch=8; lower it, for instance to 4 ")


def test_other_runtime_errors_are_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match="another"), memory_advice(8):
        raise RuntimeError("another")


@pytest.mark.parametrize(("probe_every", "save_every"), [("null", 1), ("1", 1), ("null", 2)])
def test_weights_that_are_not_finite_are_not_saved(probe_every, save_every, train, tmp_path, monkeypatch):
    """A loss is that of the weights before its update: the update itself may ruin what would be saved next.

    No loss is finite after it, so that all updates are skipped: when something is to be saved the run stops.
    """
    folder = tmp_path / "run"
    update = driver.update

    def ruined(run, *arguments):
        done = update(run, *arguments)
        next(p for p in run.state.encoder.parameters() if p.requires_grad).data.fill_(float("inf"))
        return done

    monkeypatch.setattr(driver, "update", ruined)
    words = (*FINISHED[:2], f"train.checkpoint_every={save_every}", f"log.probe_every={probe_every}")
    outcome = train(*words, f"train.folder={folder}")
    assert outcome.error.startswith(f"the weights after step {save_every} are not finite, so the run stopped")
    for shard in folder.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(shard).values()), shard


# --- several processes ------------------------------------------------------------------------------------------------


def test_global_batch_that_does_not_divide(tiny_config, tmp_path):
    config, _ = load_config(tiny_config, [f"train.folder={tmp_path}"])
    said = r"optim\.global_batch_size 8 does not divide among 3 processes"
    with pytest.raises(UserError, match=said), build_run(config, World(0, 3, torch.device("cpu"), "ddp")):
        pass


def test_single_strategy_with_several_processes(tiny_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with (
        pytest.raises(UserError, match=r"parallel\.strategy=single runs one process, but 2 were started"),
        distributed.join(load_config(tiny_config, ["parallel.strategy=single"])[0]),
    ):
        pass


# --- the dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_dry_run_tells_and_writes_nothing(micro_batch, train, photographs, tmp_path, monkeypatch):
    cache, here, run = tmp_path / "cache", tmp_path / "here", tmp_path / "run"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = sorted(photographs.rglob("*"))
    outcome = train("--dry-run", f"train.folder={run}", f"optim.micro_batch={micro_batch}", "log.probe_every=5")
    assert outcome.code == 0, outcome.err
    for words in ("vit_tiny, 5.4 M parameters", "40 images; 5 steps an epoch, 20 in all", f"{micro_batch} images: ",
                  "update", "GiB at the peak", "nothing was written"):  # fmt: skip
        assert words in outcome.out
    parts = -(-8 // micro_batch)
    assert f"a step of {parts} micro-batches about" in outcome.out
    assert not cache.exists()
    assert not run.exists()
    assert list(here.iterdir()) == []
    assert sorted(photographs.rglob("*")) == before


def test_dry_run_in_a_run_folder_leaves_it_alone(train, finished):
    before = snapshot(finished)
    assert f"{finished} already holds a run" in train("--dry-run", *FINISHED, f"train.folder={finished}").error
    outcome = train("--dry-run", "--resume", *FINISHED, f"train.folder={finished}")
    assert outcome.code == 0, outcome.err
    assert f"would go on from {finished}/checkpoints/step_00000004\n" in outcome.out
    assert snapshot(finished) == before
