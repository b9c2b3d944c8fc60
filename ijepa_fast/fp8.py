"""The target encoder's matrix products in e4m3 (`model.target_dtype: fp8`): which layers, and their rounded weights.

The target encoder only runs forward, so its products may have inputs of 8 bits without a gradient going through them:
the norms and GELU before them write e4m3 as it is, and `fp8_linear` multiplies. `attn.proj` stays in the compute dtype:
attention writes what it reads, a pass more would be needed to round it, and it is a twelfth of a block's products.

Probes of a run look at these features too; `evaluate` and `embed` build encoders of their own, without e4m3.
"""
from typing import TYPE_CHECKING

import torch
from ijepa_kernels import Quantized, quantize_rows
from ijepa_kernels.fp8 import empty_quantized

from ijepa_fast import compat
from ijepa_fast.blocks import Block, Linear
from ijepa_fast.errors import UserError

if TYPE_CHECKING:
    from ijepa_fast.model import VisionTransformer

OLDEST = (8, 9)  # compute capability


def use_fp8(encoder: "VisionTransformer", blocks: str) -> None:
    """Let the products of an encoder that is not trained be of e4m3: in "all" blocks, or all but the first and last."""
    for block in list(encoder.blocks)[slice(None) if blocks == "all" else slice(1, -1)]:
        assert isinstance(block, Block)
        for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2):
            layer.fp8 = True


def check_fp8(device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise UserError where `device` has no such products."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have = ".".join(map(str, capability))
        raise UserError(
            f"model.target_dtype=fp8 needs a GPU of compute capability 8.9 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {have}; leave it out"
        )
    if compute_dtype != torch.bfloat16:
        raise UserError("model.target_dtype=fp8 needs model.compute_dtype=bfloat16 on a GPU, or auto")


class QuantizedWeights:
    """The weights of a model's fp8 layers in e4m3: what `Copies` is for those of 16 bits.

    They stay where they are, for a captured graph reads them, and the optimizer writes them with the weights.
    """

    def __init__(self, layers: list[Linear]):
        self.weights = [layer.weight for layer in layers]
        self.copies = [Quantized(*empty_quantized(weight), len(weight)) for weight in self.weights]
        self._seen = [-1] * len(layers)  # the counts of changes
        for layer, low in zip(layers, self.copies, strict=True):
            layer.quantized = low

    @torch.no_grad()
    def refresh(self) -> None:
        for i, (weight, low) in enumerate(zip(self.weights, self.copies, strict=True)):
            count = compat.changes(weight)
            if count != self._seen[i]:
                quantize_rows(weight, low)
                self._seen[i] = count

    def mark_fresh(self) -> None:
        """All of them were just written."""
        self._seen = [compat.changes(weight) for weight in self.weights]
