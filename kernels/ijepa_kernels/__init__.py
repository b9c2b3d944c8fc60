"""Fused ops for I-JEPA and its kin: one import each, on a GPU through Triton, on a CPU through PyTorch."""
from .adamw import AdamWEMA
from .attention import explain_backends, varlen_attention, varlen_attention_qkv
from .ema import ema_update_
from .gelu import bias_gelu
from .loss import smooth_l1_loss
from .norm import add_layer_norm
from .packed import Packed
from .patches import IMAGENET_MEAN, IMAGENET_STD, embed_patches, gather_patches
from .predictor import predictor_tokens
from .repeats import predictor_rows
from .tokens import apply_masks, gather_tokens
from .version import __version__

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AdamWEMA",
    "Packed",
    "__version__",
    "add_layer_norm",
    "apply_masks",
    "bias_gelu",
    "ema_update_",
    "embed_patches",
    "explain_backends",
    "gather_patches",
    "gather_tokens",
    "predictor_rows",
    "predictor_tokens",
    "smooth_l1_loss",
    "varlen_attention",
    "varlen_attention_qkv",
]
