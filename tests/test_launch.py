"""The SLURM launcher: the script it writes, and its task under submitit's local executor, requeued in the middle."""
import csv
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

submitit = pytest.importorskip("submitit", reason="submitit is not installed (extra: slurm)")

from ijepa_fast import launch  # noqa: E402

pytestmark = pytest.mark.long

CLUSTER = ["--nodes", "2", "--gpus-per-node", "8"]
SHORT = "optim.epochs=2"
GIANT = ["--config", "configs/vitg16_in22k.yaml"]


def test_the_script(capsys, tmp_path):
    arguments = [*CLUSTER, *GIANT, "--partition", "learn", "--hours", "2.5", "--sbatch", "account=vision", "--print"]
    assert launch.main([*arguments, f"train.folder={tmp_path}/big"]) == 0
    script = capsys.readouterr().out
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=learn", "--time=150", "--account=vision",
        "--requeue", "--job-name=big", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "srun" in script
    assert "--kill-on-bad-exit=1" in script
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes", "3", "--gpus-per-node", "8"], "global_batch_size 2048 does not divide among 24 GPUs"),
        (["--nodes", "0", "--gpus-per-node", "8"], "--nodes must be positive, not 0"),
        ([*CLUSTER, "--sbatch", "account"], "--sbatch takes KEY=VALUE, not account"),
        ([*CLUSTER, "optim.lrr=1"], "did you mean optim.lr?"),
        (CLUSTER, "there is no srun here"),
    ],
)
def test_bad_input(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert launch.main([*arguments, *GIANT, f"train.folder={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_submission(capsys, monkeypatch, tmp_path):
    """With an sbatch that only keeps what it was given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("srun", "exit 0"), ("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 17')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert launch.main([*CLUSTER, *GIANT, f"train.folder={tmp_path}/run"]) == 0
    assert capsys.readouterr().out.startswith("job 17 submitted")
    submitted = (tmp_path / "script").read_text()
    assert launch.main([*CLUSTER, *GIANT, f"train.folder={tmp_path}/run", "--print"]) == 0
    printed = capsys.readouterr().out
    wanted = [line for line in printed.splitlines() if line.startswith("#SBATCH")]
    assert wanted == [line for line in submitted.splitlines() if line.startswith("#SBATCH")]


def losses(folder: Path) -> list[float]:
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def wait_for(condition, seconds: float, job) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{job.stdout()}\n{job.stderr()}"
        time.sleep(0.1)


def warn_tasks(job) -> None:
    """What SLURM does by default before it takes a job's nodes away."""
    for pid in Path(f"/proc/{job._process.pid}/task/{job._process.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGTERM)


def test_a_preempted_job_goes_on(tmp_path, train, tiny_config, monkeypatch):
    """Two processes, warned after their first steps: saved, requeued, resumed; the losses are an undisturbed run's."""
    assert train(f"train.folder={tmp_path / 'undisturbed'}", SHORT).code == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "preempted"
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs", max_num_timeout=1)
    executor.update_parameters(timeout_min=10, tasks_per_node=2)
    job = executor.submit(launch.Task(["--config", str(tiny_config), f"train.folder={folder}", SHORT], folder))
    wait_for(lambda: losses(folder), 200, job)
    warn_tasks(job)
    job.wait()
    said = job.stdout() + job.stderr()
    assert job.state == "FINISHED", said
    assert "SIGTERM: finishing this step, then saving" in said
    assert "resumed from" in said
    expected = losses(tmp_path / "undisturbed")
    assert len(expected) == 10
    # Two ranks add up the same numbers in another order: a few units of 2^-24 of a loss near 0.4.
    assert losses(folder) == pytest.approx(expected, rel=1e-5)


def test_a_job_that_slurm_restarted_resumes(monkeypatch, tmp_path):
    """After a node has died SLURM runs the same submission again, without asking submitit."""
    seen = []
    monkeypatch.setattr(launch.train, "main", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(launch.submitit.helpers, "TorchDistributedEnvironment", lambda: _Environment())
    task = launch.Task(["--config", "x.yaml"], tmp_path)
    task()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    task()  # died before it began: there is nothing to resume
    (tmp_path / "config.yaml").touch()
    task()
    assert ["--resume" in arguments for arguments in seen] == [False, False, True]

    # requeued by submitit: the same, and a job that was preempted before it had begun begins
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    requeued = task.checkpoint().function
    requeued()
    (tmp_path / "config.yaml").unlink()
    requeued()
    assert ["--resume" in arguments for arguments in seen[3:]] == [True, False]

    monkeypatch.setattr(launch.train, "main", lambda arguments: 2)
    with pytest.raises(SystemExit, match="2"):
        task()


class _Environment:
    def export(self, **options) -> None:
        pass


def test_help_says_where_things_go(capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "requeued" in shown
    assert "train.folder/slurm" in shown
    assert sys.executable not in shown
