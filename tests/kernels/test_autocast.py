"""torch.autocast changes no op: each computes in the dtypes that it was given, as its fake form says."""
import pytest
import torch
from ijepa_kernels import (
    Packed,
    ema_update_,
    embed_patches,
    gather_patches,
    gather_tokens,
    predictor_tokens,
    smooth_l1_loss,
    varlen_attention,
)
from ijepa_kernels import patches as patches_op

PACKED = Packed.dense(2, 4)


def embed(images, weight, bias, pos_embed, packed):
    return embed_patches(images, packed, weight, bias, pos_embed, patch_size=4)


def embed_frozen(images, weight, bias, pos_embed, packed):
    return embed_patches(images, packed, weight, bias, pos_embed.detach(), patch_size=4)


def patches(images, weight, bias, pos_embed, packed):
    return gather_patches(images, packed, patch_size=4) * weight.mean()


def tokens(images, weight, bias, pos_embed, packed):
    return gather_tokens(pos_embed.expand(2, 4, 8), packed)


def predictor(images, weight, bias, pos_embed, packed):
    return predictor_tokens(pos_embed.expand(2, 4, 8).flatten(0, 1), bias, pos_embed, packed, packed)[0]


def loss(images, weight, bias, pos_embed, packed):
    return smooth_l1_loss(pos_embed.expand(2, 4, 8).flatten(0, 1) * 2, pos_embed.detach().expand(2, 4, 8), packed)


def attention(images, weight, bias, pos_embed, packed):
    q = pos_embed.expand(2, 4, 8).reshape(8, 1, 8)
    return varlen_attention(q, q + bias, q * 2, packed.cu_seqlens, 4)


def average(images, weight, bias, pos_embed, packed):
    target = [torch.zeros_like(x) for x in (weight, bias)]
    ema_update_(target, [weight, bias], 0.3)
    return target[0].sum() * bias + target[1]


@pytest.mark.parametrize(
    "step", [embed, embed_frozen, patches, tokens, predictor, loss, attention, average], ids=lambda step: step.__name__
)
def test_results_and_gradients_are_those_without_autocast(device, step):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 8, 8, 3), generator=g, dtype=torch.uint8).to(device)
    shapes = [(8, 3, 4, 4), (8,), (1, 4, 8)]
    leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            out = step(images, *leaves, PACKED.to(device))
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)])
    for plain, cast in zip(*results, strict=True):
        assert (plain is None) == (cast is None)
        if plain is not None:
            assert plain.dtype == cast.dtype == torch.float32
            assert torch.equal(plain, cast)


@pytest.mark.parametrize("position", [torch.zeros(4, 8), None], ids=["position", "none"])
def test_the_registered_op_returns_the_dtype_of_its_fake(monkeypatch, position):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    images, weight = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(8, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = patches_op._embed_op(
            images, weight, torch.zeros(8), position, *PACKED, 4, [0.5] * 3, [0.5] * 3, torch.float32
        )
    assert out.dtype == torch.float32
