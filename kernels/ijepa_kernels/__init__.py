"""Fused ops for I-JEPA and its kin: one import each, on a GPU through Triton, on a CPU through PyTorch."""
from .adamw import AdamWEMA
from .attention import explain_backends, varlen_attention, varlen_attention_qkv
from .ema import ema_update_
from .fp8 import Quantized, fp8_linear, quantize_rows, quantize_tensor
from .fp8_fused import add_layer_norm_fp8, bias_gelu_fp8
from .gelu import bias_gelu
from .loss import smooth_l1_loss
from .norm import add_layer_norm
from .packed import Packed
from .patches import IMAGENET_MEAN, IMAGENET_STD, embed_patches, gather_patches
from .predictor import predictor_tokens
from .repeats import predictor_rows
from .sums import column_sum
from .tokens import apply_masks, gather_tokens
from .version import __version__

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AdamWEMA",
    "Packed",
    "Quantized",
    "__version__",
    "add_layer_norm",
    "add_layer_norm_fp8",
    "apply_masks",
    "bias_gelu",
    "bias_gelu_fp8",
    "column_sum",
    "ema_update_",
    "embed_patches",
    "explain_backends",
    "fp8_linear",
    "gather_patches",
    "gather_tokens",
    "predictor_rows",
    "predictor_tokens",
    "quantize_rows",
    "quantize_tensor",
    "smooth_l1_loss",
    "varlen_attention",
    "varlen_attention_qkv",
]
