import numpy as np
import pytest
import torch
from ijepa_kernels import Packed
from torch.utils.flop_counter import FlopCounterMode

from ijepa_fast import blocks, model
from ijepa_fast.flops import step_flops
from ijepa_fast.model import SIZES, Size, build_predictor


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def plain_attention(q, k, v, cu_seqlens, max_seqlen):
    """Two batched products a sequence, which PyTorch's counter knows (it does not know our ops)."""
    sequences = (x.transpose(0, 1).split(cu_seqlens.diff().tolist(), dim=1) for x in (q, k, v))
    return torch.cat([
        ((one_q @ one_k.transpose(1, 2)).softmax(-1) @ one_v).transpose(0, 1)
        for one_q, one_k, one_v in zip(*sequences, strict=True)
    ])


def plain_embedding(images, packed, weight, bias, pos_embed, *, patch_size, dtype):
    patches = torch.zeros(len(packed.indices), weight[0].numel())
    return torch.nn.functional.linear(patches, weight.flatten(1), bias) + pos_embed[0, packed.indices.long()]


def test_flops_equal_those_pytorch_counts(monkeypatch):
    monkeypatch.setattr(blocks, "varlen_attention_qkv", lambda qkv, *rest: plain_attention(*qkv.unbind(1), *rest))
    monkeypatch.setattr(model, "embed_patches", plain_embedding)
    size = Size(24, 2, 3, 40)
    encoder = model.VisionTransformer(size, 32, 8, torch.float32, torch.float32)
    model.init_weights(encoder)
    predictor = build_predictor(encoder, depth=3, dim=12)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    lengths, target_lengths, context_of = [5, 7], [3, 2, 4, 1], [0, 0, 1, 1]

    def packed(lengths, image):
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        indices = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
        return Packed(indices, cu_seqlens, torch.tensor(image, dtype=torch.int32), 16)

    context, target = packed(lengths, [0, 1]), packed(target_lengths, [0, 0, 1, 1])

    covered = torch.tensor([0, 3, 4, 15, 20])

    def target_pass():
        with torch.no_grad():
            encoder(images, rows=covered)

    def context_pass():
        encoder(images, context).sum().backward()

    tokens = torch.zeros(12, size.dim, requires_grad=True)

    def predictor_pass():
        predictor(tokens, context, target, torch.tensor(context_of, dtype=torch.int32)).sum().backward()

    flops = step_flops(
        size, predictor.size, 8,
        images=2, patches=16, context_lengths=lengths, target_lengths=target_lengths, context_of=context_of,
        covered=len(covered),
    )  # fmt: skip
    assert flops.target == counted(target_pass)
    assert flops.context == counted(context_pass)
    assert flops.predictor == counted(predictor_pass)


@pytest.mark.parametrize(
    ("name", "patch_size", "patches", "depth", "context", "target", "gflop"),
    [
        ("vit_huge", 14, 256, 12, 69, 43, 658),
        ("vit_huge", 16, 784, 12, 257, 135, 2328),
        ("vit_giant", 16, 196, 16, 61, 33, 820),
    ],
)
def test_flops_an_image_of_the_published_recipes(name, patch_size, patches, depth, context, target, gflop):
    encoder = SIZES[name]
    predictor = Size(384, depth, encoder.num_heads, 1536)
    flops = step_flops(
        encoder, predictor, patch_size,
        images=1, patches=patches, context_lengths=[context], target_lengths=[target] * 4, context_of=[0] * 4,
    )  # fmt: skip
    # Expected: an estimate made apart from this code, from sampled lengths; here they are whole means. 3 % covers it.
    assert flops.total / 1e9 == pytest.approx(gflop, rel=0.03)
