"""I-JEPA's two transformers, over packed tokens: the Vision Transformer encoder and the narrow predictor.

A batch of sequences of any lengths is one `[T, D]` tensor with `cu_seqlens` (see `ijepa_kernels.Packed`): the context
of one image after that of another, without padding. The architecture is the pre-norm ViT of Dosovitskiy et al., "An
Image is Worth 16x16 Words" (arXiv 2010.11929), without a class token, as I-JEPA uses it (arXiv 2301.08243): exact GELU,
biases everywhere, layer norm with eps 1e-6, no dropout, frozen sin-cos positions. Parameters carry timm's names.
"""
import math
from typing import NamedTuple, get_args

import torch
from ijepa_kernels import Packed, embed_patches, gather_tokens, predictor_tokens
from ijepa_kernels.fp8 import Scales
from torch import Tensor, nn

from ijepa_fast.blocks import Block, Branch, Distinct, LayerNorm, Linear
from ijepa_fast.copies import Copies, copied
from ijepa_fast.fp8 import QuantizedWeights

INIT_STD = 0.02
DENSE_KEPT = 8  # batch sizes


class Size(NamedTuple):
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int


# The giant's MLP is 48/11 as wide as its stream, all others' four times.
SIZES = {
    "vit_tiny": Size(192, 12, 3, 768),
    "vit_small": Size(384, 12, 6, 1536),
    "vit_base": Size(768, 12, 12, 3072),
    "vit_large": Size(1024, 24, 16, 4096),
    "vit_huge": Size(1280, 32, 16, 5120),
    "vit_giant": Size(1408, 40, 16, 6144),
}


class PatchEmbed(nn.Module):
    """Linear embedding of the listed patches alone. `proj` is a convolution for its names and layout; it never runs."""

    def __init__(self, patch_size: int, dim: int, compute_dtype: torch.dtype):
        super().__init__()
        self.patch_size = patch_size
        self.compute_dtype = compute_dtype
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.copies: tuple[Tensor, Tensor] | None = None
        # All of the encoder's copies, for it begins here whoever runs its blocks.
        self.encoder_copies: list[Copies | QuantizedWeights] = []

    def forward(
        self, images: Tensor, packed: Packed, pos_embed: Tensor, residual_dtype: torch.dtype
    ) -> tuple[Tensor, Branch | None]:
        """The stream of the first block, and what is to be added to it first.

        Beside a wider stream only the projection is rounded: the first norm adds it to the positions, and the bias too.
        """
        bias, dtype = self.proj.bias, self.compute_dtype
        self.refresh_copies()
        weight = self.proj.weight if self.copies is None else copied(self.proj.weight, self.copies[0])
        if torch.finfo(dtype).bits >= torch.finfo(residual_dtype).bits:
            x = embed_patches(images, packed, weight, bias, pos_embed, patch_size=self.patch_size, dtype=dtype)
            return x.to(residual_dtype), None
        projected = embed_patches(images, packed, weight, None, None, patch_size=self.patch_size, dtype=dtype)
        one = packed._replace(image=torch.zeros_like(packed.image))  # every sequence takes its positions from there
        return gather_tokens(pos_embed, one).to(residual_dtype), Branch(projected, bias)

    def refresh_copies(self) -> None:
        for copies in self.encoder_copies:
            copies.refresh()


class VisionTransformer(nn.Module):
    """The encoder; context and target encoder are two of these. Build it with `build_encoder`."""

    def __init__(
        self, size: Size, image_size: int, patch_size: int, compute_dtype: torch.dtype, residual_dtype: torch.dtype
    ):
        super().__init__()
        self.size, self.image_size, self.patch_size = size, image_size, patch_size
        self.grid = image_size // patch_size
        self.compute_dtype, self.residual_dtype = compute_dtype, residual_dtype
        self.patch_embed = PatchEmbed(patch_size, size.dim, compute_dtype)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, size.dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(size.dim, size.num_heads, size.mlp_dim, compute_dtype) for _ in range(size.depth)
        )
        self.norm = LayerNorm(size.dim)
        self.copies: Copies | None = None
        self._dense: dict[tuple[int, torch.device], Packed] = {}

    def forward(self, images: Tensor, packed: Packed | None = None, rows: Tensor | None = None) -> Tensor:
        """Features of the listed patches, `[T, D]`, or of every patch, `[B, N, D]`, when `packed` is left out; fp32.

        `images` are uint8 `[B, H, W, 3]`, normalised inside with ImageNet's statistics, or float `[B, 3, H, W]` taken
        as normalised. A patch attends to the patches of its own sequence. With `rows` (int64 `[R]`, distinct) the
        result is of those rows alone, `[R, D]`, of the T listed or of B * N: the last block finishes no others.
        """
        listed = self.every_patch(images) if packed is None else packed
        x, branch = self.patch_embed(images, listed, self.pos_embed, self.residual_dtype)
        *blocks, last = self.blocks
        for block in blocks:
            x, branch = block(x, branch, listed.cu_seqlens, listed.max_seqlen)
        x, branch = last(x, branch, listed.cu_seqlens, listed.max_seqlen, rows)
        _, x = self.norm(x, branch, torch.promote_types(x.dtype, torch.float32))
        return x.view(len(images), self.grid**2, -1) if packed is None and rows is None else x

    def refresh_copies(self) -> None:
        """Make the copies of changed weights anew, as each forward does at its beginning."""
        self.patch_embed.refresh_copies()

    def kept_copies(self) -> list[Copies | QuantizedWeights]:
        """Those that the optimizer writes with the weights: all but the ones with one scale of a whole matrix."""
        copies = self.patch_embed.encoder_copies
        return [one for one in copies if not (isinstance(one, QuantizedWeights) and one.scales == "tensor")]

    def every_patch(self, images: Tensor) -> Packed:
        """`Packed.dense` of a batch, kept on the device for the next batch of that size."""
        if torch.compiler.is_compiling() or type(images) is not Tensor:
            return Packed.dense(len(images), self.grid**2, device=images.device)  # not to keep tensors without values
        key = len(images), images.device
        if key not in self._dense:
            if len(self._dense) == DENSE_KEPT:
                self._dense.clear()
            with torch.inference_mode(False):  # a later training step may save them for its backward
                self._dense[key] = Packed.dense(len(images), self.grid**2, device=images.device)
        return self._dense[key]


class Predictor(nn.Module):
    """The narrow transformer that predicts the target encoder's features. Build it with `build_predictor`."""

    def __init__(
        self,
        encoder_dim: int,
        size: Size,
        grid: int,
        compute_dtype: torch.dtype,
        residual_dtype: torch.dtype,
    ):
        super().__init__()
        self.size, self.grid = size, grid
        self.residual_dtype = residual_dtype
        self.predictor_embed = Linear(encoder_dim, size.dim, compute_dtype)
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.dim))
        self.predictor_pos_embed = nn.Parameter(torch.empty(1, grid**2, size.dim), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(size.dim, size.num_heads, size.mlp_dim, compute_dtype) for _ in range(size.depth)
        )
        self.predictor_norm = LayerNorm(size.dim)
        self.predictor_proj = Linear(size.dim, encoder_dim, compute_dtype)
        self.copies: Copies | None = None

    def forward(self, tokens: Tensor, context: Packed, target: Packed, context_of: Tensor | None = None) -> Tensor:
        """Predicted features at the target patches, `[T_tgt, D_enc]` in the compute dtype, rows in target's order.

        `tokens` `[T_ctx, D_enc]` are the encoder's features of `context`. Each target sequence is predicted by itself,
        from the context sequence `context_of` (int32 `[S_tgt]`) names; without it an image has one context, and image
        numbers match them.
        """
        self.refresh_copies()
        x = self.predictor_embed(tokens).to(self.residual_dtype)
        distinct: Distinct | None = Distinct(self._each_once(x, context), context, target, context_of)
        x, cu_seqlens, mask_rows = predictor_tokens(
            x, self.mask_token, self.predictor_pos_embed, context, target, context_of
        )
        max_seqlen = context.max_seqlen + target.max_seqlen
        branch = None
        *blocks, last = self.predictor_blocks
        for block in blocks:
            x, branch = block(x, branch, cu_seqlens, max_seqlen, None, distinct)
            distinct = None
        # Only the mask tokens are read from here on: the last block finishes two thirds fewer rows.
        x, branch = last(x, branch, cu_seqlens, max_seqlen, mask_rows, distinct)
        return self.predictor_proj(self.predictor_norm(x, branch, self.predictor_proj.compute_dtype)[1])

    def refresh_copies(self) -> None:
        """Make the copies of changed weights anew, as each forward does at its beginning."""
        if self.copies is not None:
            self.copies.refresh()

    def kept_copies(self) -> list[Copies]:
        """As the encoder's."""
        return [] if self.copies is None else [self.copies]

    def _each_once(self, x: Tensor, context: Packed) -> Tensor:
        """The tokens of the contexts, and a mask token at every patch, with their positions: `Distinct.x`."""
        positions = self.predictor_pos_embed[0]
        seen = x + positions.index_select(0, context.indices)
        return torch.cat([seen.to(x.dtype), (self.mask_token[0] + positions).to(x.dtype)])


def build_encoder(
    name: str,
    *,
    image_size: int,
    patch_size: int,
    compute_dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype = torch.float32,
) -> VisionTransformer:
    """A `vit_tiny` ... `vit_giant` of square images, `image_size` and `patch_size` in pixels, parameters in fp32.

    Weights are drawn from torch's global generator (see `init_weights`). Under `torch.device("meta")` it costs nothing;
    then `to_empty` and `init_weights` make it real. Matrix products take `compute_dtype` inputs; the residual stream is
    kept in `residual_dtype`.
    """
    if name not in SIZES:
        raise ValueError(f"there is no encoder {name!r}; the names are {', '.join(SIZES)}")
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    encoder = VisionTransformer(SIZES[name], image_size, patch_size, compute_dtype, residual_dtype)
    init_weights(encoder)
    return encoder


def build_predictor(encoder: VisionTransformer, depth: int, dim: int) -> Predictor:
    """The predictor for `encoder`, with its heads, patch grid and dtypes: `depth` blocks of width `dim`."""
    heads = encoder.size.num_heads
    if depth < 1:
        raise ValueError(f"the predictor needs at least 1 block, got depth {depth}")
    if dim % heads or dim % 4:
        raise ValueError(f"the predictor's dim {dim} must be a multiple of 4 and of the encoder's {heads} heads")
    size = Size(dim, depth, heads, 4 * dim)
    predictor = Predictor(encoder.size.dim, size, encoder.grid, encoder.compute_dtype, encoder.residual_dtype)
    init_weights(predictor)
    return predictor


def keep_copies(model: VisionTransformer | Predictor) -> None:
    """From now on matrix products read copies of the weights: in the compute dtype, where that is not the weights' own,
    and in e4m3 those of fp8 layers.

    For whole parameters that stay where they are; FSDP, which gathers its shards in that dtype, needs none.
    """
    layers = [part for part in model.modules() if isinstance(part, Linear | PatchEmbed)]
    fp8 = [layer for layer in layers if isinstance(layer, Linear) and layer.fp8 is not None]
    low = [layer for layer in layers if layer.compute_dtype != next(layer.parameters()).dtype]
    if low:
        of_fp8 = {layer.weight for layer in fp8}
        copied_ones = [p for layer in low for p in layer.parameters() if p not in of_fp8]
        model.copies = Copies(copied_ones, low[0].compute_dtype)
        for layer in low:
            weight, bias = layer.parameters()
            if weight in of_fp8:
                layer.bias_copy = model.copies[bias]
            else:
                layer.copies = model.copies[weight], model.copies[bias]
    if isinstance(model, VisionTransformer):
        model.patch_embed.encoder_copies = [] if model.copies is None else [model.copies]
        for scales in get_args(Scales):
            if of_kind := [layer for layer in fp8 if layer.fp8 == scales]:
                model.patch_embed.encoder_copies.append(QuantizedWeights(of_kind, scales))


def sincos_positions(grid: int, dim: int) -> Tensor:
    """Sine-cosine embedding of a square grid, fp32 `[grid * grid, dim]`, rows in raster order.

    Vaswani et al. (arXiv 1706.03762) in two dimensions, as in MAE (arXiv 2111.06377) and I-JEPA: the first half of the
    channels encodes the column, the second the row; each half is its sines, then its cosines, at dim / 4 wavelengths
    from 2 pi up to (excluded) 10000 * 2 pi.
    """
    quarter = dim // 4
    frequency = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(10000.0) / quarter))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, dim / 2]
    columns, rows = wave.repeat(grid, 1), wave.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of an encoder or a predictor, in place, from `generator` alone.

    As the released recipe ends up: every matrix, the patch projection and the mask token normal with std 0.02
    (truncated at 2.0, a hundred standard deviations away), biases zero, norms one and zero. The released models also
    divide attn.proj and mlp.fc2 of block l by sqrt(2 l), as BEiT does, but the released training script then draws
    every Linear again, so the published runs trained without it.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=INIT_STD, a=-2.0, b=2.0, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, VisionTransformer):
            part.pos_embed.copy_(sincos_positions(part.grid, part.size.dim))
        elif isinstance(part, Predictor):
            nn.init.trunc_normal_(part.mask_token, std=INIT_STD, a=-2.0, b=2.0, generator=generator)
            part.predictor_pos_embed.copy_(sincos_positions(part.grid, part.size.dim))
