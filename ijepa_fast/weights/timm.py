"""timm's Vision Transformers without a class token, read and written without timm.

    config.json  model.safetensors  README.md      a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`

The names are ours, but for one: with `global_pool="avg"` timm moves the final norm behind the pooling and calls it
`fc_norm`, unless it is told `fc_norm=False`, as its own I-JEPA models are (`vit_huge_patch14_gap_224.in1k_ijepa`).
Those normalise each patch, as I-JEPA does, and that is what is written. Both are read: `fc_norm` becomes the final
norm, and our pooled features are the mean of normalised patches either way.
"""
import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_fast.durable import new_folder
from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES
from ijepa_fast.weights.contents import Architecture, Contents, Weights, encoder_architecture
from ijepa_fast.weights.hub import WHICH, model_card, stated_encoder
from ijepa_fast.weights.tensors import read_folder, read_json, read_safetensors, read_torch, write_folder

# A timm model whose defaults are near; all that counts is said beside it, in `model_args`.
_ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_gap_224",
    "vit_giant": "vit_giant_patch16_gap_224",
}
# By these a file is timm's; without them a state dict of timm's is one of ours.
_THEIRS = {"fc_norm.weight", "head.weight", "cls_token"}


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with a config.json of timm, or a state dict with names that only timm has."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and b'"architecture"' in config.read_bytes()
    if path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            return not _THEIRS.isdisjoint(file.keys())
        return False
    return zipfile.is_zipfile(path) and not _THEIRS.isdisjoint(_state_dict(path))  # mapped: no tensor is read


def read(path: Path) -> Contents:
    """The encoder of a folder of timm's, or of a file that holds the state dict of a Vision Transformer of timm's.

    A classifier is left out; `about["notes"]` says so. Raises UserError for another architecture and for files that are
    not whole.
    """
    if path.is_dir():
        config = read_json(path / "config.json")
        name = config.get("architecture")
        if not isinstance(name, str) or not name.startswith("vit_"):
            raise UserError(f"{path} holds {name} (config.json), not a Vision Transformer like I-JEPA's")
        held = read_folder(path)
    else:
        config = {}
        held = read_safetensors(path) if path.suffix == ".safetensors" else _state_dict(path)
    weights = _encoder(held, str(path))
    heads, image_size = _heads(path, config), _image_size(path, config)
    encoder_architecture(weights, str(path), num_heads=heads, image_size=image_size)
    about: dict[str, Any] = {"source": f"the timm weights {path.name}"}
    if len(weights) < len(held):
        about["notes"] = [f"{path}: its head is no part of the encoder and was left out"]
    return Contents({stated_encoder(config, path): weights}, None, heads, None, image_size, about)


def _state_dict(path: Path) -> Weights:
    held = read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        return {}
    return held


def _encoder(held: Weights, where: str) -> Weights:
    """A state dict of timm's under our names, without its classifier."""
    for token in ("cls_token", "reg_token"):
        if token in held:
            raise UserError(f"{where} holds {token}, and an I-JEPA encoder has tokens of patches alone")
    if "fc_norm.weight" in held and "norm.weight" in held:
        raise UserError(f"{where} holds both norm and fc_norm, of which an I-JEPA encoder has one")
    return {name.removeprefix("fc_"): value for name, value in held.items() if not name.startswith("head.")}


def _heads(path: Path, config: dict[str, Any]) -> int | None:
    """Where a config says it. timm's names imply the number of heads that the width does, but for one."""
    odd = 16 if str(config.get("architecture")).startswith("vit_base_patch16_gap_224") else None
    heads = _arguments(config).get("num_heads", odd)
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise UserError(f"{path}: config.json says num_heads {heads!r}")
    return heads


def _image_size(path: Path, config: dict[str, Any]) -> tuple[int, int] | None:
    size = _arguments(config).get("img_size")
    pair = [size, size] if isinstance(size, int) else size
    if pair is None:
        return None
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{path}: config.json says img_size {size!r}, neither pixels nor [height, width]")
    return pair[0], pair[1]


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    arguments = config.get("model_args")
    return arguments if isinstance(arguments, dict) else {}


def write(path: Path, contents: Contents, which: str) -> None:
    """A folder that `timm.create_model("local-dir:PATH", pretrained=True)` loads.

    It holds the encoder `which`, "target" or "context", in the dtype it has; the predictor has no place in it. Raises
    UserError where `path` is there already.
    """
    weights = contents.encoders[which]
    where = str(contents.about.get("source", "the source"))
    architecture = encoder_architecture(
        weights, where, num_heads=contents.num_heads, image_size=contents.image_size
    )
    with new_folder(path) as folder:
        write_folder(folder, weights)
        (folder / "config.json").write_text(json.dumps(_config(architecture, which), indent=2) + "\n")
        (folder / "README.md").write_text(model_card("timm", path.name, architecture, which, contents.about))


def _config(architecture: Architecture, which: str) -> dict[str, Any]:
    size = architecture.size
    height, width = (patches * architecture.patch_size for patches in architecture.grid)
    # By width, so that a model of no named size gets a name whose other arguments are replaced.
    near = next((name for name, known in SIZES.items() if known.dim == size.dim), "vit_base")
    return {
        "architecture": _ARCHITECTURES[near],
        "num_classes": 0,
        "num_features": size.dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": [height, width],
            "patch_size": architecture.patch_size,
            "embed_dim": size.dim,
            "depth": size.depth,
            "num_heads": size.num_heads,
            "mlp_ratio": size.mlp_dim / size.dim,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        WHICH: which,
    }
