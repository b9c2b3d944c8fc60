"""A run folder: one writer, its marker, its history, longer runs, and names that look like markup."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ijepa_fast.errors import UserError
from ijepa_fast.metrics import RunLog, read_log
from ijepa_fast.run_folder import MARKER, RunLock

ROOT = Path(__file__).parents[1]
SHORT = ("optim.epochs=1", "optim.epoch_length=2")


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> Path:
    """A run of 2 updates in a folder whose name is markup to the console's library; not to be changed."""
    from ijepa_fast.train import main

    folder = tmp_path_factory.mktemp("finished") / "run[red][" / "exp]"
    assert main(["--config", str(tiny_config), *SHORT, f"train.folder={folder}"]) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    folder = tmp_path / "run[/exp]"  # ends what was never begun, as markup; and as a path a folder of its own
    shutil.copytree(finished, folder)
    return folder


def start(program: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program], text=True, preexec_fn=as_in_a_terminal, **pipes)


def as_in_a_terminal() -> None:
    """A process that was started in the background hands on that it ignores these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


# --- one writer -------------------------------------------------------------------------------------------------------


def test_one_process_writes_and_the_next_is_told_who(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ijepa_fast.run_folder import RunLock\n"
        f"lock = RunLock(Path({str(tmp_path)!r})); print('locked', flush=True); import time; time.sleep(300)"
    )
    other = start(code)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path)
        sentence = str(caught.value)
        assert f"{tmp_path} is being written by process {other.pid} on {os.uname().nodename} since 20" in sentence
        assert f"remove {tmp_path / MARKER}" in sentence
    finally:
        other.kill()
        other.wait()
    lock = RunLock(tmp_path)  # dead without a word, and still nobody is in the way
    assert lock.held
    assert json.loads((tmp_path / MARKER).read_text())["pid"] == os.getpid()
    lock.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ijepa_fast.run_folder.fcntl.flock", none)
    assert not RunLock(tmp_path).held


def test_a_marker_that_says_nothing(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / MARKER).write_text("junk")
    with pytest.raises(UserError, match="is being written by another process"):
        RunLock(tmp_path)
    lock.close()


def test_the_index_never_descends_into_a_run_folder(tmp_path):
    from ijepa_fast.data.walk import walk

    for folder in ("a", "runs/demo/checkpoints", "runs/other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "image.png").write_bytes(b"any")
    RunLock(tmp_path / "runs/demo").close()
    tree = walk(str(tmp_path))
    assert [unit.paths.split(b"\0") for unit in tree.units] == [[b"a/image.png", b"runs/other/image.png"]]
    assert tree.skipped["run folder"] == 1


@pytest.mark.long
def test_a_live_run_is_not_resumed(train, copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != MARKER}
    lock = RunLock(copy)
    sentence = train(*SHORT, "--resume", f"train.folder={copy}").error
    lock.close()
    assert f"{copy} is being written by process {os.getpid()} on " in sentence
    assert {path: path.read_bytes() for path in before} == before


# --- resumed, longer, or not ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_is_extended_and_says_so(train, copy):
    longer = ("optim.epochs=2", "optim.epoch_length=2", f"train.folder={copy}", "--resume")
    sentence = train(*longer).error
    assert "optim.epochs=1, not 2: --resume --extend goes on" in sentence
    assert f"train.init_from={copy}" in sentence
    outcome = train(*longer, "--extend")
    assert outcome.code == 0, outcome.err
    assert f"resumed from {copy}/checkpoints/step_00000002\n" in outcome.out
    assert "extended from 1 to 2 epochs, 4 steps: from step 2 on all schedules are those of the longer" in outcome.out
    assert [row["step"] for row in read_log(copy)[0]] == [1, 2, 3, 4]
    (change,) = map(json.loads, (copy / "config_history.jsonl").read_text().splitlines())
    assert change["step"] == 2
    assert change["changed"]["optim.epochs"] == [1, 2]
    summary = json.loads((copy / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["checkpoint"]) == (True, 4, "checkpoints/step_00000004")
    assert "4 of 4 steps in 0:00:" in outcome.out


def test_extend_without_resume_is_a_mistake_of_the_command(capsys, tiny_config):
    from ijepa_fast.train import main

    with pytest.raises(SystemExit):
        main(["--config", str(tiny_config), "--extend"])
    assert "--extend goes with --resume" in capsys.readouterr().err


@pytest.mark.long
def test_a_taken_folder_is_answered_with_a_free_one(train, copy):
    copy.with_name(copy.name + "_2").mkdir()
    assert f"for instance train.folder={copy}_3" in train(*SHORT, f"train.folder={copy}").error


@pytest.mark.long
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
@pytest.mark.parametrize("junk", ["junk\n", "null\n", "[" * 10_000 + "\n", '{"step": "x"}\n'])
def test_junk_in_a_log_is_named(name, junk, copy, tmp_path):
    if name == "log.csv":
        junk = junk.rstrip("\n") + "," * 14 + "\n"  # as many columns as a row has
    with open(copy / name, "a") as file:
        file.write(junk)
    before = (copy / name).read_bytes()
    with pytest.raises(UserError, match=rf"{name} holds lines that are no rows of a log: mend it"):
        RunLog(copy, 2, tensorboard=False)
    assert (copy / name).read_bytes() == before
    if name == "log.jsonl":
        with pytest.raises(UserError, match="holds lines that are no rows"):
            read_log(copy)


# --- what a dry run sees ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_dry_run_checks_the_run_folder_and_the_weights(train, finished, tmp_path):
    words = (*SHORT, "--dry-run")
    assert "already holds a run" in train(*words, f"train.folder={finished}").error
    (tmp_path / "file").write_text("in the way")
    sentence = train(*words, f"train.folder={tmp_path}/file/run").error
    assert sentence == f"train.folder={tmp_path}/file/run cannot be written: {tmp_path}/file is no folder"
    new = f"train.folder={tmp_path / 'run'}"
    assert "train.init_from: there is no /nowhere" in train(*words, new, "train.init_from=/nowhere").error
    outcome = train(*words, new, f"train.init_from={finished}", "log.probe_every=3", "optim.warmup_epochs=2")
    assert outcome.code == 0
    assert "cpu, 1 thread (parallel.cpu_threads); ijepa_fast " in outcome.out
    assert "note: log.probe_every=3 is past the end, step 2" in outcome.out
    assert "note: optim.warmup_epochs=2 is longer than the run of 1 epochs" in outcome.out
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# --- signals ----------------------------------------------------------------------------------------------------------

WAITING = """
import os, signal, sys, time
from ijepa_fast import preemption
preemption.PATIENCE_S = 0.3
def batches():
    yield 1
    print("waiting", flush=True)
    time.sleep(60)  # a read that never returns
stop = preemption.StopSignal(lambda: "step 7 is saved")
try:
    for item in stop.patient(batches()):
        pass
except preemption.NoDataError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_waiting_for_data_ends_some_time_after_a_signal(number):
    process = start(WAITING)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == f"no images came for 0 s after {signal.Signals(number).name}\n"
    assert err == f"\n{signal.Signals(number).name}: finishing this step, then saving (again: leave now)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_and_says_what_is_saved(number):
    program = WAITING.replace("0.3", "50")
    process = start(program)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    assert process.stderr.readline() == "\n"
    process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == f"\n{signal.Signals(number).name} again: leaving now; step 7 is saved\n"


def test_a_lost_terminal_ends_no_run_before_it_has_saved():
    """stderr is closed at the reader's end: writing fails, and what the run prints next must not end it."""
    program = WAITING + "print('printed to nobody', flush=True); os._exit(7)"
    process = start(program)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 7


@pytest.mark.long
def test_a_run_that_gets_no_images_saves_and_leaves(photographs, tiny_config, tmp_path):
    """A read hangs after some updates, as on a dead mount; SIGTERM ends the run with those saved."""
    root, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photographs, root)
    program = f"""
import gc, os, signal, threading, time
from ijepa_fast import preemption
preemption.PATIENCE_S = 1.0
from ijepa_fast.data.loader import Loader
plain, stuck = Loader._build, threading.Event()
def build(self, *arguments, calls=[0]):
    calls[0] += 1
    if calls[0] < 6: return plain(self, *arguments)
    (signals,) = [one for one in gc.get_objects() if isinstance(one, preemption.StopSignal)]
    quiet = 0
    while quiet < 20:  # two seconds in which the run has done nothing but wait for images
        time.sleep(0.1)
        quiet = (quiet + 1) * signals._waiting
    os.kill(os.getpid(), signal.SIGTERM)
    stuck.wait()  # for ever
Loader._build = build
from ijepa_fast.train import main
raise SystemExit(main(["--config", {str(tiny_config)!r}, "data.root={root}", "train.folder={folder}"]))
"""
    process, log = start(program), folder / "log.csv"
    out, err = process.communicate(timeout=300)
    steps = len(log.read_text().splitlines()) - 1
    assert process.returncode == 2, out + err
    assert f"error: no images came for 1 s after SIGTERM, so step {steps + 1} was not made; " in err
    assert f"step_{steps:08d} is the last checkpoint; --resume goes on from it" in err
    assert "Traceback" not in err


# --- full disks and full pipes ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_named():
    words = [sys.executable, "-m", "ijepa_fast", "env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


def test_tensorboard_on_a_full_disk_says_it_once():
    from ijepa_fast import compat

    class _AsyncWriterThread(threading.Thread):
        def run(self):
            raise OSError(28, "No space left on device")

    class Other(threading.Thread):
        def run(self):
            raise OSError(28, "No space left on device")

    before, seen = threading.excepthook, []
    threading.excepthook = seen.append
    try:
        compat.silence_board_thread()
        for kind in (_AsyncWriterThread, Other):
            thread = kind()
            thread.start()
            thread.join()
    finally:
        threading.excepthook = before
    assert [type(args.thread) for args in seen] == [Other]
