"""Hugging Face folders: transformers' `IJepaModel`, read and written without transformers.

    config.json  model.safetensors (or shards and an index)  preprocessor_config.json  README.md

Tensors are written under the names of the hub's I-JEPA folders, which every release of transformers reads. They are
read under those, and under the ones that `IJepaModel` has in memory since transformers 5. What differs from our model:
query, key and value are three matrices, and the norms' eps is a key of the config, 1e-12 where it is left out.
"""
import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ijepa_fast.blocks import NORM_EPS
from ijepa_fast.durable import new_folder
from ijepa_fast.errors import UserError
from ijepa_fast.model import Size
from ijepa_fast.weights.contents import Architecture, Contents, Weights, encoder_architecture
from ijepa_fast.weights.hub import WHICH, model_card, stated_encoder
from ijepa_fast.weights.tensors import SHARD_BYTES, read_folder, read_json, write_folder

BILINEAR = 2  # Pillow's number

# Ours to the hub's; a layer's names follow its prefix, and `attn.qkv` becomes three.
_OUTER = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")

# Names in memory since transformers 5, to the hub's.
_RENAMED = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda found: f".{_QKV['qkv'.index(found[1])]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_MODEL = re.compile(r"^(ijepa|vit)\.")  # inside a model with a head
_HEAD = re.compile(r"^(classifier|pooler)\.|^embeddings\.mask_token$")  # what is no part of the encoder


_Side = int | Annotated[list[int], Field(min_length=2, max_length=2)]  # pixels, or height and width


class _Config(BaseModel):
    """What counts of config.json; the defaults are transformers', which it leaves out when it writes the file."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model_type: str
    architectures: list[str] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: _Side = 224
    patch_size: _Side = 16
    qkv_bias: bool = True


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with a config.json of transformers, of whatever architecture."""
    config = path / "config.json"
    return config.is_file() and b'"model_type"' in config.read_bytes()


def read(path: Path) -> Contents:
    """The encoder of a folder of `IJepaModel`, of `IJepaForImageClassification`, or of a ViT without a class token.

    A head is left out; `about["notes"]` says so. Raises UserError for another architecture and for files that are not
    whole or do not fit config.json.
    """
    raw = read_json(path / "config.json")
    config = _check_config(raw, path / "config.json")
    held: Weights = {}
    left_out = set()
    for name, value in read_folder(path).items():
        name = _MODEL.sub("", name)
        if head := _HEAD.match(name):
            left_out.add(head[0].removesuffix("."))
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        held[name] = value
    if "embeddings.cls_token" in held:
        raise UserError(f"{path} holds embeddings.cls_token, and an I-JEPA encoder has tokens of patches alone")
    weights = _from_hub(path, held, config.num_hidden_layers)
    heads, mlp_dim = config.num_attention_heads, config.intermediate_size
    says = Size(config.hidden_size, config.num_hidden_layers, heads, mlp_dim)
    image_size, patch_size = _pair(config.image_size), _pair(config.patch_size)
    if (held_patch := tuple(weights["patch_embed.proj.weight"].shape[2:])) != patch_size:
        raise UserError(f"{path}: its patches have {held_patch} pixels, by config.json {patch_size}")
    encoder_architecture(weights, str(path), num_heads=heads, image_size=image_size, says=says)
    notes = [f"{path}: its {part} is no part of the encoder and was left out" for part in sorted(left_out)]
    if config.layer_norm_eps != NORM_EPS:
        stated = f"config.json says layer_norm_eps {config.layer_norm_eps:g}"
        notes.append(f"{path}: {stated}; I-JEPA's encoders have {NORM_EPS:g}, and so has ours")
    about: dict[str, Any] = {"source": f"the Hugging Face folder {path.name}"}
    if notes:
        about["notes"] = notes
    return Contents({stated_encoder(raw, path): weights}, None, heads, None, image_size, about)


def write(path: Path, contents: Contents, which: str, shard_bytes: int = SHARD_BYTES) -> None:
    """A folder that loads in `AutoModel`, `IJepaForImageClassification` and `AutoImageProcessor`.

    It holds the encoder `which`, "target" or "context", in the dtype it has; the predictor has no place in it. Raises
    UserError where `path` is there already.
    """
    weights = contents.encoders[which]
    where = str(contents.about.get("source", "the source"))
    architecture = encoder_architecture(
        weights, where, num_heads=contents.num_heads, image_size=contents.image_size
    )
    with new_folder(path) as folder:
        write_folder(folder, _to_hub(weights), shard_bytes)
        for name, value in (
            ("config.json", _config(architecture, weights, which)),
            ("preprocessor_config.json", _preprocessor(architecture)),
        ):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")
        (folder / "README.md").write_text(model_card("transformers", path.name, architecture, which, contents.about))


def _config(architecture: Architecture, weights: Weights, which: str) -> dict[str, Any]:
    size = architecture.size
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "image_size": _image_size(architecture),
        "patch_size": architecture.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": str(weights["pos_embed"].dtype).removeprefix("torch."),
        WHICH: which,
    }


def _preprocessor(architecture: Architecture) -> dict[str, Any]:
    height, width = (patches * architecture.patch_size for patches in architecture.grid)
    return {
        "image_processor_type": "ViTImageProcessor",  # without torchvision, transformers takes the one over Pillow
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _image_size(architecture: Architecture) -> int | list[int]:
    height, width = (patches * architecture.patch_size for patches in architecture.grid)
    return height if height == width else [height, width]


def _check_config(raw: dict[str, Any], path: Path) -> _Config:
    kind = raw.get("model_type")
    if kind not in ("ijepa", "vit"):
        classes = raw.get("architectures")
        name = classes[0] if isinstance(classes, list) and classes else kind
        raise UserError(f"{path.parent} holds {name} (config.json), not I-JEPA's IJepaModel or a ViT of its shape")
    try:
        config = _Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {first['loc'][0]} is {first['input']!r}: {first['msg']}") from None
    if config.hidden_act != "gelu":
        raise UserError(f"{path}: hidden_act is {config.hidden_act!r}; I-JEPA's encoders have 'gelu'")
    if not config.qkv_bias:
        raise UserError(f"{path}: qkv_bias is false; I-JEPA's encoders have biases")
    return config


def _pair(value: int | list[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _to_hub(weights: Weights) -> Weights:
    hub: Weights = {}
    for name, value in weights.items():
        if name in _OUTER:
            hub[_OUTER[name]] = value
            continue
        number, part, kind = _BLOCK.sub(r"\1 \2 \3", name).split()
        if part == "attn.qkv":
            for theirs, matrix in zip(_QKV, value.chunk(3), strict=True):
                hub[f"encoder.layer.{number}.{theirs}.{kind}"] = matrix
        else:
            hub[f"encoder.layer.{number}.{_LAYER[part]}.{kind}"] = value
    return hub


def _from_hub(path: Path, hub: Weights, depth: int) -> Weights:
    """Our names, in our model's order. What is left over belongs to no encoder of `depth` blocks."""
    left = dict(hub)

    def take(name: str) -> torch.Tensor:
        if name not in left:
            raise UserError(f"{path} holds no {name}, which an I-JEPA encoder of {depth} blocks has")
        return left.pop(name)

    weights = {ours: take(theirs) for ours, theirs in _OUTER.items()}
    for number in range(depth):
        theirs = f"encoder.layer.{number}"
        for kind in ("weight", "bias"):
            for ours_part, their_part in _LAYER.items():
                weights[f"blocks.{number}.{ours_part}.{kind}"] = take(f"{theirs}.{their_part}.{kind}")
            matrices = [take(f"{theirs}.{part}.{kind}") for part in _QKV]
            if len({matrix.shape for matrix in matrices}) > 1:
                raise UserError(f"{path}: {theirs}: query, key and value differ in shape")
            weights[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(matrices)
    if left:
        raise UserError(f"{path} holds {min(left)}, which an I-JEPA encoder of {depth} blocks does not have")
    return weights
