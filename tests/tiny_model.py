"""A model as `ijepa_fast.load` gives it, drawn at random: two blocks, 6 x 6 patches of 4 pixels."""
import torch

from ijepa_fast.model import build_encoder, build_predictor
from ijepa_fast.weights import Model


def tiny_model() -> Model:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", image_size=24, patch_size=4)
    encoder.blocks = encoder.blocks[:2]
    return Model(encoder, build_predictor(encoder, depth=1, dim=48), encoder, "target", {}).eval()
