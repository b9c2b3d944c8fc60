"""Named tensors in files: safetensors, PyTorch's own files without the code they may run, and folders of shards.

Every error is a `UserError` of one sentence that names the file.
"""
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ijepa_fast.errors import UserError
from ijepa_fast.weights.contents import Weights

SHARD_BYTES = 5 * 10**9
# What a folder on the Hugging Face hub calls its weights, the preferred file first; a larger model has an index.
_WHOLE = ("model.safetensors", "pytorch_model.bin")


def read_safetensors(path: Path) -> Weights:
    """All tensors of a safetensors file, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:  # the sizes in the header are compared with the file's before anything is read
        raise UserError(f"{path} is no whole safetensors file: {error}") from None


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values; a file that would run code is refused."""
    try:
        # Mapped, so that what nobody looks at (an optimizer's state) is never read; files of before 1.6 cannot be.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise UserError(f"{path} is no whole PyTorch file: {error}") from None
        raise UserError(
            f"{path} holds more than tensors and plain values, so loading it could run code, and it is refused"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no whole PyTorch file: {str(error).splitlines()[0]}") from None


def read_state_dict(path: Path) -> Weights:
    """A file of nothing but named tensors: safetensors by its suffix, else one of PyTorch's."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    weights = read_torch(path)
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} holds other things than named tensors")
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_folder(folder: Path) -> Weights:
    """The weights of a folder as the Hugging Face hub holds it, in one file or in shards with an index."""
    for name in _WHOLE:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, folder / f"{name}.index.json")
    raise UserError(f"{folder} holds neither {' nor '.join(_WHOLE)}, whole or in shards with an index")


def _read_shards(folder: Path, index: Path) -> Weights:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    weights: Weights = {}
    for name in sorted(set(shard_of.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file of its folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {index.name} names it")
        shard = read_state_dict(folder / name)
        promised = {tensor for tensor, file in shard_of.items() if file == name}
        if missing := sorted(promised - shard.keys()):
            raise UserError(f"{folder / name} does not hold {missing[0]}, which {index.name} puts there")
        if extra := sorted(shard.keys() - promised):
            raise UserError(f"{folder / name} holds {extra[0]}, which {index.name} does not put there")
        weights |= shard
    return weights


def write_folder(folder: Path, weights: Weights, shard_bytes: int = SHARD_BYTES) -> None:
    """Write what `read_folder` reads: model.safetensors, or shards of at most `shard_bytes` bytes and their index."""
    shards: list[Weights] = [{}]
    room = shard_bytes
    for name, value in weights.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        room -= value.nbytes
        shards[-1][name] = value.contiguous()
    if len(shards) == 1:
        _save(shards[0], folder / _WHOLE[0])
        return
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        shard_of |= dict.fromkeys(shard, file)
    size = {"total_size": sum(value.nbytes for value in weights.values())}
    index = json.dumps({"metadata": size, "weight_map": shard_of}, indent=1)
    (folder / f"{_WHOLE[0]}.index.json").write_text(index)


def _save(weights: Weights, path: Path) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})  # transformers asks for this metadata
    except SafetensorError as error:  # the disk is full
        raise UserError(f"{path} cannot be written: {error}") from None
