"""The I-JEPA objective (arXiv 2301.08243, section 3): predict the target encoder's features of hidden blocks."""
from typing import Literal

import torch
from ijepa_kernels import smooth_l1_loss
from torch import Tensor, nn

from ijepa_fast.masks import Masks
from ijepa_fast.padding import Padded

TARGET_NORM_EPS = 1e-5  # of the layer norm over target features; the models' own norms use 1e-6


def ijepa_loss(
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    images: Tensor,
    masks: Masks | Padded,
    *,
    denominator: float | Tensor | None = None,
    kind: Literal["smooth_l1", "l2"] = "smooth_l1",
) -> Tensor:
    """The loss of one (micro-)batch, a fp32 scalar to call `backward` on; no gradient reaches the target encoder.

    `images` as in `VisionTransformer.forward`, `masks` on the same device. The sum over target rows and channels is
    divided by `denominator`, a number or a tensor, or by their own number where it is None. To split a batch over
    micro-batches or ranks without changing the gradient, give every part the number that belongs to the whole.
    """
    padded, target = isinstance(masks, Padded), masks.target
    with torch.no_grad():
        if masks.covered is None:
            features = target_encoder(images)  # [B, N, D]
        elif isinstance(masks, Padded):
            features, target = target_encoder(images, rows=masks.covered)[None], masks.compared
        else:  # to the loss the rows that are there are the patches of one image
            features = target_encoder(images, rows=masks.covered.rows)[None]  # [1, R, D]
            target = target._replace(indices=masks.covered.target, image=torch.zeros_like(target.image))
    tokens = encoder(images, masks.context)
    predicted = predictor(tokens, masks.context, masks.target, masks.context_of)
    return smooth_l1_loss(
        predicted, features, target, kind=kind, eps=TARGET_NORM_EPS, denominator=denominator, padded=padded
    )
