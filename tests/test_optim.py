"""Parameter groups and schedules, against the released recipe's arithmetic done step by step."""
import copy
import dataclasses
import itertools
import math

import pytest
import torch
from ijepa_kernels import Packed, ema_update_

from bench.baselines.straight import straight_models, straight_optimizer, straight_step
from ijepa_fast.masks import Masks
from ijepa_fast.model import Size, VisionTransformer, build_predictor, init_weights
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import Schedule, build_optimizer, param_groups, set_rates

RECIPE = Schedule(
    steps_per_epoch=7,
    epochs=10,
    warmup_epochs=1.5,
    start_lr=2e-4,
    peak_lr=1e-3,
    final_lr=1e-6,
    start_weight_decay=0.04,
    final_weight_decay=0.4,
    start_momentum=0.996,
    final_momentum=1.0,
)


def simulate(s: Schedule) -> list[tuple[float, float, float]]:
    """(lr, weight decay, momentum) of every update of a run, as the released loop's three tickers give them."""
    ipe, total = s.steps_per_epoch, int(s.schedule_stretch * s.epochs * s.steps_per_epoch)
    warmup = int(s.warmup_epochs * ipe)
    share = (s.final_momentum - s.start_momentum) / (ipe * s.epochs * s.schedule_stretch)
    momenta = (s.start_momentum + i * share for i in range(total + 1))
    rows = []
    for tick in range(1, s.epochs * ipe + 1):  # both rates tick before the update, the momentum after it
        if tick < warmup:
            lr = s.start_lr + tick / max(1, warmup) * (s.peak_lr - s.start_lr)
        else:
            part = (tick - warmup) / max(1, total - warmup)
            lr = max(s.final_lr, s.final_lr + (s.peak_lr - s.final_lr) * 0.5 * (1 + math.cos(math.pi * part)))
        wave = 0.5 * (1 + math.cos(math.pi * tick / total))
        decay = s.final_weight_decay + (s.start_weight_decay - s.final_weight_decay) * wave
        low, high = sorted((s.start_weight_decay, s.final_weight_decay))
        rows.append((lr, min(max(decay, low), high), next(momenta)))
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule_stretch": 1.25},
        {"warmup_epochs": 0},
        {"warmup_epochs": 10},
        {"start_weight_decay": 0.4, "final_weight_decay": 0.04},
        {"steps_per_epoch": 1, "epochs": 1, "warmup_epochs": 0},
        {"steps_per_epoch": 3, "epochs": 7, "schedule_stretch": 1.1},  # 23.1 steps: int() for two, not for the momentum
    ],
)
def test_schedules_are_the_released_arithmetic(changes):
    schedule = dataclasses.replace(RECIPE, **changes)
    for step, expected in enumerate(simulate(schedule)):
        ours = schedule.lr(step), schedule.weight_decay(step), schedule.momentum(step)
        assert ours == pytest.approx(expected, rel=1e-14), step  # the same double arithmetic, up to its order


def test_rates_at_the_recipes_corners():
    end = RECIPE.total - 1
    assert RECIPE.total == 70
    assert RECIPE.lr(0) == pytest.approx(2e-4 + 0.1 * 8e-4)  # update 1 of 10 warm-up updates: int(1.5 * 7)
    assert RECIPE.lr(9) == RECIPE.peak_lr  # update 10
    assert RECIPE.lr(end) == RECIPE.final_lr
    assert RECIPE.weight_decay(end) == RECIPE.final_weight_decay
    assert RECIPE.momentum(0) == 0.996
    assert RECIPE.momentum(70) == pytest.approx(1.0)  # which the run's last update, 69, does not quite reach
    stretched = dataclasses.replace(RECIPE, schedule_stretch=1.25)
    assert stretched.lr(end) > 10 * RECIPE.final_lr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"epochs": 0}, "at least one step, got 0 epochs of 7"), ({"schedule_stretch": 0.5}, "at least 1, got 0.5")],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


def tiny_models():
    torch.manual_seed(0)
    encoder = VisionTransformer(Size(96, 1, 3, 384), 32, 16, torch.float32, torch.float32)
    init_weights(encoder)
    return encoder, build_predictor(encoder, depth=1, dim=24)


def test_groups_hold_every_trained_parameter_once_in_the_released_order():
    encoder, predictor = tiny_models()
    groups = param_groups(encoder, predictor)
    names = {}
    for prefix, model in (("e.", encoder), ("p.", predictor)):
        names |= {id(p): prefix + name for name, p in model.named_parameters()}
    named = [[names[id(p)] for p in group["params"]] for group in groups]
    matrices = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert named[0] == ["e.patch_embed.proj.weight"] + [f"e.blocks.0.{m}" for m in matrices]
    assert named[1] == [
        "p.mask_token",
        "p.predictor_embed.weight",
        *(f"p.predictor_blocks.0.{m}" for m in matrices),
        "p.predictor_proj.weight",
    ]
    for index, prefix in ((2, "e."), (3, "p.")):
        assert all(n.startswith(prefix) and ("norm" in n or n.endswith("bias")) for n in named[index])
    assert [group["decay"] for group in groups] == [True, True, False, False]
    trained = [name for name in names.values() if not name.endswith("pos_embed")]
    assert sorted(itertools.chain(*named)) == sorted(trained)


def test_set_rates_reaches_every_group_and_decays_matrices_only():
    optimizer = build_optimizer(*tiny_models())
    lr, weight_decay = set_rates(optimizer, RECIPE, 30)
    assert (lr, weight_decay) == (RECIPE.lr(30), RECIPE.weight_decay(30))
    assert [group["lr"] for group in optimizer.param_groups] == [lr] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, weight_decay, 0.0, 0.0]


def test_updates_follow_the_straight_loop():
    encoder, predictor = tiny_models()
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    twin_encoder, twin_predictor = straight_models(encoder, predictor)
    twin_target = copy.deepcopy(twin_encoder).requires_grad_(False)
    optimizer = build_optimizer(encoder, predictor)
    twin_optimizer = straight_optimizer(twin_encoder, twin_predictor, lr=0.0, weight_decay=0.0)
    contexts, targets = [torch.tensor([[0, 1], [1, 2]])], [torch.tensor([[2], [0]]), torch.tensor([[3], [3]])]
    masks = Masks(Packed.from_masks(contexts, 4), Packed.from_masks(targets, 4), torch.tensor([0, 1, 0, 1]).int())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pairs = [(t, s) for t, s in zip(target_encoder.parameters(), encoder.parameters(), strict=True) if s.requires_grad]
    for step in range(20, 25):
        lr, weight_decay = set_rates(optimizer, RECIPE, step)
        loss = ijepa_loss(encoder, predictor, target_encoder, images, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update_(*map(list, zip(*pairs, strict=True)), RECIPE.momentum(step))
        for group, decay in zip(twin_optimizer.param_groups, (weight_decay, 0.0), strict=True):
            group.update(lr=lr, weight_decay=decay)
        expected = straight_step(
            twin_encoder, twin_predictor, twin_target, twin_optimizer, images, contexts, targets, RECIPE.momentum(step)
        )
        # AdamW divides by the gradient's own size, so entries that are all rounding (the keys' bias) move at full speed
        # and apart; they do not touch the loss.
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


def test_the_optimizer_writes_the_same_bits_every_time():
    runs = []
    for _ in range(2):
        encoder, predictor = tiny_models()
        optimizer = build_optimizer(encoder, predictor)
        for step in range(3):
            set_rates(optimizer, RECIPE, step)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.sin(torch.arange(p.numel()) + step).view(p.shape)
            optimizer.step()
        runs.append([p for model in (encoder, predictor) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
