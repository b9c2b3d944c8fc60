"""The attentive probe: a learned query looks at all patch features of a frozen encoder, then a linear classifier.

As V-JEPA evaluates (Bardes et al., arXiv 2404.08471, appendix): one cross-attention block (query + attention of it to
the normalised patches, then an MLP with a residual) with the encoder's width and heads, AdamW and a cosine schedule. It
is for features whose mean says less than their parts. The recipe below is one choice for all sets; nothing is tuned.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.evaluation import supervised
from ijepa_fast.evaluation.dataset import DataSet
from ijepa_fast.evaluation.frozen import Encoder
from ijepa_fast.evaluation.results import Row, accuracy_row
from ijepa_fast.evaluation.supervised import Images, Recipe

EPOCHS, LR, WEIGHT_DECAY, MOST = 20, 1e-3, 0.01, 256


class AttentiveHead(nn.Module):
    """Patch features `[B, N, D]` to logits `[B, classes]`."""

    def __init__(self, dim: int, num_heads: int, classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.classifier = nn.Linear(dim, classes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        q = self.q(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm1(x)).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        query = query + self.proj(attended)
        query = query + self.fc2(F.gelu(self.fc1(self.norm2(query))))
        return self.classifier(query[:, 0])


class _Frozen(nn.Module):
    def __init__(self, model: Encoder, head: AttentiveHead):
        super().__init__()
        self.head = head
        self._features = model.features  # not a submodule: it stays in eval mode, without gradients

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            patches = self._features(images, layers=1, pool=None)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            return self.head(patches)


def attentive_rows(
    model: Encoder, data: DataSet, images: Images, *, epochs: int | None = None, lr: float | None = None
) -> list[Row]:
    """One row, the same on every rank."""
    encoder = model.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(images.seed)
        head = AttentiveHead(encoder.size.dim, encoder.size.num_heads, len(data.class_names))
    net = _Frozen(model, head).to(images.world.device)
    recipe = Recipe(epochs or EPOCHS, supervised.default_batch(data, MOST), lr or LR, WEIGHT_DECAY, 1, 0.0)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "lr_scale": 1.0, "weight_decay": recipe.weight_decay},
        {"params": rest, "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    supervised.train(net, groups, data.train, recipe, images, "attentive probe")
    logits = supervised.predict(net, data.val, images, recipe.batch, "attentive probe")
    setting = f"{recipe.epochs} epochs, lr {recipe.lr:g}"
    return [accuracy_row("attentive", "patches", logits.argmax(1), torch.from_numpy(data.val.labels), setting)]
