"""A model as `ijepa_fast.load` gives it, drawn at random: 6 x 6 patches of 4 pixels."""
import torch
from torch import nn

from ijepa_fast.model import build_encoder, build_predictor


class TinyModel(nn.Module):
    image_size, patch_size = 24, 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = build_encoder("vit_tiny", image_size=24, patch_size=4)
        self.encoder.blocks = self.encoder.blocks[:2]
        self.predictor = build_predictor(self.encoder, depth=1, dim=48)

    @torch.no_grad()
    def features(self, images, layers=1, pool=None):
        tokens = self.encoder(images)
        return tokens.mean(1) if pool == "mean" else tokens

    @torch.no_grad()
    def predict(self, images, context, target):
        return self.predictor(self.encoder(images, context), context, target)
