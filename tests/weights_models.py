"""Encoders with weights of their own in every tensor, for the tests of formats."""
import torch

from ijepa_fast.model import Size, VisionTransformer
from ijepa_fast.weights.contents import Contents

# What Meta published, by the name of its folder: the size, pixels, patch. `ijepa_vith14_22k` has the first one's.
PUBLISHED = {
    "vith14_1k": (Size(1280, 32, 16, 5120), 224, 14),
    "vith16_1k": (Size(1280, 32, 16, 5120), 448, 16),
    "vitg16_22k": (Size(1408, 40, 16, 6144), 224, 16),
}
TINY = (Size(48, 2, 3, 96), 24, 4)


def encoder(size: Size, image_size: int, patch_size: int, seed: int = 0) -> VisionTransformer:
    """Neither biases nor norms are zero or one, so that each of them counts."""
    with torch.device("meta"):
        model = VisionTransformer(size, image_size, patch_size, torch.float32, torch.float32)
    model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        value.normal_(std=0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value.add_(1)
    return model


def contents(model: VisionTransformer, which: str = "target") -> Contents:
    about: dict = {"source": "checkpoint step_00000500 of a run of ijepa_fast", "step": 500}
    data = {"root": "/home/me/photographs", "crop_scale": [0.3, 1.0]}
    about["config"] = {"model": {"name": "vit_tiny"}, "data": data, "optim": {"lr": 0.001}}
    return Contents({which: model.state_dict()}, None, model.size.num_heads, None, None, about)


def image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
