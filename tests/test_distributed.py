"""Two processes with half the batch each compute what one does: truncated or ragged, accumulating, resumed."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_fast.metrics import read_log
from ijepa_fast.train import main

STEPS = 20
# A gradient of the global batch is the same sum in another order, and an update of AdamW is about its sign: what
# rounding (6e-8 in fp32) does to nearly cancelled gradients shows up in the loss some updates later. 1e-5 over 20
# steps is what the project promises.
TOLERANCE = 1e-5
EVERY_TEN = ("train.checkpoint_every=10", "log.probe_every=10")

# Several runs in one group of processes, which costs one start.
SCRIPT = """
import json, sys
from rich.console import Console
from ijepa_fast import distributed
from ijepa_fast.config import load_config
from ijepa_fast.run import build_run
from ijepa_fast.train import train

runs = [(load_config(path, words)[0], resume) for path, words, resume in json.loads(sys.argv[1])]
with distributed.join(runs[0][0]) as world:
    for config, resume in runs:
        with build_run(config, world) as run:
            train(run, Console(quiet=not world.is_main), resume=resume)
"""


def torchrun(*command: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(folder: Path, *more: str) -> list[str]:
    return [f"train.folder={folder}", *EVERY_TEN, *more]


TRUNCATED = ("mask.collate=truncate", "mask.group=2")
RAGGED = ("mask.collate=ragged", "mask.sampler=corrected", "mask.num_contexts=2")


@pytest.fixture(scope="module")
def folders(tiny_config, tmp_path_factory) -> dict[str, Path]:
    """Run folders: each kind of masks by one process and by two; the rest of the first one by two."""
    root = tmp_path_factory.mktemp("distributed")
    folder = {name: root / name for name in ("truncated 1", "ragged 1", "truncated 2", "ragged 2", "rest 2")}
    for kind, masks in (("truncated 1", TRUNCATED), ("ragged 1", RAGGED)):
        assert main(["--config", str(tiny_config), *words(folder[kind], *masks)]) == 0

    # 4 images a rank, in micro-batches of 3 and 1.
    accumulating = words(folder["truncated 2"], *TRUNCATED, "optim.micro_batch=3", "log.tensorboard=true")
    out = torchrun("-m", "ijepa_fast.train", "--config", str(tiny_config), *accumulating)
    (root / "out.txt").write_text(out)
    folder["out"] = root / "out.txt"

    shutil.copytree(folder["truncated 1"], folder["rest 2"], ignore=shutil.ignore_patterns("step_00000020"))
    runs = [
        (str(tiny_config), words(folder["ragged 2"], *RAGGED, "optim.micro_batch=4"), False),
        (str(tiny_config), words(folder["rest 2"], *TRUNCATED), True),
    ]
    (root / "runs.py").write_text(SCRIPT)
    torchrun(str(root / "runs.py"), json.dumps(runs))
    return folder


def assert_same_losses(a: Path, b: Path) -> None:
    (steps_a, probes_a), (steps_b, probes_b) = read_log(a), read_log(b)
    assert [row["step"] for row in steps_a] == [row["step"] for row in steps_b] == list(range(1, STEPS + 1))
    differences = [abs(p["loss"] - q["loss"]) for p, q in zip(steps_a, steps_b, strict=True)]
    assert max(differences) < TOLERANCE
    assert [row["step"] for row in probes_a] == [row["step"] for row in probes_b] == [0, 10, 20]
    for p, q in zip(probes_a, probes_b, strict=True):
        assert p["rankme"] == pytest.approx(q["rankme"], rel=1e-4)  # small singular values amplify rounding
        assert p["knn"] == q["knn"]


@pytest.mark.parametrize("masks", ["truncated", "ragged"])
def test_two_processes_have_the_losses_of_one(masks, folders):
    assert_same_losses(folders[f"{masks} 1"], folders[f"{masks} 2"])


def test_losses_of_the_two_kinds_of_masks_differ(folders):
    losses = [[row["loss"] for row in read_log(folders[name])[0]] for name in ("truncated 1", "ragged 1")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) > 100 * TOLERANCE


def test_rank_0_alone_writes_and_speaks(folders):
    folder, out = folders["truncated 2"], folders["out"].read_text()
    assert len((folder / "log.csv").read_text().splitlines()) == 1 + STEPS
    assert len(list((folder / "tensorboard").iterdir())) == 1  # each writer makes a file of its own
    for step in range(1, STEPS + 1):
        assert out.count(f"step {step}/{STEPS} ") == 1
    assert out.count("curves.png") == 1


def test_both_ranks_write_a_part_of_the_checkpoint(folders):
    path = folders["truncated 2"] / "checkpoints" / "step_00000020"
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert len(files) == 2
    assert set(files) | {"checkpoint.json"} == {p.name for p in path.iterdir()}
    sizes = [(path / name).stat().st_size for name in files]
    assert min(sizes) > 0.2 * sum(sizes)


def test_one_process_resumes_what_two_have_saved(folders, tiny_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["truncated 2"], folder, ignore=shutil.ignore_patterns("step_00000020"))
    assert main(["--config", str(tiny_config), "--resume", *words(folder, *TRUNCATED)]) == 0
    assert_same_losses(folders["truncated 1"], folder)


def test_two_processes_resume_what_one_has_saved(folders):
    assert_same_losses(folders["truncated 1"], folders["rest 2"])
