"""predictor_tokens against a loop over sequences in float64."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels import Packed, predictor_tokens
from packed_samples import random_packed


def expected(context, mask_token, pos_embed, context_packed, target_packed, context_of):
    """One target sequence at a time, by slices."""
    pos_embed = pos_embed.reshape(-1, context.shape[1])
    ctx_ends, tgt_ends = context_packed.cu_seqlens.tolist(), target_packed.cu_seqlens.tolist()
    parts, ends, mask_rows = [context[:0]], [0], []
    for s, c in enumerate(context_of.tolist()):
        rows = slice(ctx_ends[c], ctx_ends[c + 1])
        parts.append(context[rows] + pos_embed[context_packed.indices[rows].long()])
        where = target_packed.indices[tgt_ends[s] : tgt_ends[s + 1]].long()
        parts.append(mask_token.reshape(1, -1) + pos_embed[where])
        start = ends[-1] + rows.stop - rows.start
        mask_rows += range(start, start + len(where))
        ends.append(start + len(where))
    return torch.cat(parts), ends, mask_rows


def sample(context_lengths, target_lengths, context_of, dim, num_patches=30, dtype=torch.float32, seed=0, device="cpu"):
    """Inputs whose images are numbered backwards, so that a match by position would be seen."""
    image = [len(context_lengths) - 1 - i for i in range(len(context_lengths))]
    context_packed = random_packed(context_lengths, num_patches, 0, seed, device, image)
    target_packed = random_packed(target_lengths, num_patches, 0, seed + 1, device, [image[c] for c in context_of])
    g = torch.Generator().manual_seed(seed)
    shapes = [(sum(context_lengths), dim), (1, 1, dim), (1, num_patches, dim)]
    leaves = [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]
    return leaves, context_packed, target_packed, torch.tensor(context_of, dtype=torch.int32, device=device)


CASES = {
    "one target each": ([3, 5], [2, 4], [0, 1]),
    "four targets, mask-major": ([3, 1, 6], [2, 4, 3, 1, 0, 5, 2, 2, 2, 7, 1, 1], [0, 1, 2] * 4),
    "two contexts, image-major": ([4, 2, 5, 3], [1, 2] * 4, [0, 0, 1, 1, 2, 2, 3, 3]),
    "empty context": ([0, 2], [3, 1], [1, 0]),
    "nothing": ([], [], []),
    "all empty": ([0, 0], [0, 0], [0, 1]),
}


@pytest.mark.parametrize(("context_lengths", "target_lengths", "context_of"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dim", [1, 63, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_a_loop_in_float64(device, context_lengths, target_lengths, context_of, dim, dtype):
    leaves, *packs, context_of = sample(context_lengths, target_lengths, context_of, dim, dtype=dtype, device=device)
    tokens, cu_seqlens, mask_rows = predictor_tokens(*leaves, *packs, context_of)
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    tokens64, ends, rows = expected(*leaves64, *packs, context_of)
    assert (cu_seqlens.dtype, mask_rows.dtype, tokens.dtype) == (torch.int32, torch.int64, dtype)
    assert cu_seqlens.tolist() == ends
    assert mask_rows.tolist() == rows
    eps = torch.finfo(dtype).eps
    # One addition of two values below 5, rounded once (bf16 on a CPU: twice, when the interpreter truncates).
    torch.testing.assert_close(tokens.double(), tokens64, rtol=0, atol=10 * eps)
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    tokens.backward(grad)
    tokens64.backward(grad.double())
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        # mask_token sums up to 32 terms, the others up to 20, of order 1: 32 roundings of partial sums below 16.
        want = torch.zeros_like(leaf.grad).double() if leaf64.grad is None else leaf64.grad
        torch.testing.assert_close(leaf.grad.double(), want, rtol=0, atol=32 * 16 * eps / 2)


def test_matches_by_image(device):
    leaves, context, target, context_of = sample([3, 5, 2], [2, 4, 3] * 2, [2, 0, 1, 1, 2, 0], 16, device=device)
    by_image = predictor_tokens(*leaves, context, target)
    for a, b in zip(by_image, predictor_tokens(*leaves, context, target, context_of.long()), strict=True):
        assert torch.equal(a, b)


def test_expanded_gradient_and_strided_context(device):
    leaves, *packs = sample([3, 5], [2, 4], [0, 1], 24, device=device)
    leaves[0] = torch.randn(24, 16, device=device).t()[::2].detach().requires_grad_()
    predictor_tokens(*leaves, *packs)[0].sum().backward()
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected(*leaves64, *packs)[0].sum().backward()
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert torch.equal(leaf.grad.double(), leaf64.grad)  # sums of ones are exact


def test_two_runs_are_bitwise_equal(device):
    leaves, *packs = sample([9] * 4, [7] * 16, [0, 1, 2, 3] * 4, 65, device=device)
    grad = torch.randn(4 * 4 * 9 + 16 * 7, 65, device=device)
    first, second = (torch.autograd.grad(predictor_tokens(*leaves, *packs)[0], leaves, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_frozen_position_gets_no_gradient(device):
    (context, mask_token, pos_embed), *packs = sample([3, 5], [2, 4], [0, 1], 24, device=device)
    pos_embed = pos_embed.detach()
    predictor_tokens(context, mask_token, pos_embed[0], *packs)[0].sum().backward()
    assert mask_token.grad.shape == (1, 1, 24)
    assert torch.equal(mask_token.grad, torch.full((1, 1, 24), 6.0, device=device))
    assert torch.equal(context.grad, torch.ones(8, 24, device=device))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_any_lengths(context_lengths, uses, data):
    context_of = data.draw(st.permutations(list(range(len(context_lengths))) * uses))
    target_lengths = [data.draw(st.integers(0, 9)) for _ in context_of]
    leaves, *packs = sample(context_lengths, target_lengths, context_of, 3)
    tokens, cu_seqlens, mask_rows = predictor_tokens(*leaves, *packs)
    want, ends, rows = expected(*leaves, *packs)
    assert torch.equal(tokens, want)
    assert cu_seqlens.tolist() == ends
    assert mask_rows.tolist() == rows


def make(**change):
    packed = random_packed([2, 3], 6, 2, image=[0, 1])
    inputs = {
        "context": torch.zeros(5, 8),
        "mask_token": torch.zeros(1, 1, 8),
        "pos_embed": torch.zeros(1, 6, 8),
        "context_packed": packed,
        "target_packed": packed,
        "context_of": torch.tensor([0, 1]),
    }
    return inputs | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, 5, 8)}, r"context: want .* \[T_ctx, P\] tensor, got float32 \[2, 5, 8\]"),
        ({"context": torch.zeros(4, 8)}, "context_packed: want 4 tokens as context has rows, got 5"),
        ({"mask_token": torch.zeros(7)}, r"mask_token: want 8 elements as context has columns, got float32 \[7\]"),
        ({"mask_token": torch.zeros(8, device="meta")}, "mask_token: want .* on cpu, got float32 .* on meta"),
        ({"pos_embed": torch.zeros(2, 6, 8)}, r"pos_embed: want .* \[1, N, 8\] tensor on cpu, got float32 \[2, 6, 8\]"),
        ({"pos_embed": torch.zeros(5, 8)}, r"context_packed.indices: want patches in \[0, 4\]"),
        ({"target_packed": Packed.dense(3, 2)}, "target_packed: want as many sequences for each of 2 contexts, got 3"),
        ({"context_of": torch.tensor([0, 0])}, "context_of: want each context used .* targets, 1, got 0 to 2"),
        ({"context_of": torch.tensor([0, 2])}, r"context_of: want context sequences in \[0, 1\], got 0 to 2"),
        ({"context_of": torch.tensor([0, 1, 1])}, r"context_of: want a int32 or int64 \[2\] tensor on cpu, got int64"),
        ({"context_of": torch.tensor([0.0, 1.0])}, "context_of: want a int32 or int64"),
        (
            {"target_packed": random_packed([1, 1], 6, 2, image=[0, 2]), "context_of": None},
            "context_of: left out, so each image of target_packed wants one context",
        ),
        (
            {"context_packed": random_packed([2, 3], 6, 2, image=[0, 0]), "context_of": None},
            "context_of: left out, so each image of target_packed wants one context",
        ),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        predictor_tokens(**make(**change))
