"""Ranks that die, mistakes that all ranks make: the job ends, one sentence says why, and resuming goes on exactly."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_jobs as jobs
import pytest
import torch
from ranks import DIED, Ranks

from ijepa_fast import distributed
from ijepa_fast.config import load_config
from ijepa_fast.errors import UserError
from ijepa_fast.metrics import read_log

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # this process joins no group
]

LIMIT_S = 30  # from the death of a rank to the end of its job


def torchrun(script: str, *words: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(Path(__file__).with_name(script)), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, env={**os.environ, **jobs.ONE_THREAD})


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def words(photographs, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "parallel.yaml"
    config.write_text(jobs.CONFIG.replace("ROOT", str(photographs)))
    return lambda folder, *more: ["--config", str(config), f"train.folder={folder}", *more]


# --- a rank is killed -------------------------------------------------------------------------------------------------

KILLED = ("parallel.strategy=fsdp", "train.checkpoint_every=4", "log.probe_every=null")


@pytest.fixture(scope="module")
def killed(words, ranks, tmp_path_factory):
    """The same run undisturbed, and killed in the middle of step 7, loading, and saving step 12, then left to its end.

    Also what each of the three jobs that were killed printed, and the checkpoints there were after it.
    """
    root = tmp_path_factory.mktemp("killed")
    undisturbed, folder = root / "undisturbed", root / "run"
    for left in ranks.run(2, jobs.train, words(undisturbed, *KILLED)):
        assert left.result == 0, left.err
    ends = {}
    for when, victim in (("step 7", 1), ("load", 0), ("save 12", 1)):
        more = () if when == "step 7" else ("--resume",)
        done = torchrun("killed_rank.py", when, str(victim), *words(folder, *KILLED, *more))
        ended = time.time()
        (died,) = re.findall(r"killing itself at (\S+)", done.stderr)
        names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
        ends[when] = done, ended - float(died), names
    for left in ranks.run(2, jobs.train, words(folder, *KILLED, "--resume")):
        assert left.result == 0, left.err
    return undisturbed, folder, ends


@pytest.mark.parametrize("when", ["step 7", "load", "save 12"])
def test_a_killed_rank_ends_the_job(when, killed):
    done, seconds, _ = killed[2][when]
    assert done.returncode == 1
    assert seconds < LIMIT_S
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in done.stderr
    # Of the other rank at most its one sentence, no traceback; torchrun's own is that of its main process.
    assert "ijepa_fast/" not in done.stderr
    assert len(re.findall("lost contact with another rank", done.stderr)) <= 1


def test_a_killed_rank_leaves_the_latest_checkpoint_whole(killed):
    names = [names for _, _, names in killed[2].values()]
    assert names == [["step_00000004"], ["step_00000004"], ["step_00000004", "step_00000008"]]


def test_after_three_deaths_the_run_is_the_undisturbed_one(killed):
    undisturbed, folder, _ = killed
    assert [row["loss"] for row in read_log(folder)[0]] == [row["loss"] for row in read_log(undisturbed)[0]]
    a, b = jobs.weights(undisturbed), jobs.weights(folder)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_others_lose_contact_in_one_sentence(words, ranks, tmp_path):
    """Without torchrun, which ends them: as under another launcher."""
    victim, other = ranks.run(2, jobs.exit_on_rank_0, words(tmp_path / "run", *KILLED))
    assert victim == DIED
    assert other.result == 1
    assert other.err == "error: rank 1: lost contact with another rank, whose own error comes first\n"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def sentence(left: list) -> str:
    """What rank 0 says for all."""
    assert [rank.result for rank in left] == [2] * len(left), left
    assert [rank.err for rank in left[1:]] == [""] * (len(left) - 1)
    assert left[0].err.startswith("error: ")
    assert left[0].err.count("\n") == 1
    return left[0].err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["optim.global_batch_size=7"], "optim.global_batch_size 7 does not divide among 2 processes"),
        (["parallel.strategy=hsdp", "parallel.shard_size=3"], "parallel.shard_size=3 does not divide the 2 processes"),
        (["parallel.strategy=single"], "parallel.strategy=single runs one process, but 2 were started"),
        (["optim.lr=fast"], "optim.lr='fast' should be a valid number"),
        (["mask.min_keep=30"], "mask.min_keep=30 cannot be met"),
        (["data.root=/nowhere/at/all"], "data folder /nowhere/at/all does not exist"),
        (["train.folder=/proc/none"], "train.folder=/proc/none cannot be written: No such file or directory"),
        (["--resume"], "to resume; leave out --resume to start one"),
        (["train.init_from=/nowhere/at/all"], "train.init_from: there is no /nowhere/at/all"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_once(more, said, words, ranks, tmp_path):
    assert said in sentence(ranks.run(2, jobs.train, words(tmp_path / "run", "parallel.strategy=fsdp", *more)))


def test_ranks_with_different_configs(words, ranks, tmp_path):
    left = ranks.run(2, jobs.train_with_own_words, words(tmp_path / "run"), {1: ["optim.lr=0.5"]})
    assert "optim.lr is 0.001 on rank 0 and 0.5 on rank 1; give all the same" in sentence(left)


def test_a_checkpoint_of_another_model(words, ranks, killed, tmp_path):
    more = (f"train.init_from={killed[0]}", "model.predictor_dim=48", "parallel.strategy=fsdp")
    said = sentence(ranks.run(2, jobs.train, words(tmp_path / "run", *more)))
    assert "holds another model than the config describes: its predictor." in said


def test_a_disk_that_is_full_on_one_rank(words, ranks, tmp_path):
    said = sentence(ranks.run(2, jobs.train_on_full_disk, words(tmp_path / "run", *KILLED)))
    assert "the checkpoint of step 4 could not be written" in said
    assert "File too large; there is no earlier one" in said


def test_other_images_than_before(words, ranks, photographs, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(photographs, root)
    run = words(tmp_path / "run", f"data.root={root}", "optim.epochs=1", "log.probe_every=null")
    assert ranks.run(1, jobs.train, run)[0].result == 0
    (root / "class_0" / "0.jpg").rename(root / "class_0" / "zero.jpg")
    said = sentence(ranks.run(1, jobs.train, [*run, "--resume"]))
    assert "step_00000005 was written over 40 images, and data.root holds 40 now, or others" in said


def test_sharding_needs_torchrun(words, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for strategy in ("ddp", "fsdp", "hsdp"):
        config, _ = load_config(words(tmp_path)[1], [f"parallel.strategy={strategy}"])
        with pytest.raises(UserError, match=f"{strategy} needs torchrun: torchrun"), distributed.join(config):
            pass


def test_more_processes_than_gpus(words, tmp_path, monkeypatch):
    config, _ = load_config(words(tmp_path)[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    said = "4 processes were started on this machine, which has 2 GPUs; start torchrun with --nproc-per-node=2"
    with pytest.raises(UserError, match=said), distributed.join(config):
        pass
