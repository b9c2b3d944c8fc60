"""Fine-tuning of the whole encoder, with all labels or with those of a list (the official 1 %).

As the paper's appendix and MAE (arXiv 2111.06377, A.2) do it: AdamW, a learning rate that falls by 0.75 from each block
to the one below, label smoothing 0.1, the mean over patches before a linear head. Random resized crops and flips are
the only augmentation here: RandAugment, mixup and stochastic depth are not done.
"""
import copy
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_fast.evaluation import supervised
from ijepa_fast.evaluation.dataset import DataSet
from ijepa_fast.evaluation.frozen import Encoder
from ijepa_fast.evaluation.results import Row, accuracy_row
from ijepa_fast.evaluation.supervised import Images, Recipe
from ijepa_fast.model import VisionTransformer

EPOCHS, LR, WEIGHT_DECAY, MOST = 50, 1e-3, 0.05, 512
WARMUP_EPOCHS, SMOOTHING, LAYER_DECAY = 5, 0.1, 0.75


class _Classifier(nn.Module):
    def __init__(self, encoder: VisionTransformer, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.size.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).float().mean(1))


def finetune_rows(
    model: Encoder,
    data: DataSet,
    images: Images,
    *,
    chosen: Tensor | None = None,
    epochs: int | None = None,
    lr: float | None = None,
) -> list[Row]:
    """One row, the same on every rank; trains a copy of the encoder, with the images at positions `chosen` of train."""
    if chosen is not None:
        data = data._replace(train=data.train.take(chosen.numpy()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(images.seed)
        net = _Classifier(copy.deepcopy(model.encoder), len(data.class_names)).to(images.world.device)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith("pos_embed"))
    epochs = epochs or EPOCHS
    warmup = min(WARMUP_EPOCHS, epochs // 4)
    recipe = Recipe(epochs, supervised.default_batch(data, MOST), lr or LR, WEIGHT_DECAY, warmup, SMOOTHING)
    groups = layer_groups(net, recipe.weight_decay)
    supervised.train(net, groups, data.train, recipe, images, "fine-tuning")
    logits = supervised.predict(net, data.val, images, recipe.batch, "fine-tuning")
    setting = f"{len(data.train.ids)} images, {recipe.epochs} epochs, lr {recipe.lr:g}"
    return [accuracy_row("finetune", "fine-tuned", logits.argmax(1), torch.from_numpy(data.val.labels), setting)]


def layer_groups(net: _Classifier, weight_decay: float, decay: float = LAYER_DECAY) -> list[dict[str, Any]]:
    """AdamW's groups: `lr_scale` is 1 for head and last norm, `decay` for the last block, its square below, and so on.

    Biases and other parameters of one dimension are not decayed.
    """
    depth = len(net.encoder.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth + 1
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("encoder.patch_embed."):
            layer = 0
        decayed = parameter.ndim > 1
        group = {"params": [], "lr_scale": decay ** (depth + 1 - layer), "weight_decay": weight_decay * decayed}
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return list(groups.values())
