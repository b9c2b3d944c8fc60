"""A run that is killed, stopped and resumed computes, bit for bit, what an undisturbed one does."""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from ijepa_fast import train
from ijepa_fast.metrics import read_log
from ijepa_fast.preemption import StopSignal
from ijepa_fast.train import main

STEPS = 20  # 4 epochs of 5
PATIENCE_S = 300  # for a step to appear in the log, import of torch on a busy machine included
COMMON = ("log.probe_every=3",)

pytestmark = pytest.mark.long


class Stage(NamedTuple):
    """One process in the life of the disturbed run."""

    begun_at: int  # the checkpoint it had to begin with
    ended_at: int  # the last step in its log
    code: int
    out: str


def words(config: Path, folder: Path, *more: str) -> list[str]:
    return ["--config", str(config), f"train.folder={folder}", *COMMON, *more]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*"))


def disturb(
    config: Path, folder: Path, number: signal.Signals, at_step: int, *more: str, after_saving: bool = False
) -> Stage:
    """Run in a process of its own, and send the signal once the log has the row of `at_step`.

    `after_saving`: once there is a checkpoint as well. It is written in the background, but never two at a time.
    """
    begun_at = max(checkpoints(folder), default=0)
    output, log = folder.parent / f"{number.name}.{at_step}.txt", folder / "log.jsonl"
    with open(output, "w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "ijepa_fast.train", *words(config, folder, *more)],
            stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE_S
            # What an earlier process wrote is cut back before the first new row comes, so wait for the file to change.
            before = log.stat().st_ino if log.exists() else None
            while True:
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                rewritten = log.exists() and log.stat().st_ino != before
                if rewritten and last_step(log) >= at_step and (checkpoints(folder) or not after_saving):
                    break
                time.sleep(0.005)
            process.send_signal(number)
            code = process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
    return Stage(begun_at, last_step(log), code, output.read_text())


def interrupt(argv: list[str], at_step: int) -> Stage:
    """Ctrl-C in the middle of that step, in this process."""
    folder = Path(argv[2].removeprefix("train.folder="))
    begun_at, update = checkpoints(folder)[-1], train.update

    def update_under_ctrl_c(run, step, batches):
        if step + 1 == at_step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run, step, batches)

    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, contextlib.redirect_stdout(out):
        patch.setattr(train, "update", update_under_ctrl_c)
        code = train.main(argv)
        return Stage(begun_at, last_step(folder / "log.jsonl"), code, out.getvalue())


def last_step(log: Path) -> int:
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((row["step"] for row in map(json.loads, whole) if row["kind"] == "step"), default=0)


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(words(tiny_config, folder, "train.checkpoint_every=5")) == 0
    assert checkpoints(folder) == [10, 15, 20]
    return folder


@pytest.fixture(scope="module")
def disturbed(tiny_config, tmp_path_factory) -> tuple[Path, list[Stage]]:
    """Killed before its first checkpoint, killed later, stopped by SIGTERM, then by SIGINT; then left to its end.

    Each part has another number of decoder threads.
    """
    folder = tmp_path_factory.mktemp("disturbed") / "run"
    resume = ("--resume", "train.checkpoint_every=4")
    stages = [
        disturb(tiny_config, folder, signal.SIGKILL, 2, "train.checkpoint_every=1000"),
        disturb(tiny_config, folder, signal.SIGKILL, 6, *resume, "data.threads=1", after_saving=True),
    ]
    later = stages[-1].ended_at + 1
    stages.append(disturb(tiny_config, folder, signal.SIGTERM, later, *resume, "data.threads=3"))
    stages.append(interrupt(words(tiny_config, folder, *resume), stages[-1].ended_at + 2))
    assert main(words(tiny_config, folder, *resume, "data.threads=5")) == 0
    return folder, stages


def assert_same_run(a: Path, b: Path) -> None:
    """Equal losses, rates of the schedules, probes and final checkpoints: as text, so bit for bit."""
    (steps_a, probes_a), (steps_b, probes_b) = read_log(a), read_log(b)
    assert [row["step"] for row in steps_b] == list(range(1, STEPS + 1))
    computed = ("epoch", "itr", "loss", "mask-A", "mask-B", "step", "lr", "weight_decay", "momentum")
    assert [[row[name] for name in computed] for row in steps_b] == [[row[n] for n in computed] for row in steps_a]
    assert [row["step"] for row in probes_b] == [*range(0, STEPS, 3), STEPS]
    assert probes_b == probes_a
    csv_a, csv_b = ([line.split(",")[:5] for line in (f / "log.csv").read_text().splitlines()] for f in (a, b))
    assert csv_a == csv_b

    shards = [list((f / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors")) for f in (a, b)]
    tensors_a, tensors_b = (load_file(only) for (only,) in shards)
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name


def test_disturbed_and_undisturbed_runs_are_the_same(undisturbed, disturbed):
    assert_same_run(undisturbed, disturbed[0])


def test_losses_are_of_a_run_that_learns(undisturbed):
    losses = [row["loss"] for row in read_log(undisturbed)[0]]
    assert len(set(losses)) == STEPS


def test_killed_before_the_first_checkpoint(disturbed):
    killed, resumed = disturbed[1][:2]
    assert killed.code == -signal.SIGKILL
    assert killed.ended_at >= 2
    assert resumed.begun_at == 0
    assert "holds no checkpoint yet: starting from step 0" in resumed.out


def test_killed_later_goes_on_from_the_latest_checkpoint(disturbed):
    killed, resumed = disturbed[1][1:3]
    assert killed.code == -signal.SIGKILL
    assert resumed.begun_at % 4 == 0
    assert 0 < resumed.begun_at <= killed.ended_at
    assert f"step_{resumed.begun_at:08d}" in resumed.out


@pytest.mark.parametrize("which", [2, 3], ids=["SIGTERM", "SIGINT"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(which, disturbed):
    stage = disturbed[1][which]
    assert stage.code == 0
    assert f"Stopped after step {stage.ended_at} of {STEPS}. The same command with --resume goes on." in stage.out
    assert "Traceback" not in stage.out


def test_a_signal_saves_the_step_it_came_in(disturbed):
    terminated, interrupted = disturbed[1][2:]
    assert "SIGTERM: finishing this step, then saving (again: leave now)" in terminated.out
    assert interrupted.begun_at == terminated.ended_at
    assert interrupted.ended_at == terminated.ended_at + 2


def test_from_an_epoch_s_end(undisturbed, tiny_config, tmp_path):
    """The checkpoint of step 15 is that of the end of epoch 3."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("step_00000010", "step_00000020"))
    assert main(words(tiny_config, folder, "--resume")) == 0
    assert_same_run(undisturbed, folder)


def test_a_finished_run_stays_as_it_is(undisturbed, tiny_config, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("step_00000010", "step_00000015"))
    aside = (".ijepa_run", "config_history.jsonl")  # which say what was done last
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert main(words(tiny_config, folder, "--resume")) == 0
    out = capfd.readouterr().out
    assert "resumed from" in out
    assert "Stopped" not in out
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}
    before, after = ({path: b for path, b in files.items() if path.name not in aside} for files in (before, after))
    after[folder / "config.yaml"] = before[folder / "config.yaml"]  # says which checkpoint_every it has now
    assert after == before


def test_a_signal_sets_requested_and_close_takes_the_handlers_back(capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)]
    stop = StopSignal()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # another kind: torchrun sends it after the terminal's SIGINT
    finally:
        stop.close()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)] == before
    assert capfd.readouterr().err == "\nSIGINT: finishing this step, then saving (again: leave now)\n"
