"""What a run needs beside weights to go on: from a checkpoint of ours to the released layout, and the way back."""
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_fast.checkpoint import Checkpoints, find, read_about
from ijepa_fast.config import Config
from ijepa_fast.data.index import build_index
from ijepa_fast.data.sampler import GlobalBatchSampler
from ijepa_fast.data.subset import select
from ijepa_fast.durable import new_folder, write_durably
from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES, Size
from ijepa_fast.optim import build_schedule
from ijepa_fast.weights.contents import Architecture, Contents, Weights
from ijepa_fast.weights.optimizer import from_released, released_order, to_released
from ijepa_fast.weights.ours import ALONE, read_config, read_sections


class Position(NamedTuple):
    """Where a run is."""

    step: int  # updates done
    data: dict[str, int] | None  # which images it sees, see `Index.fingerprint`


def read_training(path: Path, architecture: Architecture, predictor_size: Size) -> dict[str, Any]:
    """`Contents.training` of a run folder or checkpoint of ours, as a released checkpoint has it, and our `step`.

    `epoch` counts whole ones. Raises UserError where the length of an epoch cannot be told.
    """
    path = find(path, ALONE)
    config, about = read_config(path), read_about(path)
    if config.optim.epoch_length is None and not about.get("data"):
        raise UserError(f"{path} does not say over how many images it was trained, so its epoch cannot be told")
    images = (about.get("data") or {}).get("images", 0)
    schedule, step = build_schedule(config.optim, images // config.optim.global_batch_size), about["step"]
    tensors = read_sections(path, ("optimizer",))
    opt = to_released(
        {name.removeprefix("optimizer."): value for name, value in tensors.items()},
        released_order(architecture, predictor_size),
        lr=schedule.lr(step - 1),
        weight_decay=schedule.weight_decay(step - 1),
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    batch, group = config.optim.global_batch_size, config.mask.group
    batch_size = batch if batch % group else group
    return {
        "opt": opt,
        "epoch": step // schedule.steps_per_epoch,
        "loss": None,
        "batch_size": batch_size,
        "world_size": batch // batch_size,
        "lr": config.optim.lr,
        "step": step,
        "steps_per_epoch": schedule.steps_per_epoch,
    }


def write_run(
    path: Path, contents: Contents, architecture: Architecture, predictor_size: Size | None, config: Config, where: str
) -> Position:
    """A run folder whose only checkpoint continues `contents.training`. Raises UserError where something is missing.

    A released checkpoint tells epochs, not steps: an epoch has `optim.epoch_length` updates, or as many as data.root
    has whole batches.
    """
    _check_complete(contents, where)
    assert predictor_size is not None
    _check_same_recipe(config, contents, architecture, predictor_size, where)
    assert contents.training is not None
    order = released_order(architecture, predictor_size)
    optimizer = from_released(contents.training["opt"], order, where)
    position = _position(config, contents.training)
    tensors: dict[str, Weights] = {
        "encoder": contents.encoders["context"],
        "predictor": contents.predictor or {},
        "target_encoder": contents.encoders["target"],
    }
    tensors = {part: {name: value.float() for name, value in held.items()} for part, held in tensors.items()}
    with new_folder(path) as folder:
        Checkpoints(folder, 1, ALONE, position.data).write(position.step, tensors | {"optimizer": optimizer}, config)
        write_durably(folder / "config.yaml", config.to_yaml())
    return position


def _check_complete(contents: Contents, where: str) -> None:
    parts = {
        "a context encoder": contents.encoders.get("context"),
        "a target encoder": contents.encoders.get("target"),
        "a predictor": contents.predictor,
        "an optimizer's state": contents.training,
    }
    if missing := [name for name, part in parts.items() if part is None]:
        raise UserError(
            f"{where} holds no {' and no '.join(name.split(' ', 1)[1] for name in missing)}, so no run can go on from "
            f"it; start one from its weights with train.init_from={where}"
        )


def _check_same_recipe(
    config: Config, contents: Contents, architecture: Architecture, predictor_size: Size, where: str
) -> None:
    name = next((name for name, size in SIZES.items() if size == architecture.size), None)
    if name is None or predictor_size != (
        predictor_size.dim, predictor_size.depth, architecture.size.num_heads, 4 * predictor_size.dim
    ):  # fmt: skip
        raise UserError(f"{where}: no config can describe a model of {architecture.size} and {predictor_size}")
    assert contents.training is not None
    held = {
        "model.name": (config.model.name, name),
        "model.patch_size": (config.model.patch_size, architecture.patch_size),
        "model.predictor_depth": (config.model.predictor_depth, predictor_size.depth),
        "model.predictor_dim": (config.model.predictor_dim, predictor_size.dim),
        "data.image_size": (config.data.image_size, architecture.grid[0] * architecture.patch_size),
        "optim.global_batch_size": (config.optim.global_batch_size, _global_batch(contents.training)),
    }
    for key, (stated, found) in held.items():
        if found is not None and stated != found:
            raise UserError(f"{where} has {key}={found}, and the config says {stated}: give {key}={found}")


def _global_batch(training: dict[str, Any]) -> int | None:
    """The images of an update, where the file says it."""
    try:
        return int(training["batch_size"]) * int(training["world_size"])
    except (KeyError, TypeError, ValueError):
        return None


def _position(config: Config, training: dict[str, Any]) -> Position:
    data = None
    steps_per_epoch = config.optim.epoch_length
    if steps_per_epoch is None or isinstance(root := config.data.root, str) or root.exists():
        index = select(build_index(config.data.root, threads=config.data.threads), config.data)
        sampler = GlobalBatchSampler(len(index), config.optim.global_batch_size, config.train.seed)
        steps_per_epoch, data = steps_per_epoch or sampler.steps_per_epoch, index.fingerprint()
    return Position(training.get("step", int(training["epoch"]) * steps_per_epoch), data)
