"""Fast I-JEPA pretraining, and what can be done with the weights.

The names below are imported when they are first used: `import ijepa_fast` alone imports nothing, torch least of all.
"""
import importlib
from typing import TYPE_CHECKING, Any

from ijepa_fast.version import __version__

if TYPE_CHECKING:
    from ijepa_kernels import (
        Packed,
        apply_masks,
        ema_update_,
        embed_patches,
        gather_patches,
        gather_tokens,
        predictor_tokens,
        smooth_l1_loss,
        varlen_attention,
    )

    from ijepa_fast.masks import MultiBlockMasks
    from ijepa_fast.model import Predictor, VisionTransformer, build_encoder, build_predictor
    from ijepa_fast.objective import ijepa_loss
    from ijepa_fast.weights.load import load
    from ijepa_fast.weights.model import Model

__all__ = [
    "Model",
    "MultiBlockMasks",
    "Packed",
    "Predictor",
    "VisionTransformer",
    "__version__",
    "apply_masks",
    "build_encoder",
    "build_predictor",
    "ema_update_",
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "ijepa_loss",
    "load",
    "predictor_tokens",
    "smooth_l1_loss",
    "varlen_attention",
]

_HOME = {
    "Model": "ijepa_fast.weights.model",
    "MultiBlockMasks": "ijepa_fast.masks",
    "Predictor": "ijepa_fast.model",
    "VisionTransformer": "ijepa_fast.model",
    "build_encoder": "ijepa_fast.model",
    "build_predictor": "ijepa_fast.model",
    "ijepa_loss": "ijepa_fast.objective",
    "load": "ijepa_fast.weights.load",
}  # every other name is an op


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "ijepa_kernels")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals() | dict.fromkeys(__all__))
