"""The target encoder's matrix products in e4m3 (`model.target_dtype: fp8`): which layers, and their rounded weights.

The target encoder only runs forward, so its products may have inputs of 8 bits without a gradient going through them:
the norms and GELU before them write e4m3 as it is, and `fp8_linear` multiplies. `SCALES` says which products, and
whether their factors have a scale for each row or one in all.

Probes of a run look at these features too; `evaluate` and `embed` build encoders of their own, without e4m3.
"""
from typing import TYPE_CHECKING

import torch
from ijepa_kernels import Quantized, quantize_rows, quantize_tensor
from ijepa_kernels.fp8 import Scales, empty_quantized

from ijepa_fast import compat
from ijepa_fast.blocks import Block, Linear
from ijepa_fast.errors import UserError

if TYPE_CHECKING:
    from ijepa_fast.model import VisionTransformer

OLDEST = (8, 9)  # compute capability
# The products of a block that are of e4m3, and their scales. On an H100 products with one scale a matrix ran 1.6 to
# 1.75 times as fast as bf16's, those of the ceilings of `bench`. Products with a scale a row were not timed, nor the
# passes before either. `python bench/record.py --out bench/results --part ops --only fp8` decides: a product of e4m3
# and its pass against bf16's two, and with "tensor" also the rounding of its weight, for which "row" needs no pass.
# That is 14 launches a block and update where qkv and fc1 have it, by `bench/traffic.py` 1.9 ms of H/14's 154.
#   proj: None alone. Attention writes what it reads, in bf16, and a pass more would be needed to round it, for a
#         twelfth of a block's products.
#   fc2:  "row" or None. GELUs have no bound that is known before them, so their rows have scales of their own.
SCALES: dict[str, Scales | None] = {"qkv": "row", "proj": None, "fc1": "row", "fc2": "row"}


def use_fp8(encoder: "VisionTransformer", blocks: str) -> None:
    """Let the products of an encoder that is not trained be of e4m3: in "all" blocks, or all but the first and last."""
    assert SCALES["proj"] is None
    assert SCALES["fc2"] != "tensor"
    for block in list(encoder.blocks)[slice(None) if blocks == "all" else slice(1, -1)]:
        assert isinstance(block, Block)
        block.attn.qkv.fp8, block.mlp.fc1.fp8, block.mlp.fc2.fp8 = (SCALES[name] for name in ("qkv", "fc1", "fc2"))


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
    """The weights of a model's fp8 layers with one kind of scales in e4m3: what `Copies` is for those of 16 bits.

    They stay where they are, for a captured graph reads them. The optimizer writes those with a scale a row with the
    weights. One scale of all is known only after that: the next forward writes those.
    """

    def __init__(self, layers: list[Linear], scales: Scales):
        self.scales = scales
        self.weights = [layer.weight for layer in layers]
        self.copies = [Quantized(*empty_quantized(weight, scales), len(weight)) for weight in self.weights]
        self._seen = [-1] * len(layers)  # the counts of changes
        for layer, low in zip(layers, self.copies, strict=True):
            layer.quantized = low

    @torch.no_grad()
    def refresh(self) -> None:
        quantize = quantize_tensor if self.scales == "tensor" else quantize_rows
        for i, (weight, low) in enumerate(zip(self.weights, self.copies, strict=True)):
            count = compat.changes(weight)
            if count != self._seen[i]:
                quantize(weight, low)
                self._seen[i] = count

    def mark_fresh(self) -> None:
        """All of them were just written."""
        self._seen = [compat.changes(weight) for weight in self.weights]
