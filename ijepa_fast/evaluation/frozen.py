"""Encoders as evaluation wants them: frozen, on a device, in its precision; and two baselines to compare with."""
import hashlib
import re
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import ijepa_fast
from ijepa_fast.blocks import Linear
from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES, PatchEmbed, Size, VisionTransformer, build_encoder
from ijepa_fast.weights.model import Model

LAYERS = 4  # the paper's second representation: the last four, side by side
_RANDOM = re.compile(r"random:(?P<name>\w+)/(?P<patch>\d+)@(?P<image>\d+)(?:#(?P<seed>\d+))?")


class Encoder(Protocol):
    """What evaluation needs of weights."""

    encoder: Any  # VisionTransformer, or PixelEncoder

    def features(self, images: Tensor, layers: int = 1, pool: Any = "mean") -> Tensor: ...


def open_weights(name: str, which: str = "target") -> nn.Module:
    """The `which` encoder ("target" or "context") of a file or a run's folder, or one of the baselines.

    Baselines: `random:MODEL/PATCH@PIXELS` (see `random_weights`) and `pixels`. Raises UserError as `ijepa_fast.load`
    does.
    """
    if name.startswith("random:"):
        return random_weights(name)
    if name == "pixels":
        return Pixels()
    return ijepa_fast.load(name, which=which)


def is_baseline(name: str) -> bool:
    return name == "pixels" or name.startswith("random:")


class PixelEncoder(nn.Module):
    """No encoder at all: the pixels of an image of 16 x 16, `[B, 1, 768]` in 0 ... 1, from uint8 `[B, 16, 16, 3]`."""

    image_size = patch_size = 16
    size = Size(dim=16 * 16 * 3, depth=1, num_heads=1, mlp_dim=0)
    compute_dtype = residual_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, None] / 255


class Pixels(nn.Module):
    """A second baseline: what can be told from colours and where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = PixelEncoder()

    def features(self, images: Tensor, layers: int = 1, pool: Any = "mean") -> Tensor:
        pixels = self.encoder(images)
        return pixels.mean(1) if pool == "mean" else pixels


def random_weights(name: str) -> Model:
    """`random:vit_tiny/16@128`: a ViT-Ti of patches of 16 pixels at 128, `#SEED` after it for other weights.

    What every pretrained encoder has to beat. Raises UserError where the name is another.
    """
    parts = _RANDOM.fullmatch(name)
    if parts is None or parts["name"] not in SIZES:
        raise UserError(
            f"{name} does not name random weights: write random:MODEL/PATCH@PIXELS, for instance "
            f"random:vit_small/16@224, MODEL being one of {', '.join(SIZES)}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(parts["seed"] or 0))
            encoder = build_encoder(parts["name"], image_size=int(parts["image"]), patch_size=int(parts["patch"]))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name}: {error}") from None
    return Model(encoder, None, encoder, "target", {"source": name})


def prepare(model: nn.Module, device: torch.device) -> Encoder:
    """`model` on `device`, in eval mode, without gradients, matrix products in bf16 on a GPU; in place."""
    for part in model.modules():
        if isinstance(part, Linear | PatchEmbed | VisionTransformer):
            part.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return cast(Encoder, model.to(device).eval().requires_grad_(False))


def weights_digest(encoder: VisionTransformer) -> str:
    """SHA-256 of an encoder's architecture and weights, in hexadecimal digits."""
    digest = hashlib.sha256(repr((encoder.size, encoder.image_size, encoder.patch_size)).encode())
    for name, value in sorted(encoder.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
