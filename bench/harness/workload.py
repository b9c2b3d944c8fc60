"""What is measured: the models, and for each the weights and the one batch that all providers get."""
import copy
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD, Packed
from PIL import Image
from torch import Tensor, nn

from bench.harness.compare import NotRun
from ijepa_fast.config import MaskConfig
from ijepa_fast.flops import StepFlops, step_flops
from ijepa_fast.masks import Covered, Masks, MultiBlockMasks
from ijepa_fast.model import SIZES, Size, build_encoder, build_predictor

IMAGE_SIZE = 224
PREDICTOR_DIM = 384
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


class Model(NamedTuple):
    """A recipe of the paper at 224 px. Contexts are truncated within the whole batch."""

    encoder: str
    patch_size: int
    predictor_depth: int
    gpu_batch: int
    cpu_batch: int | None = None  # None: not run on a CPU

    @property
    def size(self) -> Size:
        return SIZES[self.encoder]

    @property
    def predictor_size(self) -> Size:
        return Size(PREDICTOR_DIM, self.predictor_depth, self.size.num_heads, 4 * PREDICTOR_DIM)

    @property
    def grid(self) -> int:
        return IMAGE_SIZE // self.patch_size

    def batch(self, device: torch.device) -> int:
        return self.gpu_batch if device.type == "cuda" else self.cpu_batch


MODELS = {
    "S16": Model("vit_small", 16, 6, 256, 16),
    "B16": Model("vit_base", 16, 6, 256, 4),
    "L16": Model("vit_large", 16, 12, 128),
    "H14": Model("vit_huge", 14, 12, 128),
    "g16": Model("vit_giant", 16, 16, 64),
}


def draw_masks(grid: int, batch: int, collate: str, steps: int = 16) -> Masks:
    """The step with the median number of tokens among the first `steps` of the real sampler; on the CPU."""
    sampler = MultiBlockMasks(MaskConfig(collate=collate, group=batch), grid, seed=0, global_batch=batch)
    drawn = [sampler.sample(step, 0, batch) for step in range(steps)]
    drawn.sort(key=lambda masks: len(masks.context.indices) + len(masks.target.indices))
    return drawn[steps // 2]


def masks_to(masks: Masks, device: torch.device) -> Masks:
    assert masks.covered is not None
    covered = Covered(*(x.to(device) for x in masks.covered))
    return Masks(masks.context.to(device), masks.target.to(device), masks.context_of.to(device), covered)


def rectangular(packed: Packed, batch: int) -> list[Tensor]:
    """Truncated, image-major sequences as the released code has them: a list of masks, each int64 `[B, K]`.

    Raises `ValueError` where lengths differ.
    """
    lengths = packed.cu_seqlens.diff()
    if len(lengths) % batch or (lengths != lengths[0]).any():
        raise ValueError("masks of different lengths are not rectangular")
    return list(packed.indices.long().view(batch, len(lengths) // batch, -1).unbind(1))


def draw_images(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same pixels as uint8 `[B, H, W, 3]`, and normalised, as float `[B, 3, H, W]`."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    images = torch.from_numpy(pixels).to(device)
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return images, ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def encode_photographs(size: str) -> list[bytes]:
    """One JPEG of each photograph that scikit-image ships; `size` is "WIDTHxHEIGHT" in pixels."""
    try:
        from skimage import data
    except ImportError:
        raise NotRun("scikit-image, which ships the photographs, is not installed") from None
    encoded = []
    for name in PHOTOGRAPHS:
        file = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize(tuple(map(int, size.split("x")))).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def encode_textures(images: int, size: str, nbytes: int) -> list[bytes]:
    """JPEGs of at least `nbytes` each, as little more as their quality allows. `size` is "WIDTHxHEIGHT" in pixels.

    Noise whose amplitude falls as 1 / frequency, as that of photographs does (Field 1987), and faster for colour.
    """
    width, height = map(int, size.split("x"))
    rng, encoded = np.random.default_rng(0), []
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / width)
    for _ in range(images):
        planes = []
        for slope, contrast in ((1, 50), (1.4, 15), (1.4, 15)):  # of Y, Cb and Cr
            phases = np.exp(2j * np.pi * rng.random(frequency.shape))
            plane = np.fft.irfft2(phases / frequency**slope, (height, width))
            planes.append(128 + contrast * plane / plane.std())
        image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr")
        for quality in range(60, 100):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            if file.tell() >= nbytes:
                break
        encoded.append(file.getvalue())
    return encoded


def write_photographs(folder: Path, size: str, images: int) -> None:
    """`images` files, the photographs over and over."""
    encoded = encode_photographs(size)
    for i in range(images):
        (folder / f"{i:05d}.jpg").write_bytes(encoded[i % len(encoded)])


class Setup:
    """The weights (fp32) and the batch of one model; `contexts` and `targets` are None where masks are ragged."""

    def __init__(
        self,
        model: Model,
        collate: str,
        device: torch.device,
        released: Path | None = None,
        *,
        compiled: bool = False,  # whether providers may compile; on a CPU that takes longer than all the rest
    ):
        self.model, self.device, self.released, self.compiled = model, device, released, compiled
        self.batch = model.batch(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with device:
            self.encoder, self.predictor = self.build_ours(self.dtype)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        with torch.no_grad():  # as after some training: the two encoders differ, but for their positions
            for name, parameter in self.target_encoder.named_parameters():
                parameter.mul_(1.0 if name == "pos_embed" else 1.01)
        masks = draw_masks(model.grid, self.batch, collate)
        self.lengths = masks.context.cu_seqlens.diff().numpy(), masks.target.cu_seqlens.diff().numpy()
        self.context_of = masks.context_of.numpy()
        assert masks.covered is not None
        self.covered = len(masks.covered.rows)
        self.contexts = self.targets = None
        if collate == "truncate":
            packed = masks.context, masks.target
            self.contexts, self.targets = ([m.to(device) for m in rectangular(p, self.batch)] for p in packed)
        self.masks = masks_to(masks, device)
        self.images, self.floats = draw_images(self.batch, device)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # AdamW's, by parameter

    def build_ours(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        size = {"image_size": IMAGE_SIZE, "patch_size": self.model.patch_size}
        encoder = build_encoder(self.model.encoder, **size, compute_dtype=dtype)
        return encoder, build_predictor(encoder, depth=self.model.predictor_depth, dim=PREDICTOR_DIM)

    def share(self, encoder: nn.Module, predictor: nn.Module, target_encoder: nn.Module) -> tuple[nn.Module, ...]:
        """The three modules, holding the shared weights instead of their own."""
        pairs = (encoder, self.encoder), (predictor, self.predictor), (target_encoder, self.target_encoder)
        for module, original in pairs:
            module.load_state_dict(original.state_dict(), assign=True)
        target_encoder.requires_grad_(False)
        return encoder, predictor, target_encoder

    def share_moments(self, optimizer: torch.optim.AdamW, **modules: nn.Module) -> None:
        """Give AdamW its state: moments that all providers share, like the weights, and its own step counter."""
        fused = optimizer.defaults["fused"]
        for role, module in modules.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    key = f"{role}.{name}"
                    if key not in self.moments:
                        self.moments[key] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                    first, second = self.moments[key]
                    step = torch.zeros((), device=p.device if fused else "cpu")  # where AdamW itself would put it
                    optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def build_baseline(self, encoder: type[nn.Module], predictor: type[nn.Module]) -> tuple[nn.Module, ...]:
        """Encoder, predictor and target encoder of a baseline's classes, on the shared weights."""
        patches = {"num_patches": self.model.grid**2}
        size = {**self.model.size._asdict(), **patches, "patch_size": self.model.patch_size}
        predictor_size = {**self.model.predictor_size._asdict(), **patches, "encoder_dim": self.model.size.dim}
        with torch.device("meta"):  # weights of their own would only take time
            modules = encoder(**size), predictor(**predictor_size), encoder(**size)
        return self.share(*modules)

    def flops(self) -> StepFlops:
        return step_flops(
            self.model.size,
            self.model.predictor_size,
            self.model.patch_size,
            images=self.batch,
            patches=self.model.grid**2,
            context_lengths=self.lengths[0],
            target_lengths=self.lengths[1],
            context_of=self.context_of,
            covered=self.covered,
        )

    def tokens(self) -> int:
        """Through all three transformers."""
        context, target = self.lengths
        return int(self.batch * self.model.grid**2 + context.sum() + context[self.context_of].sum() + target.sum())
