"""Weights & Biases and MLflow, offline: what a run logs arrives there, a resumed one under the same name."""
import json
import sys

import pytest

from ijepa_fast.config import validate
from ijepa_fast.errors import UserError
from ijepa_fast.trackers import build_trackers, check_installed


def config(folder, **log):
    folder.mkdir(exist_ok=True)
    return validate({"data": {"root": "a"}, "train": {"folder": str(folder)}, "log": log}, "test")


def test_none_is_asked_for(tmp_path):
    assert build_trackers(config(tmp_path)) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_not_installed(name, tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_fast.trackers.importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"log\.{name} needs {name}: pip install 'ijepa_fast\[{name}\]'"):
        check_installed(config(tmp_path, **{name: True}))
    check_installed(config(tmp_path))


def test_one_that_cannot_begin(tmp_path, monkeypatch):
    settings, init = "from types import SimpleNamespace as Settings", "def init(**options):"
    (tmp_path / "wandb.py").write_text(f"{settings}\n{init}\n    raise RuntimeError('no API key\\nat all')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"log\.wandb: wandb cannot begin: no API key at all"):
        build_trackers(config(tmp_path / "run", wandb=True))
    sys.modules.pop("wandb", None)


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra: wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = []
    for step in (1, 2):
        (tracker,) = build_trackers(config(tmp_path / "run", wandb=True))
        tracker.scalars({"train/loss": 0.5, "train/time (ms)": 3.0}, step)
        tracker.close()
        names.append(json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"])
    assert names[0] == names[1]
    written = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{names[0]}/run-{names[0]}.wandb"))
    assert written
    assert b"train/loss" in b"".join(path.read_bytes() for path in written)


def test_mlflow_offline(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: mlflow)")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (1, 2):
        (tracker,) = build_trackers(config(tmp_path / "run", mlflow=True))
        tracker.scalars({"train/loss": 1 / step, "train/time (ms)": 3.0}, step)
        tracker.close()
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    assert [(m.step, m.value) for m in client.get_metric_history(name, "train/loss")] == [(1, 1.0), (2, 0.5)]
    assert client.get_run(name).data.params["optim.epochs"] == "300"
    assert client.get_run(name).data.metrics["train/time_ms"] == 3.0
