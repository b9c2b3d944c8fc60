"""predictor_tokens against a loop over sequences in float64."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ijepa_kernels import Packed, predictor_tokens
from ijepa_kernels import predictor as op
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error
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
@pytest.mark.parametrize(("dim", "frozen"), [(1, True), (63, False), (192, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_a_loop_in_float64(device, context_lengths, target_lengths, context_of, dim, dtype, frozen):
    leaves, *packs, context_of = sample(context_lengths, target_lengths, context_of, dim, dtype=dtype, device=device)
    leaves[2].requires_grad_(not frozen)
    tokens, cu_seqlens, mask_rows = predictor_tokens(*leaves, *packs, context_of)
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    tokens64, ends, rows = expected(*leaves64, *packs, context_of)
    assert (cu_seqlens.dtype, mask_rows.dtype, tokens.dtype) == (torch.int32, torch.int64, dtype)
    assert cu_seqlens.tolist() == ends
    assert mask_rows.tolist() == rows
    # One addition in fp32, rounded once to dtype.
    torch.testing.assert_close(tokens.double(), tokens64, rtol=store_error(dtype), atol=8 * 2**-24)
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    tokens.backward(grad)
    tokens64.backward(grad.double())
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        if frozen and leaf is leaves[2]:
            assert leaf.grad is None
            continue
        # Sums of up to 32 terms in fp32, partial sums below 16, then rounded once to dtype; a position's twice, for
        # contexts and for targets, and their sum once more.
        want = torch.zeros_like(leaf.grad).double() if leaf64.grad is None else leaf64.grad
        atol = 32 * 16 * 2**-24 + (0 if leaf is not leaves[2] else 3 * 16 * store_error(dtype))
        torch.testing.assert_close(leaf.grad.double(), want, rtol=store_error(dtype), atol=atol)


def test_packed_equals_one_context_at_a_time(device):
    """Tokens bit for bit, and the gradients of each context; the mask token's and positions' are the sums."""
    lengths, target_lengths, context_of = [3, 0, 6], [2, 4, 3, 1, 0, 5], [0, 1, 2, 2, 1, 0]
    leaves, context, target, _ = packs = sample(lengths, target_lengths, context_of, 24, device=device)
    tokens, cu_seqlens, _ = predictor_tokens(*packs[0], *packs[1:])
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(device)
    whole = torch.autograd.grad(tokens, leaves, grad)
    ends, from_, to = (x.tolist() for x in (cu_seqlens, context.cu_seqlens, target.cu_seqlens))
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for c in range(len(lengths)):
        users = [s for s, other in enumerate(context_of) if other == c]
        visible = Packed.from_masks([context.indices[None, from_[c] : from_[c + 1]]], 30)
        hidden = Packed.from_masks([target.indices[None, to[s] : to[s + 1]] for s in users], 30)
        rows = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in users]).to(device)
        alone, _, _ = predictor_tokens(leaves[0][from_[c] : from_[c + 1]], *leaves[1:], visible, hidden)
        assert torch.equal(alone, tokens[rows])
        for total, part in zip(sums, torch.autograd.grad(alone, leaves, grad[rows]), strict=True):
            total += part
    assert torch.equal(sums[0], whole[0])
    for total, part in zip(sums[1:], whole[1:], strict=True):
        torch.testing.assert_close(total, part, rtol=0, atol=24 * 16 * 2**-24)  # up to 24 terms, partial sums below 16


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


def test_two_runs_are_bitwise_equal(reproducible_device):
    leaves, *packs = sample([9] * 2, [7] * 8, [0, 1] * 4, 65, num_patches=9, device=reproducible_device)
    grad = torch.randn(4 * 2 * 9 + 8 * 7, 65, device=reproducible_device)
    first, second = (torch.autograd.grad(predictor_tokens(*leaves, *packs)[0], leaves, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@settings(
    derandomize=True, deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_any_lengths(device, context_lengths, uses, data):
    context_of = data.draw(st.permutations(list(range(len(context_lengths))) * uses))
    target_lengths = [data.draw(st.integers(0, 9)) for _ in context_of]
    leaves, *packs = sample(context_lengths, target_lengths, context_of, 3, device=device)
    leaves[2].requires_grad_(False)
    tokens, cu_seqlens, mask_rows = predictor_tokens(*leaves, *packs)
    want, ends, rows = expected(*leaves, *packs)
    assert torch.equal(tokens, want)
    assert cu_seqlens.tolist() == ends
    assert mask_rows.tolist() == rows
    grads = [torch.autograd.grad(out, leaves[:2], torch.ones_like(out)) for out in (tokens, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)  # sums of ones are exact


@pytest.mark.parametrize("dim", [63, 192])
def test_writes_its_outputs_and_nothing_else(kernel_device, dim, monkeypatch):
    leaves, *packs = sample([5, 0, 17], [2, 18, 0, 1, 3, 4], [0, 1, 2] * 2, dim, device=kernel_device)
    leaves[2].requires_grad_(False)
    with guarded_outputs(monkeypatch):
        tokens, _, mask_rows = predictor_tokens(*leaves, *packs)
        grads = torch.autograd.grad(tokens, leaves[:2], torch.ones_like(tokens))
    want, _, rows = expected(*leaves, *packs)
    assert torch.equal(tokens, want)
    assert mask_rows.tolist() == rows
    assert torch.equal(grads[0], torch.full_like(grads[0], 2))
    assert torch.equal(grads[1], torch.full_like(grads[1], 28))


def test_opcheck(device):
    dtype = torch.bfloat16
    leaves, context, target, context_of = sample([5, 0], [2, 4, 1, 3], [0, 1] * 2, 16, device=device, dtype=dtype)
    leaves[2].requires_grad_(False)
    arguments = *context, *target, context_of
    torch.library.opcheck(op._forward_op, (*(leaf.reshape(-1, 16).squeeze(0) for leaf in leaves), *arguments))
    grad = torch.randn(20, 16, device=device).to(dtype)
    cu_seqlens = torch.tensor([0, 7, 11, 17, 20], dtype=torch.int32, device=device)
    torch.library.opcheck(op._backward_op, (grad, cu_seqlens, *arguments))


def test_compiles_to_one_graph_over_changing_token_counts(device):
    def step(context, mask_token, pos_embed, context_packed, target_packed, context_of):
        arguments = context * 2, mask_token, pos_embed, context_packed, target_packed
        tokens, _, mask_rows = predictor_tokens(*arguments, context_of)
        matched, _, _ = predictor_tokens(*arguments)  # by image
        return tokens.index_select(0, mask_rows) * 3 + matched.sum(0)

    inputs = []
    for lengths in ([3, 5], [2, 11], [7, 1]):
        leaves, *packs = sample(lengths, [2, lengths[1], 7, lengths[0]], [0, 1, 1, 0], 24, device=device)
        inputs.append((*leaves, *packs))
    assert_compiles_once(step, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("matched", [False, True])
def test_never_waits_for_the_device(matched, monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    leaves, *packs, context_of = sample([3, 5], [2, 4, 1, 3], [0, 1] * 2, 24, device="cuda")
    with forbidden_sync():
        predictor_tokens(*leaves, *packs, None if matched else context_of)[0].sum().backward()


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements(monkeypatch):
    """The last sequences' rows lie beyond 2^31 elements of the result."""
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    batch, num_patches, dim = 22000, 256, 384  # 2.16e9 elements
    context = torch.zeros(batch * 250, dim, dtype=torch.bfloat16, device="cuda")
    context[-250:] = torch.randn(250, dim, device="cuda")
    mask = torch.arange(250, device="cuda").expand(batch, 250)
    context_packed = Packed.from_masks([mask], num_patches)
    target_packed = Packed.from_masks([mask[:, :6] + 250], num_patches)
    leaves = [context.requires_grad_(), torch.randn(dim, device="cuda", requires_grad=True)]
    pos_embed = torch.randn(num_patches, dim, device="cuda")
    tokens, cu_seqlens, _ = predictor_tokens(*leaves, pos_embed, context_packed, target_packed)
    last = Packed.from_masks([mask[:1]], num_patches), Packed.from_masks([mask[:1, :6] + 250], num_patches)
    want, _, _ = predictor_tokens(leaves[0][-250:], leaves[1], pos_embed, *last)
    assert cu_seqlens[-1].item() == batch * 256
    assert torch.equal(tokens[-256:], want)
    (grad,) = torch.autograd.grad(tokens, leaves[:1], tokens)
    assert torch.equal(grad[-250:], want[:250])


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
        ({"pos_embed": None}, r"pos_embed: want .* \[N, 8\] tensor on cpu, got NoneType"),
        ({"pos_embed": torch.zeros(5, 8)}, r"context_packed.indices: want patches in \[0, 4\]"),
        ({"target_packed": Packed.dense(3, 2)}, "target_packed: want as many sequences for each of 2 contexts, got 3"),
        ({"context_of": torch.tensor([0, 0])}, "context_of: want each context used .* targets, 1, got 0 to 2"),
        ({"context_of": torch.tensor([0, 2])}, r"context_of: want context sequences in \[0, 1\], got 0 to 2"),
        ({"context_of": torch.tensor([0, 1, 1])}, "context_of: want 2 entries as target_packed has sequences, got 3"),
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
