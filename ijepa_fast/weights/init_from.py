"""A new run that begins with the weights of a file: `train.init_from`."""
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ijepa_fast.distributed import World
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.weights.contents import Contents, Weights, architectures
from ijepa_fast.weights.load import read

if TYPE_CHECKING:
    from ijepa_fast.run import TrainState


def init_from(path: Path, state: "TrainState", world: World) -> str:
    """Put the weights of `path`, of any format, and nothing else into `state`; returns a line that says which.

    Where the file holds one encoder, both begin with it; where it holds no predictor, that of `state` stays as it was
    drawn. Rank 0 reads the file and sends the other ranks their parts. Raises SharedError on all ranks.
    """
    parts: dict[str, Weights] = {}
    said = ""
    try:
        with world.raise_on_all_ranks():
            if world.is_main:
                contents = read(path)
                architectures(contents, str(path))
                parts = _parts(contents)
                _check_same_model(parts, state, path)
                said = _report(path, contents)
    except SharedError as error:
        raise SharedError(f"train.init_from: {error}") from None
    models: dict[str, nn.Module] = {"encoder": state.encoder, "target_encoder": state.target_encoder}
    if world.any("predictor" in parts):
        models["predictor"] = state.predictor
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    for name, model in models.items():
        weights: dict[str, Any] = {key: value.float() for key, value in parts.get(name, {}).items()}
        set_model_state_dict(model, weights, options=options)
    return world.gather_objects(said)[0]


def _parts(contents: Contents) -> dict[str, Weights]:
    only = next(iter(contents.encoders.values()))
    parts = {"encoder": contents.encoders.get("context", only), "target_encoder": contents.encoders.get("target", only)}
    return parts if contents.predictor is None else parts | {"predictor": contents.predictor}


def _check_same_model(parts: dict[str, Weights], state: "TrainState", path: Path) -> None:
    for name, weights in parts.items():
        wanted = {key: list(value.shape) for key, value in getattr(state, name).state_dict().items()}
        for key in sorted(wanted.keys() | weights.keys()):
            held = list(weights[key].shape) if key in weights else None
            if held != wanted.get(key):
                its = f"has shape {held}" if held else "is missing"
                ours = f"the config's has {wanted[key]}" if key in wanted else "the config's model has none"
                raise UserError(f"{path} holds another model than the config describes: its {name}.{key} {its}, {ours}")
            if not weights[key].isfinite().all():
                raise UserError(f"{path} holds numbers that are not finite, in {name}.{key}: it is of no use")


def _report(path: Path, contents: Contents) -> str:
    both = len(contents.encoders) > 1
    encoders = "both encoders" if both else f"both encoders begin with its {next(iter(contents.encoders))} encoder"
    predictor = "and the predictor" if contents.predictor is not None else "and a new predictor"
    return f"weights from {path}, {contents.about.get('source', 'a file')}: {encoders} {predictor}"
