"""`straight`, our rewriting of the released step: the reference of the tests and a baseline of the benchmark.

It computes what the released loop computes, in the same way: a convolution embeds every patch and `torch.gather`
selects some; attention materialises its matrix; masks are rectangular, lists of int64 `[B, K]`, rows mask-major; the
predictor sees one sequence per target block and context; `F.layer_norm` and `F.smooth_l1_loss`; PyTorch's default
AdamW; the EMA tensor by tensor; bfloat16 autocast on CUDA. It leaves out the logging of gradient norms and the
GradScaler, which bfloat16 does not need. Parameters are named as in `ijepa_fast.model`, so `load_state_dict` moves
weights between the two.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        head_dim = dim // self.num_heads
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(dim=-1)  # [B, heads, L, L]
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class StraightEncoder(nn.Module):
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
            x = gather_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class StraightPredictor(nn.Module):
    def __init__(self, *, encoder_dim: int, dim: int, depth: int, num_heads: int, mlp_dim: int, num_patches: int):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, mlp_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder_dim)

    def forward(self, tokens: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Predictions `[len(targets) * len(contexts) * B, K, D]`: by target, then by context, then by image."""
        batch = len(tokens) // len(contexts)
        positions = self.predictor_pos_embed.expand(batch, -1, -1)
        x = self.predictor_embed(tokens) + gather_masks(positions, contexts)
        queries = self.mask_token + repeat_for_contexts(gather_masks(positions, targets), batch, len(contexts))
        x = torch.cat([x.repeat(len(targets), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        x = self.predictor_norm(x)
        return self.predictor_proj(x[:, contexts[0].shape[1] :])


def gather_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Rows of x `[B, N, D]` at each mask `[B, K]`, mask after mask: `[len(masks) * B, K, D]`."""
    return torch.cat([x.gather(1, mask.unsqueeze(-1).repeat(1, 1, x.shape[-1])) for mask in masks])


def repeat_for_contexts(x: Tensor, batch: int, contexts: int) -> Tensor:
    """Every mask's `batch` rows `contexts` times over, the copies side by side."""
    return torch.cat([part.repeat(contexts, 1, 1) for part in x.split(batch)])


def straight_models(encoder: nn.Module, predictor: nn.Module) -> tuple[StraightEncoder, StraightPredictor]:
    """The straight twins of an `ijepa_fast` encoder and predictor, with copies of their weights."""
    num_patches = encoder.grid**2
    twins = (
        StraightEncoder(**encoder.size._asdict(), num_patches=num_patches, patch_size=encoder.patch_size),
        StraightPredictor(encoder_dim=encoder.size.dim, **predictor.size._asdict(), num_patches=num_patches),
    )
    for twin, model in zip(twins, (encoder, predictor), strict=True):
        twin.load_state_dict(model.state_dict())
    return twins


def straight_optimizer(encoder: nn.Module, predictor: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """PyTorch's AdamW with its defaults; biases and other 1-D parameters are not decayed."""
    parameters = [p for model in (encoder, predictor) for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def straight_loss(
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    images: Tensor,
    contexts: list[Tensor],
    targets: list[Tensor],
    kind: str = "smooth_l1",
    *,
    autocast: bool = True,
) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast and images.is_cuda):
        with torch.no_grad():
            features = target_encoder(images)
            features = F.layer_norm(features, features.shape[-1:])
            features = repeat_for_contexts(gather_masks(features, targets), len(images), len(contexts))
        predicted = predictor(encoder(images, contexts), contexts, targets)
        return {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[kind](predicted, features)


def straight_step(
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    contexts: list[Tensor],
    targets: list[Tensor],
    momentum: float,
) -> Tensor:
    """One whole update in place: loss, backward, AdamW, EMA. Returns the loss, detached."""
    loss = straight_loss(encoder, predictor, target_encoder, images, contexts, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    straight_ema(target_encoder, encoder, momentum)
    return loss.detach()


@torch.no_grad()
def straight_ema(target_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    for source, target in zip(encoder.parameters(), target_encoder.parameters(), strict=True):
        target.mul_(momentum).add_((1.0 - momentum) * source)
