"""The wheels, by themselves in an empty folder: the recipes are in them, the command works, the ops work alone."""
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


# Without a PYTHONPATH: what pip finds on it counts as installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def installed(source: Path, folder: Path) -> Path:
    """The bin/ of an environment that has the wheel of `source` and, of this one, the dependencies."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, copy = folder / "wheels", folder / "source"
    # A copy: the build leaves folders beside what it builds, and takes what an earlier one has left there.
    kept_out = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(source, copy, ignore=kept_out)
    build = [*pip, "wheel", "--no-deps", "-w", wheels, copy]
    done = subprocess.run(build, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode and ("connect" in done.stderr.lower() or "no matching distribution" in done.stderr.lower()):
        pytest.skip("pip cannot fetch setuptools for the build")
    assert done.returncode == 0, done.stderr
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = wheels.glob("*.whl")
    target = [*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(target, check=True, capture_output=True, env=ENVIRONMENT)
    # A path file of this line only: what is installed here in editable mode is not seen through it.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return folder / "venv" / "bin"


def run(*words: str | Path, folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_driver_from_its_wheel(tmp_path, photographs):
    bin_, empty = installed(ROOT, tmp_path), tmp_path / "empty"
    empty.mkdir()
    where = run(bin_ / "python", "-c", "import ijepa_fast, ijepa_kernels as k; print(ijepa_fast.__file__, k.__file__)",
                folder=empty)  # fmt: skip
    assert where.count(str(tmp_path)) == 2
    assert "fsdp, none" in run(bin_ / "ijepa", "plan", "--config", "vitg16_in22k", "--gpus", "64", folder=empty)
    short = ("optim.epochs=1", "optim.epoch_length=2", "log.probe_every=null", "log.tensorboard=false")
    shown = run(bin_ / "ijepa", "train", "--config", "demo", f"data.root={photographs}", *short, folder=empty)
    assert "2 of 2 steps in " in shown
    assert (empty / "runs/demo/summary.json").exists()


def test_the_ops_from_theirs(tmp_path):
    bin_ = installed(ROOT / "kernels", tmp_path)
    page = (ROOT / "kernels" / "README.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if not block.startswith("# loop")]
    assert len(blocks) >= 8
    (tmp_path / "examples.py").write_text("\n".join(blocks))
    run(bin_ / "python", "examples.py", folder=tmp_path)
    hidden = "import importlib.util as u, ijepa_kernels as k; print(u.find_spec('ijepa_fast'), k.__file__)"
    assert run(bin_ / "python", "-c", hidden, folder=tmp_path).startswith(f"None {tmp_path}")
