"""Weights of ours: run folders, checkpoints, and safetensors files of whole models.

A run folder gives its latest checkpoint; what is still being written has another name and is never looked at. In a file
the names are those of a checkpoint, `encoder.*`, `predictor.*`, `target_encoder.*`; one that holds a single encoder may
leave the prefix out.
"""
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ijepa_fast import compat
from ijepa_fast.checkpoint import find, read_about, reason, verify
from ijepa_fast.config import Config, drop_retired, validate
from ijepa_fast.distributed import World
from ijepa_fast.durable import usual_mode
from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES
from ijepa_fast.weights.contents import SECTIONS, Contents, Weights, encoder_architecture, sort_sections
from ijepa_fast.weights.tensors import read_safetensors

ALONE = World(0, 1, torch.device("cpu"), "single")
_KEY = "ijepa_fast"  # of a file's metadata, which safetensors allows to be text alone


def recognise(path: Path) -> bool:
    """Whether `path` looks like a run folder, a checkpoint folder or a safetensors file."""
    if path.is_dir():
        return any((path / name).exists() for name in ("checkpoint.json", "checkpoints", "config.yaml"))
    return path.suffix == ".safetensors"


def read(path: Path) -> Contents:
    """Everything but the optimizer's state. Raises UserError for what is damaged or does not fit its config."""
    if not path.is_dir():
        return _read_file(path)
    path = find(path, ALONE)
    if problem := verify(path, ALONE):
        raise UserError(problem)
    contents, size = read_checkpoint(path), SIZES[read_config(path).model.name]
    for which, weights in contents.encoders.items():
        encoder_architecture(weights, f"{path}: {SECTIONS[which]}", image_size=contents.image_size, says=size)
    return contents


def write(path: Path, contents: Contents, which: str | None = None) -> None:
    """A safetensors file of all that `contents` hold, or of the encoder `which` alone; whole or not there."""
    tensors: Weights = {}
    for name, weights in contents.encoders.items():
        if which in (None, name):
            tensors |= {f"{SECTIONS[name]}.{key}": value for key, value in weights.items()}
    if contents.predictor is not None and which is None:
        tensors |= {f"predictor.{key}": value for key, value in contents.predictor.items()}
    facts = {
        "num_heads": contents.num_heads,
        "predictor_heads": contents.predictor_heads,
        "image_size": contents.image_size,
        "about": contents.about,
    }
    write_file(path, tensors, {_KEY: json.dumps(facts)})


def write_file(path: Path, tensors: Weights, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not there. Raises UserError where it cannot be written."""
    temporary = path.with_name(path.name + ".writing")
    try:
        # Each with storage of its own: the format knows no views.
        owned = {name: value.contiguous() for name, value in tensors.items()}
        save_file(owned, temporary, metadata={"format": "pt"} | metadata)
        usual_mode(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {reason(error)}") from None


def held(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of all tensors of a checkpoint, by name; safetensors hold nothing else."""
    every = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: about for name, about in every.items() if isinstance(about, TensorStorageMetadata)}


def read_sections(path: Path, sections: tuple[str, ...]) -> Weights:
    """The whole tensors of some sections of a checkpoint, written by any number of ranks, under their full names."""
    tensors: Weights = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in held(path).items()
        if name.startswith(tuple(f"{section}." for section in sections))
    }
    with compat.single_process_checkpoints():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors


def read_config(path: Path) -> Config:
    """The config that a checkpoint was written with."""
    return validate(drop_retired(read_about(path)["config"]), str(path / "checkpoint.json"))


def read_checkpoint(path: Path) -> Contents:
    """What a checkpoint holds beside its optimizer's state, which was written so and is not checked again."""
    config = read_config(path)
    encoders, predictor = sort_sections(read_sections(path, ("encoder", "target_encoder", "predictor")), str(path))
    about = {
        "source": f"{path.name} of a run of ijepa_fast",
        "step": read_about(path)["step"],
        "config": config.model_dump(mode="json"),
    }
    heads = SIZES[config.model.name].num_heads
    return Contents(encoders, predictor, heads, heads, (config.data.image_size, config.data.image_size), about)


def _read_file(path: Path) -> Contents:
    encoders, predictor = sort_sections(read_safetensors(path), str(path))
    facts: dict[str, Any] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if _KEY in metadata:
        try:
            facts = json.loads(metadata[_KEY])
            heads, predictor_heads, image_size = facts["num_heads"], facts["predictor_heads"], facts["image_size"]
            about = dict(facts["about"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its metadata {_KEY} cannot be read: {reason(error)}") from None
        return Contents(encoders, predictor, heads, predictor_heads, image_size and tuple(image_size), about)
    return Contents(encoders, predictor, None, None, None, {"source": f"the file {path.name}"})
