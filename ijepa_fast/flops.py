"""FLOPs of an update: of the tokens that exist, without padding or recomputation.

A matrix product of [m, k] by [k, n] is 2 m k n; attention over L tokens of width D is 4 L^2 D (its two products), and a
backward pass twice the forward, less the gradient of the pixels, which nobody takes. Norms, GELU and softmax are left
out, as in Kaplan et al. (arXiv 2001.08361, section 2.1) and in the usual definition of model FLOPs utilisation (MFU).
"""
from typing import NamedTuple

import numpy as np
import torch

from ijepa_fast.model import Size

# Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU, what MFU is a share of; None where it is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class StepFlops(NamedTuple):
    """FLOPs of the parts of an update; `context` and `predictor` forward and backward, `target` forward alone."""

    target: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        return self.target + self.context + self.predictor


def step_flops(
    encoder: Size,
    predictor: Size,
    patch_size: int,
    *,
    images: int,
    patches: int,
    context_lengths: np.ndarray,
    target_lengths: np.ndarray,
    context_of: np.ndarray,
    covered: float | None = None,
) -> StepFlops:
    """Of `images` images with `patches` patches each, and context and target sequences of these lengths (any shapes
    `[S_ctx]`, `[S_tgt]`; `context_of` `[S_tgt]` as in `Masks`). Lengths may be means: then so is the result, nearly.
    `covered`: patches in all images that the target encoder finishes, those of a target block; all where it is None."""
    context, target = np.asarray(context_lengths, float), np.asarray(target_lengths, float)
    embed = 2 * 3 * patch_size**2 * encoder.dim
    dense = np.full(images, float(patches))
    forward_target = embed * dense.sum() + _blocks(encoder, dense, finished=covered)
    forward_context = _blocks(encoder, context)
    # Each context token and each patch of the grid is projected once; the mask tokens alone are finished.
    both, distinct = context[np.asarray(context_of)] + target, context.sum() + patches
    forward_predictor = (
        2 * encoder.dim * predictor.dim * (context.sum() + target.sum())  # predictor_embed and predictor_proj
        + _blocks(predictor, both, projected=distinct, finished=target.sum())
    )
    return StepFlops(forward_target, 3 * forward_context + 2 * embed * context.sum(), 3 * forward_predictor)


def _blocks(size: Size, lengths: np.ndarray, projected: float | None = None, finished: float | None = None) -> float:
    """Forward of all blocks over sequences of `lengths`.

    Of all tokens, or so many: the first block makes queries, keys and values of `projected`, and `finished` go through
    the last block's projection and MLP.
    """
    tokens = lengths.sum()
    in_others = (size.depth - 1) * tokens
    qkv = 2 * 3 * size.dim**2 * (in_others + (tokens if projected is None else projected))
    attention = size.depth * 4 * size.dim * (lengths**2).sum()
    rest = 2 * (size.dim**2 + 2 * size.dim * size.mlp_dim) * (in_others + (tokens if finished is None else finished))
    return float(qkv + attention + rest)
