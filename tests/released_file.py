"""A checkpoint as the released training script writes it, from what is known of its layout and nothing of ours.

The models are the straight ones of bench/, so names, order and numbering come from plain modules.
"""
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.baselines.straight import StraightEncoder, StraightPredictor
from ijepa_fast.model import Size

# A ViT-Ti cut to two blocks. `SIZES["vit_tiny"]` must be set to it where a config names the model.
SMALL = Size(dim=192, depth=2, num_heads=3, mlp_dim=768)


class Training(NamedTuple):
    encoder: StraightEncoder
    predictor: StraightPredictor
    target_encoder: StraightEncoder
    optimizer: torch.optim.AdamW


def is_matrix(name: str, parameter: Tensor) -> bool:
    return "bias" not in name and parameter.ndim != 1


def released_optimizer(encoder: nn.Module, predictor: nn.Module, **rates: float) -> torch.optim.AdamW:
    """Four groups, which hold the frozen positions too."""
    named = [list(model.named_parameters()) for model in (encoder, predictor)]
    groups: list[dict[str, Any]] = [{"params": [p for n, p in own if is_matrix(n, p)]} for own in named]
    groups += [
        {"params": [p for n, p in own if not is_matrix(n, p)], "WD_exclude": True, "weight_decay": 0} for own in named
    ]
    return torch.optim.AdamW(groups, **rates)


def new_training(seed: int = 0) -> Training:
    """On 6 x 6 patches of 4 pixels after two updates; no weight, bias, norm or position is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    encoder, target_encoder = (StraightEncoder(**SMALL._asdict(), num_patches=36, patch_size=4) for _ in range(2))
    predictor = StraightPredictor(encoder_dim=192, dim=48, depth=1, num_heads=3, mlp_dim=192, num_patches=36)
    for model in (encoder, predictor, target_encoder):
        for name, parameter in model.named_parameters():
            parameter.data.normal_(std=0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.data.add_(1)
    # The released moving average is of the frozen positions too, and rounds.
    target_encoder.pos_embed.data.copy_(encoder.pos_embed).mul_(1 + 2**-23)
    optimizer = released_optimizer(encoder, predictor)
    for _ in range(2):
        # Of the size of real gradients, but nowhere zero: the keys' biases have none but rounding noise.
        for parameter in (*encoder.parameters(), *predictor.parameters()):
            if parameter.requires_grad:
                parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return Training(encoder, predictor, target_encoder, optimizer)


def released_dict(training: Training, epoch: int = 2) -> dict[str, Any]:
    models = {
        name: {f"module.{key}": value for key, value in getattr(training, name).state_dict().items()}
        for name in ("encoder", "predictor", "target_encoder")
    }
    scaler = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    about = {"epoch": epoch, "loss": 0.25, "batch_size": 4, "world_size": 2, "lr": 1e-3}
    return models | {"opt": training.optimizer.state_dict(), "scaler": scaler | {"_growth_tracker": 7}} | about


def write_released(path: Path, training: Training, **changes: Any) -> Path:
    torch.save(released_dict(training) | changes, path)
    return path
