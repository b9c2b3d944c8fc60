"""From a path to a model, whatever the format: `ijepa_fast.load`."""
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import ijepa_fast.weights.huggingface as huggingface
import ijepa_fast.weights.ours as ours
import ijepa_fast.weights.released as released
import ijepa_fast.weights.timm as timm
from ijepa_fast.errors import UserError
from ijepa_fast.weights.contents import Contents, Weights, architectures, empty_encoder, empty_predictor
from ijepa_fast.weights.model import Model

T = TypeVar("T", bound=nn.Module)
FORMATS = (huggingface, timm, ours, released)  # asked in this order


def load(path: str | Path, which: str = "target") -> Model:
    """The model in a file or folder of weights, on the CPU, in fp32, in eval mode; nothing is downloaded.

    `path`: a run folder of ours (its latest checkpoint), a checkpoint folder, a safetensors file, a released I-JEPA
    `.pth.tar`, a Hugging Face folder, timm's weights, or a bare state dict. The architecture is told from the tensors
    and from the folder's config. Every tensor is checked; no code of a file is run.

    `which`: "target", the encoder that the paper evaluates, or "context". A file that holds the context encoder alone,
    as those that Hugging Face and timm publish do, gives that one for "target" too: `.which` says what was loaded.
    Raises UserError, one sentence, for what cannot be loaded.
    """
    if which not in ("target", "context"):
        raise UserError(f"which must be 'target' or 'context', not {which!r}")
    path = Path(path).expanduser()
    contents = read(path)
    architecture, predictor_size = architectures(contents, str(path))
    if which == "target" and "target" not in contents.encoders:
        which = "context"
    if which not in contents.encoders:
        raise UserError(f"{path} holds the {next(iter(contents.encoders))} encoder alone, not the {which} encoder")
    if architecture.grid[0] != architecture.grid[1]:
        rows, columns = architecture.grid
        raise UserError(f"{path}: its images have {rows} x {columns} patches, where this model takes squares")
    encoder = _filled(empty_encoder(architecture), contents.encoders[which])
    if contents.predictor is None or predictor_size is None:
        return Model(encoder, None, encoder, which, contents.about).eval()
    predictor = _filled(empty_predictor(architecture, predictor_size), contents.predictor)
    context_encoder = encoder
    if which == "target" and "context" in contents.encoders:
        context_encoder = _filled(empty_encoder(architecture), contents.encoders["context"])
    return Model(encoder, predictor, context_encoder, which, contents.about).eval()


def read(path: Path) -> Contents:
    """What a file or folder of any format holds. Raises UserError where it is of none."""
    if not path.exists():
        raise UserError(f"there is no {path}")
    for format_ in FORMATS:
        if format_.recognise(path):
            return format_.read(path)
    raise UserError(
        f"{path} holds no weights that are known here: a run folder or checkpoint of ijepa_fast, a safetensors file, a "
        f"released .pth.tar, a Hugging Face folder with config.json, or a state dict of PyTorch's"
    )


def _filled(model: T, weights: Weights) -> T:
    """`model`, which is empty, with these weights."""
    # Copies: those of the file may be mapped, and it may be written anew while the model lives.
    model.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True)
    return model
