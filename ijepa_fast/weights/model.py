"""A model that was loaded: features of images, and what its predictor says of hidden blocks."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from ijepa_kernels import Packed
from PIL import Image
from torch import Tensor, nn

from ijepa_fast.blocks import Linear
from ijepa_fast.data.decoder_pillow import crop, open_image
from ijepa_fast.data.sampler import center_boxes
from ijepa_fast.errors import UserError
from ijepa_fast.model import PatchEmbed, Predictor, VisionTransformer

Picture = Image.Image | str | Path
Images = Tensor | Picture | Sequence[Picture]


class Model(nn.Module):
    """What `ijepa_fast.load` returns: an encoder, and the predictor where the file holds one.

    `which` says which encoder `encoder` is, "target" or "context". `context_encoder` is what the predictor looks with:
    the context encoder where the file holds it, else `encoder`. `about` has plain values on where the weights are from.
    Images are uint8 `[B, H, W, 3]` or `[B, 3, H, W]`; float `[B, 3, H, W]`, taken as normalised with ImageNet's
    statistics; or one or several of PIL images and paths, of which the central square is taken (0.875 of the shorter
    side, as this project evaluates) and resized to the model's size.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor | None,
        context_encoder: VisionTransformer,
        which: str,
        about: dict[str, Any],
    ):
        super().__init__()
        self.encoder, self.predictor, self.context_encoder = encoder, predictor, context_encoder
        self.which, self.about = which, about
        self.image_size, self.patch_size = encoder.image_size, encoder.patch_size

    @torch.no_grad()
    def features(
        self,
        images: Images,
        layers: int = 1,
        pool: Literal["mean"] | None = "mean",
        *,
        image_size: int | None = None,
    ) -> Tensor:
        """fp32 `[B, layers * D]`, the mean over all patches; with `pool=None` of every patch, `[B, N, layers * D]`.

        With `layers` > 1 the last so many blocks, each through the final norm, side by side, the last one last (the
        paper's second representation takes four, I-JEPA, arXiv 2301.08243, A.2). Tensors may have any sides that are
        multiples of the patch size: positions are then interpolated. `image_size` resizes PIL images and paths to
        another size. All images are one batch. Raises ValueError for arguments that do not fit, UserError for a file
        that is no image.
        """
        depth = len(self.encoder.blocks)
        if not 1 <= layers <= depth:
            raise ValueError(f"layers: want 1 to {depth}, the blocks of this encoder, got {layers}")
        if pool not in ("mean", None):
            raise ValueError(f"pool: want 'mean' or None, got {pool!r}")
        pixels = self._pixels(images, image_size)
        features = torch.cat(last_blocks(self.encoder, pixels, layers), dim=-1)
        return features.mean(1) if pool == "mean" else features

    @torch.no_grad()
    def predict(self, images: Images, context: Packed, target: Packed) -> Tensor:
        """What the predictor says of the target encoder's features at the `target` patches: fp32 `[T_tgt, D]`.

        The context encoder looks at the `context` patches of the images, which have the model's own size. Rows are in
        the order of `target`; each of its sequences is predicted by itself, from the context of its image. Raises
        UserError where the file holds no predictor.
        """
        if self.predictor is None:
            raise UserError(f"{self.about.get('source', 'the file')} holds no predictor: load a run's weights, or a "
                            f"released checkpoint")  # fmt: skip
        pixels = self._pixels(images, None)
        context, target = context.to(pixels.device), target.to(pixels.device)
        tokens = self.context_encoder(pixels, context)
        return self.predictor(tokens, context, target).float()

    def to(  # type: ignore[override] # none of its other arguments make sense here
        self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> "Model":
        """Move to a device, and multiply matrices in `dtype`: float32, bfloat16 or float16.

        Matrices are kept in `dtype`; norms, positions and the residual stream stay fp32. `.to(torch.bfloat16)` works
        too.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: want float32, bfloat16 or float16, got {dtype}")
        if dtype is not None:
            for part in self.modules():
                if isinstance(part, Linear | PatchEmbed | VisionTransformer):
                    part.compute_dtype = dtype
                if isinstance(part, Linear | nn.Conv2d):
                    nn.Module.to(part, dtype=dtype)
        if device is not None:
            super().to(device=device, non_blocking=non_blocking)
        return self

    def _pixels(self, images: Images, image_size: int | None) -> Tensor:
        """On the encoder's device, as the encoder takes them."""
        device = self.encoder.pos_embed.device
        if isinstance(images, Tensor):
            if image_size is not None:
                raise ValueError("image_size: tensors are taken in the size they have; resize them before")
            if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[3] != 3:
                images = images.permute(0, 2, 3, 1)
            return images.to(device)
        pictures = [images] if isinstance(images, Picture) else list(images)
        if not pictures:
            raise ValueError("images: want at least one, got none")
        size = self.image_size if image_size is None else image_size
        return torch.from_numpy(np.stack([central(picture, size) for picture in pictures])).to(device)


def central(picture: Picture, size: int) -> np.ndarray:
    """The central square of a PIL image or of a file, resized: uint8 `[size, size, 3]`. Raises UserError."""
    if isinstance(picture, Image.Image):
        return _central(picture, size)
    try:
        with open(picture, "rb") as file, open_image(file) as image:
            return _central(image, size)
    except OSError as error:
        raise UserError(f"{picture} cannot be read as an image: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{picture} cannot be read as an image: {error}") from None


def _central(image: Image.Image, size: int) -> np.ndarray:
    box = center_boxes(np.array([image.width]), np.array([image.height]))[0]
    return np.array(crop(image, box.tolist(), size))


def last_blocks(encoder: VisionTransformer, images: Tensor, layers: int) -> list[Tensor]:
    """Features of every patch after each of the last `layers` blocks, through the final norm: fp32 `[B, N, D]` each.

    `images` as the encoder takes them, in any size that is a multiple of the patch size.
    """
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
    grid = height // encoder.patch_size, width // encoder.patch_size
    packed = Packed.dense(len(images), grid[0] * grid[1], device=images.device)
    x, branch = encoder.patch_embed(images, packed, positions(encoder, grid), encoder.residual_dtype)
    outputs = []
    for number, block in enumerate(encoder.blocks, start=1):
        x, branch = block(x, branch, packed.cu_seqlens, packed.max_seqlen)
        if number > len(encoder.blocks) - layers:
            _, normed = encoder.norm(x, branch, torch.float32)
            outputs.append(normed.view(len(images), grid[0] * grid[1], -1))
    return outputs


def positions(encoder: VisionTransformer, grid: tuple[int, int]) -> Tensor:
    """The encoder's position embeddings for a grid of other sides (rows, columns): `[1, rows * columns, D]`.

    Bicubic without antialiasing, as DINO did it first (arXiv 2104.14294, section 2 of its code's ViT) and as
    transformers' `IJepaModel` does.
    """
    if grid == (encoder.grid, encoder.grid):
        return encoder.pos_embed
    square = encoder.pos_embed.unflatten(1, (encoder.grid, encoder.grid)).permute(0, 3, 1, 2)
    other = F.interpolate(square, grid, mode="bicubic", align_corners=False)
    return other.permute(0, 2, 3, 1).flatten(1, 2)
