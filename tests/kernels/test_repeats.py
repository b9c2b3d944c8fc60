"""predictor_rows against a loop over sequences in float64, and against what predictor_tokens makes of whole tokens."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ijepa_kernels import predictor_rows, predictor_tokens
from ijepa_kernels import repeats as op
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error
from packed_samples import random_packed

PATCHES = 20


def expected(x, context, target, context_of):
    """One target sequence at a time, by slices."""
    ends, starts = context.cu_seqlens.tolist(), target.cu_seqlens.tolist()
    parts = [x[:0]]
    for s, c in enumerate(context_of.tolist()):
        parts += [x[ends[c] : ends[c + 1]], x[ends[-1] + target.indices[starts[s] : starts[s + 1]].long()]]
    return torch.cat(parts)


def sample(context_lengths, target_lengths, context_of, dim, dtype=torch.float32, device="cpu"):
    image = list(range(len(context_lengths)))[::-1]  # numbered backwards, so that a match by position would be seen
    context = random_packed(context_lengths, PATCHES, 0, 0, device, image)
    target = random_packed(target_lengths, PATCHES, 0, 1, device, [image[c] for c in context_of])
    x = torch.randn(sum(context_lengths) + PATCHES, dim, generator=torch.Generator().manual_seed(2))
    return x.to(device, dtype).requires_grad_(), context, target, torch.tensor(context_of, device=device).int()


CASES = {
    "one target each": ([3, 5], [2, 4], [0, 1]),
    "four targets, mask-major": ([3, 1, 6], [2, 4, 3, 1, 0, 5, 2, 2, 2, 7, 1, 1], [0, 1, 2] * 4),
    "two contexts, image-major": ([4, 2, 5, 3], [1, 2] * 4, [0, 0, 1, 1, 2, 2, 3, 3]),
    "a patch in more blocks than a tile": ([2] * 10, [PATCHES - 1] * 40, list(range(10)) * 4),
    "empty context": ([0, 2], [3, 1], [1, 0]),
    "nothing": ([], [], []),
    "all empty": ([0, 0], [0, 0], [0, 1]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float32), (63, torch.bfloat16), (192, torch.bfloat16)])
def test_matches_a_loop_in_float64(device, case, dim, dtype):
    x, *packs = sample(*case, dim, dtype=dtype, device=device)
    x64 = x.detach().double().requires_grad_()
    out, want = predictor_rows(x, *packs), expected(x64, *packs)
    assert torch.equal(out.double(), want)
    assert out.dtype == dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    out.backward(grad)
    want.backward(grad.double())
    # Sums of up to 40 terms in fp32, partial sums below 32, then rounded once to dtype.
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=store_error(dtype), atol=40 * 32 * 2**-24)


def test_rows_of_tokens_are_the_tokens(device):
    """The order is that of predictor_tokens, matched by image where context_of is left out."""
    _, context, target, context_of = sample([3, 5, 2], [2, 4, 3] * 2, [2, 0, 1, 1, 2, 0], 1, device=device)
    tokens, mask_token, pos_embed = (torch.randn(shape, device=device) for shape in ((10, 16), (16,), (PATCHES, 16)))
    want, _, _ = predictor_tokens(tokens, mask_token, pos_embed, context, target, context_of)
    x = torch.cat([tokens + pos_embed[context.indices.long()], mask_token + pos_embed])
    assert torch.equal(predictor_rows(x, context, target, context_of), want)
    assert torch.equal(predictor_rows(x, context, target), want)


def test_two_runs_are_bitwise_equal(reproducible_device):
    x, *packs = sample([9] * 2, [7] * 8, [0, 1] * 4, 65, device=reproducible_device)
    grad = torch.randn(4 * 2 * 9 + 8 * 7, 65, device=reproducible_device)
    first, second = (torch.autograd.grad(predictor_rows(x, *packs), x, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_expanded_gradient_and_strided_rows(device):
    x, *packs = sample([3, 5], [2, 4], [0, 1], 24, device=device)
    x = torch.randn(24, 56, device=device).t()[::2].detach().requires_grad_()
    out = predictor_rows(x, *packs)
    assert torch.equal(out, expected(x, *packs))
    out.sum().backward()
    want = torch.autograd.grad(expected(x, *packs).sum(), x)[0]
    assert torch.equal(x.grad, want)  # sums of ones are exact


@settings(
    derandomize=True, deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_any_lengths(device, context_lengths, uses, data):
    context_of = data.draw(st.permutations(list(range(len(context_lengths))) * uses))
    target_lengths = [data.draw(st.integers(0, 9)) for _ in context_of]
    x, *packs = sample(context_lengths, target_lengths, context_of, 3, device=device)
    results = [(out, torch.autograd.grad(out.sum(), x)[0]) for out in (predictor_rows(x, *packs), expected(x, *packs))]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)  # sums of ones are exact


@pytest.mark.parametrize("dim", [63, 192])
def test_writes_its_outputs_and_nothing_else(kernel_device, dim, monkeypatch):
    x, *packs = sample([5, 0, 17], [2, 18, 0, 1, 3, 4], [0, 1, 2] * 2, dim, device=kernel_device)
    with guarded_outputs(monkeypatch):
        out = predictor_rows(x, *packs)
        grad = torch.autograd.grad(out, x, torch.ones_like(out))[0]
    assert torch.equal(out, expected(x, *packs))
    uses = torch.cat([torch.full((22,), 2, device=kernel_device), packs[1].indices.bincount(minlength=PATCHES)])
    assert torch.equal(grad, uses.float()[:, None].expand(-1, dim))


def test_opcheck(device):
    x, context, target, context_of = sample([5, 0], [2, 4, 1, 3], [0, 1] * 2, 16, device=device, dtype=torch.bfloat16)
    arguments = *context, *target, context_of
    torch.library.opcheck(op._forward_op, (x, *arguments))
    out, cu_seqlens, mask_rows = op._forward_op(x, *arguments)
    torch.library.opcheck(op._backward_op, (torch.randn_like(out), cu_seqlens, mask_rows, *arguments, len(x)))


def test_compiles_to_one_graph_over_changing_token_counts(device):
    inputs = [
        sample(lengths, [2, lengths[1], 7, lengths[0]], [0, 1, 1, 0], 24, device=device)
        for lengths in ([3, 5], [2, 11], [7, 1])
    ]
    assert_compiles_once(lambda x, *packs: predictor_rows(x * 2, *packs) * 3, inputs)


def test_rows_that_do_not_fit_are_refused():
    x, context, target, context_of = sample([3, 5], [2, 4], [0, 1], 4)
    with pytest.raises(ValueError, match="x: want the 8 rows of context_packed and N, got 7"):
        predictor_rows(x[:7], context, target, context_of)
    with pytest.raises(ValueError, match=r"target_packed.indices: want patches in \[0, 1\]"):
        predictor_rows(x[:10], *(p._replace(indices=p.indices * 0 + i) for i, p in enumerate((context, target), 1)))
    with pytest.raises(ValueError, match="context_of: want each context used by the same number of targets"):
        predictor_rows(x, context, target, context_of * 0)


@pytest.mark.gpu
def test_never_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    x, *packs = sample([3, 5], [2, 4, 1, 3], [0, 1] * 2, 24, device="cuda")
    with forbidden_sync():
        predictor_rows(x, *packs).sum().backward()
