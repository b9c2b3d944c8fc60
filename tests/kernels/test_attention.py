"""varlen_attention on the CPU, against dense attention of each sequence in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels.attention import varlen_attention, varlen_attention_ref

LENGTHS = {
    "equal": [7, 7, 7],
    "ragged": [5, 1, 0, 9, 9, 63],
    "empty at both ends": [0, 4, 4, 0],
    "all empty": [0, 0],
    "one": [197],
}


def packed_qkv(lengths, heads, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def run(attention, qkv, cu_seqlens, grad, *args, **kwargs):
    """The output and the gradient of qkv; q, k and v are views of one tensor, as in the models."""
    qkv = qkv.detach().requires_grad_()
    out = attention(*qkv.unbind(1), cu_seqlens, *args, **kwargs)
    out.backward(grad)
    return out.detach(), qkv.grad


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 24), (2, 64), (1, 88)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_matches_dense_float64(lengths, heads, head_dim, scale):
    qkv, cu_seqlens = packed_qkv(lengths, heads, head_dim)
    grad = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1))
    expected = run(varlen_attention_ref, qkv.double(), cu_seqlens, grad.double(), scale=scale)
    actual = run(varlen_attention, qkv, cu_seqlens, grad, 256, scale=scale)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        # Sums of at most 197 fp32 products of order 1: about sqrt(197) roundings of 6e-8 on values up to 10.
        torch.testing.assert_close(a.double(), e, atol=2e-5, rtol=2e-5)


def test_tokens_of_another_sequence_have_no_influence():
    qkv, cu_seqlens = packed_qkv([3, 8, 5], 2, 32)
    before = varlen_attention(*qkv.unbind(1), cu_seqlens, 8)
    qkv[3:11] = float("nan")
    after = varlen_attention(*qkv.unbind(1), cu_seqlens, 8)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[11:], after[11:])
    assert after[3:11].isnan().all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_packed_equals_one_sequence_at_a_time(lengths):
    qkv, cu_seqlens = packed_qkv(lengths, 2, 16)
    out = varlen_attention(*qkv.unbind(1), cu_seqlens, 20)
    for part, single in zip(out.split(lengths), qkv.split(lengths), strict=True):
        alone = varlen_attention(*single.unbind(1), torch.tensor([0, len(single)], dtype=torch.int32), 20)
        torch.testing.assert_close(part, alone, atol=1e-6, rtol=1e-5)  # a batched call may sum in another order


def test_gradcheck():
    qkv, cu_seqlens = packed_qkv([2, 0, 3, 3, 1], 2, 8, torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, 4), (q, k, v))


def test_expanded_gradient():
    qkv, cu_seqlens = packed_qkv([4, 6], 2, 16)
    ones = torch.ones(10, 2, 16)
    expected = run(varlen_attention, qkv, cu_seqlens, ones, 8)
    actual = run(varlen_attention, qkv, cu_seqlens, ones[:1, :1, :1].expand(10, 2, 16), 8)
    assert torch.equal(actual[1], expected[1])


def test_two_runs_are_bitwise_equal():
    qkv, cu_seqlens = packed_qkv([60, 60, 33, 71], 6, 64)
    grad = torch.ones(qkv[:, 0].shape)
    first, second = (run(varlen_attention, qkv, cu_seqlens, grad, 96) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


X = torch.zeros(6, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X, X, cu(0, 6), 6), r"q is \[2, 16\]; expected \[tokens, heads, head_dim\]"),
        ((X, X[:5], X, cu(0, 6), 6), r"k is \[5, 2, 16\].* expected as q: \[6, 2, 16\]"),
        ((X, X, X.half(), cu(0, 6), 6), r"v is .*float16.* expected as q: .*float32"),
        ((X.int(), X.int(), X.int(), cu(0, 6), 6), "int32; expected a floating dtype"),
        ((X[..., :12], X[..., :12], X[..., :12], cu(0, 6), 6), "head_dim 12; expected a multiple of 8"),
        ((X.transpose(0, 2), X.transpose(0, 2), X.transpose(0, 2), cu(0, 16), 16), "head_dim 6"),
        ((X[..., ::2], X[..., ::2], X[..., ::2], cu(0, 6), 6), "q has stride 2 in its last dimension; expected 1"),
        ((X, X, X, cu(0, 6, dtype=torch.int64), 6), r"int64; expected int32 \[sequences \+ 1\]"),
        ((X, X, X, cu(), 6), r"cu_seqlens is \[0\]"),
        ((X, X, X, cu(0, 4, 3, 6), 6), r"rise from 0 to the 6 tokens of q; it is \[0, 4, 3, 6\]"),
        ((X, X, X, cu(0, 5), 6), "rise from 0 to the 6 tokens"),
        ((X, X, X, cu(1, 6), 6), "rise from 0 to the 6 tokens"),
        ((X, X, X, cu(0, 6), 5), "a sequence of 6 tokens; max_seqlen is 5"),
        ((X, X, X, cu(0, 6), 0), "max_seqlen is 0; expected at least 1"),
        ((X, X, X, cu(0, 6).to("meta"), 6), "cu_seqlens is on meta; expected on q's device, cpu"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(*arguments)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'fastest'"):
        varlen_attention(X, X, X, cu(0, 6), 6, backend="fastest")
