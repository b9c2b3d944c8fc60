"""Hidden blocks as the decoder takes them: the pixels that were there, and the features predicted for its patches."""
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.decode.model import CONDITION, SIZE
from ijepa_fast.masks import Masks

if TYPE_CHECKING:
    from ijepa_fast.weights import Model


class Blocks(NamedTuple):
    """The S target blocks of some images, in the order of `masks.target`. Every block is stretched to a square."""

    pixels: Tensor  # uint8 [S, 64, 64, 3]
    features: Tensor  # fp32 [S, D, 8, 8]


@torch.no_grad()
def predicted_blocks(model: "Model", images: Tensor, masks: Masks, device: torch.device) -> Blocks:
    """What `model` predicts for the target blocks of `images` (uint8 `[B, S, S, 3]`), and what is there."""
    predicted = model.predict(images.to(device), masks.context.to(device), masks.target.to(device)).float()
    grid, p = model.encoder.grid, model.patch_size
    ends, where = masks.target.cu_seqlens.tolist(), masks.target.indices.numpy()
    x = images.to(device).permute(0, 3, 1, 2).float()
    pixels, features = [], []
    for sequence, image in enumerate(masks.target.image.tolist()):
        tokens = slice(ends[sequence], ends[sequence + 1])
        rows, columns = np.divmod(where[tokens], grid)
        top, left, height, width = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        block = x[image : image + 1, :, top * p : (top + height) * p, left * p : (left + width) * p]
        pixels.append(F.interpolate(block, (SIZE, SIZE), mode="bilinear", antialias=True))
        told = predicted[tokens].view(height, width, -1).permute(2, 0, 1)[None]
        features.append(F.interpolate(told, (CONDITION, CONDITION), mode="bilinear"))
    rounded = torch.cat(pixels).round().clamp(0, 255).to(torch.uint8)
    return Blocks(rounded.permute(0, 2, 3, 1), torch.cat(features))
