"""Weights & Biases and MLflow: the scalars of log.csv and of the probes, for whoever keeps runs there.

Both are off by default and optional extras. What they need of the network, of accounts and of settings is theirs: a run
goes to where their environment variables say (WANDB_MODE=offline keeps it in the run folder, and so does MLflow's file
store, which is what is taken where MLFLOW_TRACKING_URI is not set). A run that is resumed goes on under its name there.
"""
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ijepa_fast.config import Config
from ijepa_fast.durable import write_durably
from ijepa_fast.errors import UserError

NAMES = "trackers.json"  # in the run folder: tracker -> the name that it knows the run by


class Tracker(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    def __init__(self, config: Config):
        import wandb

        known = _name(config.train.folder, "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ijepa_fast"),
            name=config.train.folder.name,
            dir=str(config.train.folder),
            config=config.model_dump(mode="json"),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        _keep(config.train.folder, "wandb", self._run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    def __init__(self, config: Config):
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow 3 asks for this consent before it writes to plain files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((config.train.folder.absolute() / "mlruns").as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "ijepa_fast"))
        known = _name(config.train.folder, "mlflow")
        self._mlflow = mlflow
        started = mlflow.start_run(run_id=known, run_name=None if known else config.train.folder.name)
        if known is None:
            sections = config.model_dump(mode="json").items()
            mlflow.log_params({f"{name}.{key}": value for name, keys in sections for key, value in keys.items()})
        _keep(config.train.folder, "mlflow", started.info.run_id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        # MLflow takes no brackets in a name.
        self._mlflow.log_metrics({name.replace(" (ms)", "_ms"): v for name, v in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def check_installed(config: Config) -> None:
    """Raise UserError, before a run folder is made, where `log` asks for what is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(config.log, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} needs {name}: pip install 'ijepa_fast[{name}]'")


def build_trackers(config: Config) -> list[Tracker]:
    """Those that `log` asks for; UserError where one cannot begin. To be called when the run folder is there."""
    trackers: list[Tracker] = []
    for name, kind in (("wandb", WandbTracker), ("mlflow", MlflowTracker)):
        if not getattr(config.log, name):
            continue
        try:
            trackers.append(kind(config))
        except Exception as error:  # no account, no network, a setting of theirs: they raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"log.{name}: {name} cannot begin: {reason}") from None
    return trackers


def _names(folder: Path) -> dict[str, Any]:
    try:
        names = json.loads((folder / NAMES).read_text())
    except (OSError, ValueError):
        return {}
    return names if isinstance(names, dict) else {}


def _name(folder: Path, tracker: str) -> str | None:
    return _names(folder).get(tracker)


def _keep(folder: Path, tracker: str, name: str) -> None:
    write_durably(folder / NAMES, json.dumps(_names(folder) | {tracker: name}) + "\n")
