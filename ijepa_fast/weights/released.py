"""Files of PyTorch's: released I-JEPA checkpoints (`.pth.tar`), and bare state dicts.

A released checkpoint is a dict of `encoder`, `predictor`, `target_encoder`, `opt`, `scaler`, `epoch`, `loss`,
`batch_size`, `world_size`, `lr`; names in the three models begin with `module.`, which DDP put there. `opt` is AdamW's
state by index: see `ijepa_fast.weights.optimizer`.
"""
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.errors import UserError
from ijepa_fast.weights.contents import Contents, Weights, architectures, empty_encoder, empty_predictor, sort_sections
from ijepa_fast.weights.tensors import read_torch

MODELS = ("encoder", "predictor", "target_encoder")
TRAINING = ("opt", "epoch", "loss", "batch_size", "world_size", "lr")
_WRAPPERS = ("state_dict", "model")  # what others put a bare state dict into
_PREFIX = "module."
# What a GradScaler has at its beginning. The released code, where it uses one, loads no file without.
_SCALER = {
    "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0,
}  # fmt: skip


def recognise(path: Path) -> bool:
    """Whether `path` is named as such files are, or begins as a zip file or a pickle does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        begin = file.read(2)
    return path.suffix in (".tar", ".pth", ".pt", ".bin") or begin == b"PK" or begin[:1] == b"\x80"


def read(path: Path) -> Contents:
    """The file's contents, mapped: what is not looked at is not read. Raises UserError; runs no code of the file."""
    raw = read_torch(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a checkpoint or a state dict")
    for wrapper in _WRAPPERS:
        if isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    models = {name: raw[name] for name in MODELS if isinstance(raw.get(name), dict)}
    if not models:
        encoders, predictor = sort_sections(_state_dict(raw, str(path)), str(path))
        return Contents(encoders, predictor, None, None, None, {"source": f"the file {path.name}"})
    flat = {f"{name}.{key}": v for name, d in models.items() for key, v in _state_dict(d, f"{path}: {name}").items()}
    encoders, predictor = sort_sections(flat, str(path))
    training = {key: raw[key] for key in TRAINING if key in raw}
    about: dict[str, Any] = {"source": f"the released checkpoint {path.name}"}
    about |= {key: value for key, value in training.items() if isinstance(value, int | float)}
    return Contents(encoders, predictor, None, None, None, about, training if "opt" in training else None)


def write(path: Path, contents: Contents, which: None = None) -> None:
    """A checkpoint that the released code goes on from. Raises UserError where something of it is missing.

    `scaler` is that of a run that begins: weights in bf16 and fp32 have none.
    """
    models = {"encoder": contents.encoders.get("context"), "predictor": contents.predictor,
              "target_encoder": contents.encoders.get("target")}  # fmt: skip
    parts: dict[str, Any] = models | dict.fromkeys(TRAINING) | (contents.training or {})
    if missing := [name for name in (*MODELS, "opt", "epoch") if parts[name] is None]:
        raise UserError(f"a released checkpoint needs {', '.join(missing)}, which the source does not hold")
    architecture, predictor_size = architectures(contents, "the source")
    assert predictor_size is not None
    encoder, predictor = empty_encoder(architecture), empty_predictor(architecture, predictor_size)
    for name, model in zip(MODELS, (encoder, predictor, encoder), strict=True):
        parts[name] = {_PREFIX + key: parts[name][key] for key in model.state_dict()}  # in the model's order
    temporary = path.with_name(path.name + ".writing")
    try:
        torch.save({name: parts[name] for name in (*MODELS, *TRAINING)} | {"scaler": dict(_SCALER)}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def _state_dict(raw: dict[Any, Any], where: str) -> Weights:
    """Named tensors without DDP's prefix."""
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{where} holds {name!r}, a {type(value).__name__}, where a named tensor should be")
    return {name.removeprefix(_PREFIX): value for name, value in raw.items()}
