"""Another JEPA codebase takes single ops: a small foreign training loop, its helpers swapped for ours, the same losses.

The loop below stands for a codebase that knows nothing of ours: dense tensors, masks as lists of [B, K], parameters in
pairs. This file is also the script that runs it, in a process where `ijepa_fast` cannot be imported.
"""
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

STEPS, BATCH, PATCHES, DIM = 12, 4, 16, 32


class ForeignEncoder(nn.Module):
    def __init__(self, select):
        super().__init__()
        self.select = select
        self.embed = nn.Linear(12, DIM)
        self.positions = nn.Parameter(torch.randn(1, PATCHES, DIM))
        self.block = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, patches, masks=None):
        x = self.embed(patches) + self.positions
        return self.block(x if masks is None else self.select(x, masks))


class ForeignPredictor(nn.Module):
    """One pass per target mask: context tokens, then a mask token at each target position."""

    def __init__(self, select):
        super().__init__()
        self.select = select
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(torch.randn(1, PATCHES, DIM))
        self.block = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, context, masks):
        queries = self.token + self.select(self.positions.expand(BATCH, -1, -1), masks)
        x = self.block(torch.cat([context.repeat(len(masks), 1, 1), queries], 1))
        return x[:, context.shape[1] :]


def foreign_helpers():
    def select(x, masks):
        return torch.cat([x.gather(1, m[..., None].expand(-1, -1, x.shape[-1])) for m in masks])

    def loss(predicted, features, masks):
        return F.smooth_l1_loss(predicted, select(F.layer_norm(features, (DIM,)), masks))

    def l1_of_each_mask(predicted, features, masks):
        features = F.layer_norm(features, (DIM,))
        parts = zip(predicted.chunk(len(masks)), masks, strict=True)
        return sum((p - select(features, [m])).abs().mean() for p, m in parts) / len(masks)

    @torch.no_grad()
    def average(targets, sources, momentum):
        for t, s in zip(targets, sources, strict=True):
            t.mul_(momentum).add_((1 - momentum) * s)

    return select, loss, l1_of_each_mask, average


def our_helpers():
    from ijepa_kernels import Packed, apply_masks, ema_update_, smooth_l1_loss

    def loss(predicted, features, masks, **options):
        return smooth_l1_loss(predicted.flatten(0, 1), features, Packed.from_masks(masks, PATCHES), **options)

    def l1_of_each_mask(predicted, features, masks):
        parts = zip(predicted.chunk(len(masks)), masks, strict=True)
        return sum(loss(p, features, [m], beta=0) for p, m in parts) / len(masks)

    return apply_masks, loss, l1_of_each_mask, ema_update_


def train(helpers, which_loss: int) -> list[float]:
    select, average = helpers[0], helpers[3]
    loss_of = helpers[which_loss]
    torch.manual_seed(0)
    encoder, predictor = ForeignEncoder(select), ForeignPredictor(select)
    target = ForeignEncoder(select).requires_grad_(False)
    target.load_state_dict(encoder.state_dict())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1e-3)
    losses = []
    for step in range(STEPS):
        patches = torch.randn(BATCH, PATCHES, 12)
        order = torch.stack([torch.randperm(PATCHES) for _ in range(BATCH)])
        lengths = 5 + step % 3, 3 + step % 2  # as masks that change from step to step
        context = order[:, : lengths[0]].sort(1)[0]
        masks = [order[:, -lengths[1] :].sort(1)[0], order[:, -2 * lengths[1] : -lengths[1]].sort(1)[0]]
        with torch.no_grad():
            features = target(patches)
        loss = loss_of(predictor(encoder(patches, [context]), masks), features, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average(list(target.parameters()), list(encoder.parameters()), 0.99)
        losses.append(loss.item())
    return losses


def main() -> None:
    sys.modules["ijepa_fast"] = None  # any import of it raises
    torch.set_num_threads(1)
    foreign, ours = ([train(helpers(), which) for which in (1, 2)] for helpers in (foreign_helpers, our_helpers))
    print(json.dumps({"foreign": foreign, "ours": ours}))


@pytest.mark.long
def test_a_foreign_loop_takes_gather_loss_and_ema():
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    losses = json.loads(result.stdout)
    for foreign, ours in zip(losses["foreign"], losses["ours"], strict=True):
        assert len(foreign) == len(ours) == STEPS
        assert max(abs(a - b) for a, b in zip(foreign, ours, strict=True)) <= 1e-6
        assert min(foreign) < 0.99 * foreign[0]  # it learns: the losses are not one constant


if __name__ == "__main__":
    main()
