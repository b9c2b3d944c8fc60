"""AdamW's state, by name in our checkpoints and by index in released ones.

A released optimizer has four groups, and numbers its parameters through them: encoder matrices, predictor matrices,
encoder 1-D, predictor 1-D, each in the model's own order. The frozen positions are numbered among the matrices and have
no state.
"""
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_fast.errors import UserError
from ijepa_fast.model import Size
from ijepa_fast.weights.contents import Architecture, Weights, empty_encoder, empty_predictor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def released_order(architecture: Architecture, predictor_size: Size) -> list[dict[str, nn.Parameter]]:
    """The four groups: names as in our checkpoints, and parameters without values."""
    models = {"encoder": empty_encoder(architecture), "predictor": empty_predictor(architecture, predictor_size)}
    return [
        {
            f"{section}.{name}": parameter
            for name, parameter in model.named_parameters()
            if (parameter.ndim != 1 and "bias" not in name) == matrices
        }
        for matrices in (True, False)
        for section, model in models.items()
    ]


def from_released(opt: Any, order: list[dict[str, nn.Parameter]], where: str) -> Weights:
    """The tensors of a checkpoint's section `optimizer`. Raises UserError where `opt` is not of this model."""
    try:
        sizes = [len(group["params"]) for group in opt["param_groups"]]
        indices = [index for group in opt["param_groups"] for index in group["params"]]
        state = opt["state"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}: opt is no state of an optimizer: {type(error).__name__} {error}") from None
    if sizes != (wanted := [len(group) for group in order]):
        raise UserError(f"{where}: opt has groups of {sizes} parameters, where this model has {wanted}")
    named = {name: parameter for group in order for name, parameter in group.items()}
    tensors: Weights = {}
    for index, (name, parameter) in zip(indices, named.items(), strict=True):
        if not parameter.requires_grad:
            continue
        held = state.get(index)
        if held is None or not {"step", *_MOMENTS} <= held.keys():
            raise UserError(f"{where}: opt holds no step and moments of parameter {index}, {name}")
        for moment in _MOMENTS:
            if held[moment].shape != parameter.shape:
                raise UserError(
                    f"{where}: {moment} of parameter {index} has shape {list(held[moment].shape)}, where {name} has "
                    f"{list(parameter.shape)}"
                )
            tensors[f"state.{name}.{moment}"] = held[moment].float()
        tensors[f"state.{name}.step"] = torch.as_tensor(held["step"], dtype=torch.float32).reshape(())
    return tensors


def to_released(
    tensors: Weights,
    order: list[dict[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> dict[str, Any]:
    """The released `opt` of a checkpoint's section `optimizer`, with the rates of its last update."""
    decayed: dict[str, Any] = {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.empty(0)) for _ in group]} | rates
        for group, rates in zip(order, [decayed] * 2 + [{"WD_exclude": True, "weight_decay": 0.0}] * 2, strict=True)
    ]
    # Whatever else a group has is what this version of PyTorch puts there.
    opt = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps).state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(name for group in order for name in group):
        if f"state.{name}.step" in tensors:
            state[index] = {part: tensors[f"state.{name}.{part}"] for part in ("step", *_MOMENTS)}
    return opt | {"state": state}
