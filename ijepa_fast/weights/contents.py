"""What a file of weights holds, whatever its format, and the check that it is an I-JEPA model.

A format is a module of three functions: `recognise(path) -> bool`, cheap; `read(path) -> Contents`; and, where it is
also written, `write(path, contents, which)`. Names are those of `ijepa_fast.model`, which are timm's and the released
code's.
"""
import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES, Predictor, Size, VisionTransformer

Weights = dict[str, Tensor]
SECTIONS = {"context": "encoder", "target": "target_encoder"}  # our encoders, and what files call them


class Contents(NamedTuple):
    """Tensors on the CPU, in the file's dtype."""

    encoders: dict[str, Weights]  # "context", "target", or both
    predictor: Weights | None
    num_heads: int | None  # of the encoders, where the file or its config says; else it is told from the width
    predictor_heads: int | None  # None: as many as the encoders'
    image_size: tuple[int, int] | None  # height and width in pixels, where a config says; else a square
    about: dict[str, Any]  # plain values for model cards: where it comes from, step or epoch, the run's config
    training: dict[str, Any] | None = None  # what a released checkpoint holds beside weights: opt, epoch, lr, ...


class Architecture(NamedTuple):
    """Of an encoder."""

    size: Size
    patch_size: int  # pixels
    grid: tuple[int, int]  # patches from top to bottom, from left to right


def sort_sections(flat: Weights, where: str) -> tuple[dict[str, Weights], Weights | None]:
    """Encoders and predictor of tensors named `encoder.*`, `target_encoder.*`, `predictor.*`.

    Names without any of these prefixes are one encoder's. It is taken for the context encoder, which is what those who
    publish a single one have published.
    """
    parts: dict[str, Weights] = {section: {} for section in (*SECTIONS.values(), "predictor")}
    if not any(name.startswith(tuple(f"{section}." for section in parts)) for name in flat):
        return {"context": flat}, None
    for name, value in flat.items():
        section, _, rest = name.partition(".")
        if section not in parts:
            raise UserError(f"{where} holds {name}, which belongs to none of {', '.join(parts)}")
        parts[section][rest] = value
    encoders = {which: parts[section] for which, section in SECTIONS.items() if parts[section]}
    if not encoders:
        raise UserError(f"{where} holds a predictor and no encoder")
    return encoders, parts["predictor"] or None


def architectures(contents: Contents, where: str) -> tuple[Architecture, Size | None]:
    """Of encoders and predictor, every tensor checked. Raises UserError as below, and where the encoders differ."""
    several = len(contents.encoders) > 1
    found = {
        which: encoder_architecture(
            weights,
            f"{where}: {SECTIONS[which]}" if several else where,
            num_heads=contents.num_heads,
            image_size=contents.image_size,
        )
        for which, weights in contents.encoders.items()
    }
    encoder = next(iter(found.values()))
    if any(other != encoder for other in found.values()):
        raise UserError(f"{where}: encoder and target_encoder are of different architectures")
    if contents.predictor is None:
        return encoder, None
    where = f"{where}: predictor"
    return encoder, predictor_size(contents.predictor, encoder, where, num_heads=contents.predictor_heads)


def encoder_architecture(
    weights: Weights,
    where: str,
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    says: Size | None = None,
) -> Architecture:
    """The architecture of an encoder's weights, every tensor of which is checked.

    `where` names them in errors: a path, and what in it. `says` is the size that a config states. Raises UserError,
    naming a tensor, for wrong shapes, another depth than the config's, a missing block, and tensors that belong to no
    I-JEPA encoder.
    """
    dim, channels, patch_size, width = _shape(weights, "patch_embed.proj.weight", 4, where)
    if (channels, patch_size) != (3, width):
        raise UserError(
            f"{where}: patch_embed.proj.weight has shape {_text(weights['patch_embed.proj.weight'])}, which is no "
            f"projection of square RGB patches"
        )
    positions = _shape(weights, "pos_embed", 3, where)[1]
    if image_size is None:
        side = math.isqrt(positions)
        grid = (side, side)
    else:
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
    if grid[0] * grid[1] != positions:
        of = "a square" if image_size is None else f"an image of {image_size[0]} x {image_size[1]} pixels"
        raise UserError(f"{where}: pos_embed has {positions} positions, which are not the patches of {of}")
    depth = _depth(weights, "blocks", where)
    mlp_dim = _shape(weights, "blocks.0.mlp.fc1.weight", 2, where)[0]
    size = Size(dim, depth, num_heads or (says.num_heads if says else _heads(dim, where)), mlp_dim)
    if dim % size.num_heads:
        raise UserError(f"{where}: its width {dim} is not a multiple of {size.num_heads} heads")
    if says is not None:
        _check_size(size, says, where)
    architecture = Architecture(size, patch_size, grid)
    expected = _shapes(empty_encoder(architecture)) | {"pos_embed": (1, positions, dim)}
    check_tensors(weights, expected, where, "an I-JEPA encoder")
    return architecture


def predictor_size(weights: Weights, encoder: Architecture, where: str, *, num_heads: int | None = None) -> Size:
    """The size of a predictor for `encoder`, every tensor of which is checked. Raises UserError as above."""
    dim = _shape(weights, "predictor_embed.weight", 2, where)[0]
    depth = _depth(weights, "predictor_blocks", where)
    mlp_dim = _shape(weights, "predictor_blocks.0.mlp.fc1.weight", 2, where)[0]
    size = Size(dim, depth, num_heads or encoder.size.num_heads, mlp_dim)
    if dim % size.num_heads:
        raise UserError(f"{where}: its width {dim} is not a multiple of {size.num_heads} heads")
    positions = (1, encoder.grid[0] * encoder.grid[1], dim)
    expected = _shapes(empty_predictor(encoder, size)) | {"predictor_pos_embed": positions}
    check_tensors(weights, expected, where, "a predictor of this encoder")
    return size


def empty_encoder(architecture: Architecture) -> VisionTransformer:
    """On the meta device, in fp32. It is of a square grid, as high as the architecture's."""
    image_size = architecture.grid[0] * architecture.patch_size
    with torch.device("meta"):
        return VisionTransformer(
            architecture.size, image_size, architecture.patch_size, torch.float32, torch.float32
        )


def empty_predictor(encoder: Architecture, size: Size) -> Predictor:
    """On the meta device, in fp32."""
    with torch.device("meta"):
        return Predictor(encoder.size.dim, size, encoder.grid[0], torch.float32, torch.float32)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_tensors(weights: Weights, expected: dict[str, tuple[int, ...]], where: str, what: str) -> None:
    """Raise UserError unless `weights` are tensors of exactly these names and shapes, of floating point."""
    for name in expected:
        if name not in weights:
            raise UserError(f"{where} holds no {name}, so it is not {what}")
    for name, value in weights.items():
        if name not in expected:
            raise UserError(f"{where} holds {name}, which {what} does not have")
        if tuple(value.shape) != expected[name]:
            raise UserError(
                f"{where}: {name} has shape {_text(value)}; with its other tensors it must be {list(expected[name])}"
            )
        if not value.is_floating_point():
            raise UserError(f"{where}: {name} is {value.dtype}, not floating point")


def _check_size(held: Size, says: Size, where: str) -> None:
    words = {"dim": "width", "depth": "number of blocks", "num_heads": "number of heads", "mlp_dim": "MLP width"}
    for field, word in words.items():
        own, stated = getattr(held, field), getattr(says, field)
        if own != stated:
            raise UserError(f"{where}: by its tensors its {word} is {own}, by its config {stated}")


def _shape(weights: Weights, name: str, ndim: int, where: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"{where} holds no {name}, so it is no I-JEPA model")
    if weights[name].ndim != ndim:
        raise UserError(f"{where}: {name} has shape {_text(weights[name])}, not {ndim} dimensions")
    return tuple(weights[name].shape)


def _depth(weights: Weights, blocks: str, where: str) -> int:
    numbers = {int(found[1]) for name in weights if (found := re.match(rf"{blocks}\.(\d+)\.", name))}
    depth = max(numbers, default=-1) + 1
    if missing := sorted(set(range(max(depth, 1))) - numbers):
        raise UserError(f"{where} holds nothing of {blocks}.{missing[0]}, a block that the model must have")
    return depth


def _heads(dim: int, where: str) -> int:
    for size in SIZES.values():
        if size.dim == dim:
            return size.num_heads
    raise UserError(
        f"{where}: the number of heads cannot be told from its width {dim}, which is none of "
        f"{', '.join(str(size.dim) for size in SIZES.values())}"
    )


def _text(value: Tensor) -> str:
    return str(list(value.shape))
