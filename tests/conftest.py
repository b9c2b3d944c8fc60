"""A folder of photographs, a tiny config and the command line, for all tests of the driver.

Nothing here imports torch or triton before a test asks for it: tests/kernels decides first how Triton runs.
"""
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from outcome import Outcome
from photographs import write_photographs

# Read once, when the first test of a process profiles: the library writes to stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_PLAIN = SimpleNamespace(params={})  # of a test without parameters

# 6 x 6 patches and blocks of a few of them; 40 images make 5 updates an epoch, of about 0.1 s each on one core.
TINY = """
model: {name: vit_tiny, patch_size: 4, predictor_depth: 1, predictor_dim: 48}
mask: {group: 4, min_keep: 1}
data: {root: ROOT, image_size: 24, threads: 2, decoder: pillow}
optim: {global_batch_size: 8, micro_batch: 8, epochs: 4, warmup_epochs: 1}
parallel: {cpu_threads: 1}
log: {every: 1, probe_every: null, tensorboard: false, progress: false}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Not for `make check`: what runs Triton's interpreter (milliseconds a program), and what tests the benchmarks."""
    for item in items:
        interprets = "interpret" in getattr(item, "callspec", _PLAIN).params.values()
        if interprets or item.path.name.startswith("test_bench"):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of 4 classes of 10 JPEG files each; not to be changed."""
    root = tmp_path_factory.mktemp("photographs") / "train"
    write_photographs(root)
    return root


@pytest.fixture(scope="session")
def tiny_config(photographs, tmp_path_factory) -> Path:
    """A YAML file that trains ViT-Ti for 4 epochs of 5 updates on `photographs`. Give it a train.folder."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY.replace("ROOT", str(photographs)))
    return path


@pytest.fixture
def train(tiny_config, capfd) -> Callable[..., Outcome]:
    """`train("--resume", "optim.lr=1", ...)`: the command line with `tiny_config`, in this process."""
    from ijepa_fast.train import main

    def run(*words: str, config: Path = tiny_config) -> Outcome:
        capfd.readouterr()
        code = main(["--config", str(config), *words])
        return Outcome(code, *capfd.readouterr())

    return run
