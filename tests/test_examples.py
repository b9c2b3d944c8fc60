"""Every script of examples/, on the weights of a run of five updates."""
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torchvision_stand_in import import_timm

import ijepa_fast
from ijepa_fast.convert import main as convert
from ijepa_fast.train import main as train

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run_folder(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = ["--config", str(tiny_config), "optim.epochs=1", "optim.warmup_epochs=0"]
    assert train([*recipe, f"train.folder={folder}"]) == 0
    return folder


@pytest.fixture
def example(monkeypatch, capsys):
    """`example("similarity", "a.jpg", ...)`: what the script prints."""

    def run(name: str, *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "continue_released_run", "linear_classifier", "similarity", "timm_features",
    }  # fmt: skip


def test_similarity(run_folder, photographs, example, tmp_path):
    pytest.importorskip("transformers")
    assert convert([str(run_folder), str(tmp_path / "hf"), "--to", "hf"]) == 0
    paths = photographs / "class_0" / "0.jpg", photographs / "class_1" / "0.jpg"
    out = example("similarity", tmp_path / "hf", *paths)
    theirs, same, central = (float(found) for found in re.findall(r"-?\d\.\d{4}$", out, re.MULTILINE))
    assert abs(theirs - same) < 2e-4  # printed with four digits
    a, b = ijepa_fast.load(run_folder).features(list(paths))
    assert abs(torch.cosine_similarity(a, b, dim=0).item() - central) < 1e-4


def test_linear_classifier(run_folder, photographs, example):
    """The four classes differ in colour, which features of hardly any training tell apart."""
    out = example("linear_classifier", run_folder, photographs, photographs)
    correct = int(re.match(r"(\d+) of 40 images of 4 classes: ", out)[1])
    assert correct > 30


def test_continue_released_run(run_folder, tiny_config, photographs, example, tmp_path):
    checkpoint = tmp_path / "jepa.pth.tar"
    assert convert([str(run_folder), str(checkpoint), "--to", "released"]) == 0
    with pytest.raises(SystemExit) as done:
        example("continue_released_run", checkpoint, tiny_config, photographs, tmp_path / "more", "optim.epochs=2")
    assert done.value.code == 0
    steps = [line.split(",")[:2] for line in (tmp_path / "more" / "log.csv").read_text().splitlines()[1:]]
    assert steps[0][0] == "2"  # the second epoch
    assert len(steps) == 5
    assert sorted(path.name for path in (tmp_path / "more" / "checkpoints").iterdir())[-1] == "step_00000010"


def test_timm_features(run_folder, photographs, example, tmp_path):
    import_timm()
    out = example("timm_features", run_folder, tmp_path / "timm", photographs / "class_0" / "0.jpg")
    numbers, apart = re.search(r"(\d+) numbers an image, at most (\S+) from", out).groups()
    assert int(numbers) == 192
    assert float(apart) < 1e-5
