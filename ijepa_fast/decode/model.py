"""The decoder: a small U-Net that turns noise into a block's pixels, told the features of the block's patches.

Flow matching along straight lines (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003): between noise z at
t = 0 and pixels x at t = 1 lies (1 - t) z + t x, and the net learns the velocity x - z there.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ijepa_fast.errors import UserError

SIZE = 64  # pixels along a decoded block's sides, whatever its shape in the image
CONDITION = 8  # features along the sides of the map that the net is told
_FORMAT = "ijepa_fast decoder 1"


@dataclass(frozen=True)
class DecoderSettings:
    """What a decoder's file says about it."""

    feature_dim: int
    image_size: int  # of the model whose features it reads
    patch_size: int
    widths: tuple[int, ...] = (48, 96, 160)  # channels at 32, 16 and 8 pixels


class ResidualBlock(nn.Module):
    """Two convolutions over group-normed SiLU activations; the time scales and shifts between them."""

    def __init__(self, channels_in: int, channels: int, time_dim: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


class Stage(nn.Module):
    """Two residual blocks, at one resolution."""

    def __init__(self, channels_in: int, channels: int, time_dim: int):
        super().__init__()
        self.first = ResidualBlock(channels_in, channels, time_dim)
        self.second = ResidualBlock(channels, channels, time_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.second(self.first(x, time), time)


class Decoder(nn.Module):
    """The velocity of noisy blocks. 3 to 4 M parameters; 2 x 2 pixels fold into channels, so it begins at 32 x 32."""

    def __init__(self, settings: DecoderSettings):
        super().__init__()
        self.settings = settings
        first, *_ = widths = settings.widths
        time_dim = 4 * first
        self.time = nn.Sequential(nn.Linear(first, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.feature = nn.Conv2d(settings.feature_dim, widths[-1], 1)
        self.inner = nn.Conv2d(12, first, 3, padding=1)  # 2 x 2 pixels of 3 colours
        self.down, self.up, self.told = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, width in zip((first, *widths), widths):  # noqa: B905 (pairs of neighbours)
            self.told.append(nn.Conv2d(widths[-1], before, 1))
            self.down.append(Stage(before, width, time_dim))
        for width, below in zip(reversed(widths), (widths[-1], *reversed(widths))):  # noqa: B905
            self.up.append(Stage(below + width, width, time_dim))
        self.norm, self.outer = nn.GroupNorm(8, first), nn.Conv2d(first, 12, 3, padding=1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, noisy: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """`noisy` `[n, 3, 64, 64]`, `t` `[n]` in [0, 1], `features` `[n, feature_dim, 8, 8]`; velocity as `noisy`."""
        time = self.time(_waves(t, self.settings.widths[0]))
        told = F.silu(self.feature(features))
        x = self.inner(F.pixel_unshuffle(noisy, 2))
        kept = []
        for i, (tell, stage) in enumerate(zip(self.told, self.down, strict=True)):
            if i:
                x = F.avg_pool2d(x, 2)
            x = x + tell(F.interpolate(told, size=x.shape[-2:], mode="bilinear"))
            x = stage(x, time)
            kept.append(x)
        for i, stage in enumerate(self.up):
            if i:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = stage(torch.cat([x, kept.pop()], dim=1), time)
        return F.pixel_shuffle(self.outer(F.silu(self.norm(x))), 2)

    def loss(self, pixels: Tensor, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the velocity at random times; `pixels` `[n, 3, 64, 64]` in [-1, 1]."""
        z = torch.randn(pixels.shape, generator=generator, device=pixels.device)
        # Logit-normal times (Esser et al., arXiv 2403.03206): the middle of the way is the hard part.
        t = torch.randn(len(pixels), generator=generator, device=pixels.device).sigmoid()
        at = t[:, None, None, None]
        return F.mse_loss(self((1 - at) * z + at * pixels, t, features), pixels - z)

    @torch.no_grad()
    def sample(self, features: Tensor, generator: torch.Generator | None = None, steps: int = 16) -> Tensor:
        """Blocks for `features` `[n, feature_dim, 8, 8]`: uint8 `[n, 64, 64, 3]`, by Heun's method from fresh noise."""
        x = torch.randn((len(features), 3, SIZE, SIZE), generator=generator).to(features.device)
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            v = self(x, t, features)
            w = self(x + v / steps, t + 1 / steps, features)
            x = x + (v + w) / (2 * steps)
        return to_uint8(x)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 `[n, S, S, 3]` as floats `[n, 3, S, S]` in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The reverse of `to_float`."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def save(decoder: Decoder, path: Path, about: dict[str, str]) -> None:
    """Write weights and settings as one safetensors file, whole or not at all; `about` says how it was trained."""
    metadata = {"format": _FORMAT, "settings": json.dumps(asdict(decoder.settings)), **about}
    writing = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}, writing, metadata)
        os.replace(writing, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def load(path: Path) -> Decoder:
    """A decoder that `save` wrote, ready to sample. `UserError` for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} is no decoder of ours: python -m ijepa_fast.decode train writes one")
            settings = json.loads(metadata["settings"])
            decoder = Decoder(DecoderSettings(**settings | {"widths": tuple(settings["widths"])}))
            decoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: python -m ijepa_fast.decode train writes one") from None
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a decoder: {str(error).splitlines()[0]}") from None
    return decoder.eval()


def _waves(t: Tensor, dim: int) -> Tensor:
    """Times `[n]` as sines and cosines `[n, dim]`, at periods from one whole way to a thousandth of it."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), dim // 2, device=t.device))
    angle = t[:, None] * frequency * (2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
