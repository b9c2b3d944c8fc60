"""`tuned`: the step as a good engineer tunes it with PyTorch alone, a baseline of the benchmark.

It computes the same rows as `straight`, with `scaled_dot_product_attention`, gathers by row number, fused AdamW, the
EMA in one foreach call, and `torch.compile` of every transformer block (on a CPU only with --compile). Shapes are
dynamic, because the lengths of truncated masks change from step to step. Parameters are named as in
`ijepa_fast.model`, so `load_state_dict` moves weights between the two.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines.straight import MLP, PatchEmbed


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TunedEncoder(nn.Module):
    def __init__(self, *, dim: int, depth: int, num_heads: int, mlp_dim: int, num_patches: int, patch_size: int):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """`images` float `[B, 3, H, W]`, normalised; with masks `[len(masks) * B, K, D]`, else `[B, N, D]`."""
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = select(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TunedPredictor(nn.Module):
    def __init__(self, *, encoder_dim: int, dim: int, depth: int, num_heads: int, mlp_dim: int, num_patches: int):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, mlp_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder_dim)

    def forward(self, tokens: Tensor, context: Tensor, targets: list[Tensor]) -> Tensor:
        """One context an image, `[B, K]`. Predictions `[len(targets) * B, K, D]`: by target, then by image."""
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(tokens) + positions[context]
        queries = self.mask_token + positions[torch.cat(targets)]
        x = torch.cat([x.repeat(len(targets), 1, 1), queries.to(x.dtype)], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :]))


def select(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Rows of x `[B, N, D]` at each mask `[B, K]`, mask after mask, by row numbers instead of an index of [B, K, D]."""
    start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    rows = torch.cat([mask + start for mask in masks])
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def compile_blocks(*models: nn.Module) -> None:
    """Each block by itself: one compilation serves all blocks of a model."""
    for model in models:
        for part in model.modules():
            if isinstance(part, Block):
                part.compile(dynamic=True)


def tuned_loss(
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    images: Tensor,
    contexts: list[Tensor],
    targets: list[Tensor],
) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        with torch.no_grad():
            features = select(target_encoder(images), targets)
            features = F.layer_norm(features, features.shape[-1:])
        predicted = predictor(encoder(images, contexts), contexts[0], targets)
        return F.smooth_l1_loss(predicted, features)


@torch.no_grad()
def tuned_ema(target_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    pairs = zip(target_encoder.parameters(), encoder.parameters(), strict=True)
    targets, sources = zip(*((t, s) for t, s in pairs if s.requires_grad), strict=True)
    torch._foreach_lerp_(list(targets), list(sources), 1 - momentum)
