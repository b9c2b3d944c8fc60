"""varlen_attention in every form of our own, against dense attention of each sequence in float64."""
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels import attention_torch, attention_triton
from ijepa_kernels.attention import varlen_attention, varlen_attention_qkv, varlen_attention_ref
from ijepa_kernels.attention_parts import parts
from op_proofs import assert_compiles_once, guarded_outputs
from torch.utils.checkpoint import checkpoint

LENGTHS = {
    "equal": [7, 7, 7],
    "ragged": [5, 1, 0, 19, 19],
    "empty at both ends": [0, 4, 4, 0],
    "all empty": [0, 0],
    "no sequence": [],
    "several tiles": [130],  # three of 64 rows
}

# Of the largest element. fp32: sums of at most 130 products, each off by a few 6e-8; on a GPU tf32x3 drops terms of
# 2^-22, and tensor cores cut off where they add.
# 16 bits: the result is rounded (2^-9 of bf16, 2^-12 of fp16; the interpreter truncates, twice that), and on a GPU so
# are the weights and their gradients before they are multiplied, each as much as the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def packed_qkv(lengths, heads, head_dim, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return qkv.to(device, dtype), cu_seqlens.to(device)


def gradient(qkv, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(qkv[:, 0].shape, generator=generator).to(qkv.device, qkv.dtype)


def run(attention, qkv, cu_seqlens, grad, *args, **kwargs):
    """The output and the gradient of qkv; q, k and v are views of one tensor, as in the models."""
    qkv = qkv.detach().requires_grad_()
    out = attention(*qkv.unbind(1), cu_seqlens, *args, **kwargs)
    out.backward(grad)
    return out.detach(), qkv.grad


def reference(qkv, cu_seqlens, grad, scale=None):
    return run(varlen_attention_ref, qkv.double().cpu(), cu_seqlens.cpu(), grad.double().cpu(), scale)


def assert_near(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        if e.numel():
            error = (a.double().cpu() - e).abs().max().item()
            assert error <= TOLERANCE[dtype] * e.abs().max().item()


# -> IJEPA_KERNELS. The PyTorch form has two ways through a CPU, and both in one call; and one through any other device.
PATHS = {"products": "torch", "fused": "torch", "mixed": "torch", "elsewhere": "torch", "interpret": "interpret"}
GPU_PATHS = {"cuda": "triton", "cuda-torch": "torch"}
PARAMETERS = [*PATHS, *(pytest.param(path, marks=pytest.mark.gpu) for path in GPU_PATHS)]
# The registered op knows the fused way alone, so the other two of a CPU would prove the same once more.
registered_paths = pytest.mark.parametrize("device", PARAMETERS[1:2] + PARAMETERS[3:], indirect=True)


@pytest.fixture(params=PARAMETERS)
def device(request, monkeypatch):
    """As conftest's, with more paths."""
    monkeypatch.setenv("IJEPA_KERNELS", (PATHS | GPU_PATHS)[request.param])
    if request.param == "elsewhere":
        monkeypatch.setattr(attention_torch, "_can_fuse", lambda x: False)
    if request.param in ("products", "mixed"):
        monkeypatch.setattr(attention_torch, "SHORTEST_SINGLE", 0)
    if request.param == "fused":
        monkeypatch.setattr(attention_torch, "LONGEST_PRODUCT", 0)
        monkeypatch.setattr(attention_torch, "LONGEST_PRODUCT_INFERENCE", 0)
    if request.param == "mixed":  # up to 20 tokens products, of two heads in groups of two sequences of 7
        monkeypatch.setattr(attention_torch, "GROUP_BYTES", 2 * 2 * 7**2 * 4)
        monkeypatch.setattr(attention_torch, "LONGEST_PRODUCT", 20)
        monkeypatch.setattr(attention_torch, "LONGEST_PRODUCT_INFERENCE", 20)
    return "cuda" if request.param in GPU_PATHS else "cpu"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_dense_float64(lengths, device):
    if not lengths:
        qkv, cu_seqlens = torch.zeros(0, 3, 2, 24, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        assert run(varlen_attention, qkv, cu_seqlens, qkv[:, 0], 1)[1].shape == qkv.shape
        return
    qkv, cu_seqlens = packed_qkv(lengths, 2, 24, device=device)
    grad = gradient(qkv)
    expected = reference(qkv, cu_seqlens, grad, 0.3)
    bound = max(lengths) + 6  # no length of the batch
    assert_near(run(varlen_attention, qkv, cu_seqlens, grad, bound, scale=0.3), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[19, 19, 5], [300]], ids=["products", "fused"])
def test_a_cpu_attends_in_fp32_and_rounds_once(lengths, dtype):
    qkv, cu_seqlens = packed_qkv(lengths, 3, 16, dtype)
    wide = attention_torch.forward(*qkv.float().unbind(1), cu_seqlens, 0.25)[0]
    assert torch.equal(attention_torch.forward(*qkv.unbind(1), cu_seqlens, 0.25)[0], wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", attention_triton.HEAD_DIMS)
def test_every_head_dim_and_dtype(head_dim, dtype, device):
    qkv, cu_seqlens = packed_qkv([17, 3], 2, head_dim, dtype, device)  # fp32's backward has tiles of 16 keys
    grad = gradient(qkv)
    assert_near(run(varlen_attention, qkv, cu_seqlens, grad, 20), reference(qkv, cu_seqlens, grad), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", attention_triton.HEAD_DIMS)
def test_every_head_dim_and_dtype_over_several_tiles(head_dim, dtype, device):
    qkv, cu_seqlens = packed_qkv([70, 1, 0, 17], 2, head_dim, dtype, device)
    grad = gradient(qkv)
    assert_near(run(varlen_attention, qkv, cu_seqlens, grad, 70), reference(qkv, cu_seqlens, grad), dtype)


@pytest.mark.parametrize("head_dim", [24, 88])
def test_several_tiles_in_16_bits(head_dim, kernel_device):
    qkv, cu_seqlens = packed_qkv([70], 1, head_dim, torch.bfloat16, kernel_device)
    grad = gradient(qkv)
    assert_near(run(varlen_attention, qkv, cu_seqlens, grad, 70), reference(qkv, cu_seqlens, grad), torch.bfloat16)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(n, torch.float32) for n in (8, 16, 40, 56, 72, 96)] + [(n, torch.float16) for n in (104, 128)],
)
def test_head_dims_of_other_models(head_dim, dtype, kernel_device):
    qkv, cu_seqlens = packed_qkv([19], 1, head_dim, dtype, device=kernel_device)
    grad = gradient(qkv)
    assert_near(run(varlen_attention, qkv, cu_seqlens, grad, 19), reference(qkv, cu_seqlens, grad), dtype)


@pytest.mark.parametrize("head_dim", range(8, 136, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_cover_a_head_dim(head_dim, dtype):
    widths = parts(head_dim, dtype)
    assert all(width & (width - 1) == 0 and (width >= 16 or width == 0) for width in widths)
    assert head_dim <= sum(widths) <= 128
    if dtype == torch.bfloat16 and head_dim in attention_triton.HEAD_DIMS:
        assert sum(widths) - head_dim <= 8


def test_tokens_of_another_sequence_have_no_influence(device):
    qkv, cu_seqlens = packed_qkv([3, 8, 5], 2, 32, device=device)
    before = run(varlen_attention, qkv, cu_seqlens, gradient(qkv), 8)
    qkv[3:11] = float("nan")
    after = run(varlen_attention, qkv, cu_seqlens, gradient(qkv), 8)
    for b, a in zip(before, after, strict=True):
        assert torch.equal(b[:3], a[:3])
        assert torch.equal(b[11:], a[11:])
        assert a[3:11].isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, device):
    """Logits of +-400: without the maximum taken off, or with a key past the end at logit 0, exp overflows."""
    qkv, cu_seqlens = packed_qkv([9, 3], 1, 32, device=device)
    qkv[:, 0] = 20 + qkv[:, 0] / 100
    qkv[:, 1] = sign * (20 / 32**0.5 + qkv[:, 1] / 100)
    grad = gradient(qkv)
    actual = run(varlen_attention, qkv, cu_seqlens, grad, 16)
    expected = reference(qkv, cu_seqlens, grad)
    for a, e in zip(actual, expected, strict=True):
        # A logit of 400 in fp32 is known to 400 * 6e-8, and its exponential as well as that: 3e-5; sums add some.
        assert (a.double().cpu() - e).abs().max() <= 3e-4 * e.abs().max()


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=3))
def _packed_equals_one_sequence_at_a_time(device, lengths):
    qkv, cu_seqlens = packed_qkv(lengths, 1, 16, device=device)
    grad = gradient(qkv)
    out, grad_qkv = run(varlen_attention, qkv, cu_seqlens, grad, 20)
    parts = (x.split(lengths) for x in (out, grad_qkv, qkv, grad))
    for part, part_grad, single, single_grad in zip(*parts, strict=True):
        ends = torch.tensor([0, len(single)], dtype=torch.int32, device=device)
        alone = run(varlen_attention, single, ends, single_grad, 20)
        for a, b in zip((part, part_grad), alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)  # a call for several may sum in another order


def test_packed_equals_one_sequence_at_a_time(device):
    _packed_equals_one_sequence_at_a_time(device)


@pytest.mark.parametrize("longest_product", [0, 128])
def test_gradcheck(longest_product, monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    monkeypatch.setattr(attention_torch, "LONGEST_PRODUCT", longest_product)
    monkeypatch.setattr(attention_torch, "SHORTEST_SINGLE", 0)
    qkv, cu_seqlens = packed_qkv([2, 0, 3, 3, 1], 2, 8, torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, 4), (q, k, v))


def test_strides(device):
    """Expanded keys, values of another layout, a query whose strides are no multiples of 8, a gradient of stride 0."""
    lengths = [6, 11]
    qkv, cu_seqlens = packed_qkv(lengths, 2, 24, device=device)
    total = sum(lengths)
    q = torch.empty(total, 2, 29, device=device)[..., :24].copy_(qkv[:, 0])
    k = qkv[:, 1, :1].expand(total, 2, 24)
    v = qkv[:, 2].transpose(0, 1).contiguous().transpose(0, 1)
    strided = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    ones = torch.ones((), device=device).expand(total, 2, 24)
    out = varlen_attention(*strided, cu_seqlens, 16)
    expected = varlen_attention_ref(*plain, cu_seqlens.cpu())
    grads = torch.autograd.grad(out, strided, ones)
    expected_grads = torch.autograd.grad(expected, plain, ones.double().cpu())
    # The keys of both heads are one, so its two gradients are summed; compared in absolute terms, as some are near 0.
    assert_near([out.detach()], [expected.detach()], torch.float32)
    for a, e in zip(grads, expected_grads, strict=True):
        assert (a.double().cpu() - e).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_all_of_its_outputs_and_nothing_else(dtype, device, monkeypatch):
    qkv, cu_seqlens = packed_qkv([17, 0, 1], 2, 88, dtype, device)
    grad = gradient(qkv)
    expected = reference(qkv, cu_seqlens, grad)
    with guarded_outputs(monkeypatch):
        actual = run(varlen_attention, qkv, cu_seqlens, grad, 32)
    assert_near(actual, expected, dtype)


def test_two_runs_are_bitwise_equal(device):
    qkv, cu_seqlens = packed_qkv([33, 33, 7], 1, 32, device=device)
    grad = gradient(qkv)
    first, second = (run(varlen_attention, qkv, cu_seqlens, grad, 33) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_inference_gives_the_same_and_keeps_nothing(device):
    qkv, cu_seqlens = packed_qkv([9, 14], 2, 32, device=device)
    trained = run(varlen_attention, qkv, cu_seqlens, gradient(qkv), 16)[0]
    with torch.no_grad():
        out = varlen_attention(*qkv.requires_grad_().unbind(1), cu_seqlens, 16)
    assert out.grad_fn is None
    assert torch.equal(out, trained)


@pytest.mark.parametrize(("head_dim", "dtype"), [(24, torch.float32), (88, torch.bfloat16)], ids=str)
def test_one_gradient_of_qkv_is_that_of_its_three_views(head_dim, dtype, device, monkeypatch):
    qkv, cu_seqlens = packed_qkv([17, 0, 1, 20], 2, head_dim, dtype, device)
    grad = gradient(qkv)
    expected = run(varlen_attention, qkv, cu_seqlens, grad, 20, scale=0.3)
    leaf = qkv.detach().requires_grad_()
    with guarded_outputs(monkeypatch):
        out = varlen_attention_qkv(leaf, cu_seqlens, 20, scale=0.3)
        out.backward(grad)
    assert torch.equal(out, expected[0])
    assert torch.equal(leaf.grad, expected[1])
    with torch.no_grad():
        assert torch.equal(varlen_attention_qkv(qkv, cu_seqlens, 20, scale=0.3), expected[0])


def test_qkv_is_checked_as_its_views_are():
    with pytest.raises(ValueError, match=r"qkv: want a .* \[T, 3, heads, head_dim\] tensor, got float32 \[4, 2, 2"):
        varlen_attention_qkv(torch.zeros(4, 2, 2, 16), cu(0, 4), 4)
    with pytest.raises(ValueError, match="max_seqlen: want an upper bound"):
        varlen_attention_qkv(torch.zeros(4, 3, 2, 16, requires_grad=True), cu(0, 4), 0)


def test_autocast_and_checkpointing_change_nothing(device):
    qkv, cu_seqlens = packed_qkv([9, 14, 14], 1, 32, device=device)
    grad = gradient(qkv)
    expected = run(varlen_attention, qkv, cu_seqlens, grad, 16)

    def checkpointed(*args):
        return checkpoint(varlen_attention, *args, use_reentrant=False)

    with torch.autocast(qkv.device.type, dtype=torch.bfloat16):
        actual = run(checkpointed, qkv, cu_seqlens, grad, 16)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@registered_paths
def test_compiles_to_one_graph_over_changing_lengths(device):
    def step(qkv, cu_seqlens):
        return varlen_attention(*(qkv * 2).unbind(1), cu_seqlens, 32) * 3

    # Not two sequences first: that makes 3 entries of cu_seqlens, which the compiler takes for the 3 of qkv.
    samples = [packed_qkv(lengths, 2, 24, device=device) for lengths in ([3, 9, 1, 2], [8, 10], [2, 0, 5, 5, 4])]
    assert_compiles_once(step, [(qkv.requires_grad_(), cu_seqlens) for qkv, cu_seqlens in samples])


@registered_paths
def test_qkv_compiles_to_one_graph_over_changing_lengths(device):
    def step(qkv, cu_seqlens):
        return varlen_attention_qkv(qkv * 2, cu_seqlens, 32) * 3

    samples = [packed_qkv(lengths, 2, 24, device=device) for lengths in ([3, 9, 1, 2], [8, 10], [2, 0, 5, 5, 4])]
    assert_compiles_once(step, [(qkv.requires_grad_(), cu_seqlens) for qkv, cu_seqlens in samples])


@registered_paths
def test_opcheck(device):
    backend = "torch" if os.environ["IJEPA_KERNELS"] == "torch" else "triton"
    qkv, cu_seqlens = packed_qkv([3, 0, 4], 1, 16, device=device)
    q, k, v = (x.clone() for x in qkv.unbind(1))
    arguments = (cu_seqlens, 8, 0.25, backend)
    out, lse = torch.ops.ijepa.varlen_attention_qkv(qkv, *arguments)
    torch.library.opcheck(torch.ops.ijepa.varlen_attention_qkv.default, (qkv.clone().requires_grad_(), *arguments))
    torch.library.opcheck(
        torch.ops.ijepa.varlen_attention_qkv_backward.default, (torch.ones_like(out), qkv, out, lse, *arguments)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.ijepa.varlen_attention.default, (*leaves, *arguments))
    out, lse = torch.ops.ijepa.varlen_attention(q, k, v, *arguments)
    torch.library.opcheck(
        torch.ops.ijepa.varlen_attention_backward.default, (torch.ones_like(out), q, k, v, out, lse, *arguments)
    )


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


X = torch.zeros(6, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X, X, cu(0, 6), 6), r"q: want a .* \[T, heads, head_dim\] tensor, got float32 \[2, 16\] on cpu"),
        ((X, X[:5], X, cu(0, 6), 6), r"k: want what q is, float32 \[6, 2, 16\] on cpu, got float32 \[5, 2, 16\]"),
        ((X, X, X.half(), cu(0, 6), 6), r"v: want what q is, float32 .*, got float16"),
        ((X, None, X, cu(0, 6), 6), r"k: want what q is, .*, got NoneType"),
        ((X.int(), X.int(), X.int(), cu(0, 6), 6), "q: want a float32 or .*, got int32"),
        ((X[..., :12], X[..., :12], X[..., :12], cu(0, 6), 6), "q: want a head_dim that is a multiple of 8, got 12"),
        ((X[..., :0], X[..., :0], X[..., :0], cu(0, 6), 6), "q: want a head_dim that is a multiple of 8, got 0"),
        ((X, X, X.mT.contiguous().mT, cu(0, 6), 6), r"v: want a contiguous last dimension, got strides \(32, 1, 2\)"),
        ((X, X, X, cu(0, 6, dtype=torch.int64), 6), r"cu_seqlens: want a int32 \[S\+1\] tensor on cpu, got int64"),
        ((X, X, X, cu(), 6), "cu_seqlens: want one entry more than there are sequences, got none"),
        ((X, X, X, cu(0, 4, 3, 6), 6), "cu_seqlens: want lengths of 0 to max_seqlen = 6, got -1 for sequence 1"),
        ((X, X, X, cu(0, 5), 6), "cu_seqlens: want it to go from 0 to 6, the tokens, got 0 to 5"),
        ((X, X, X, cu(1, 6), 6), "cu_seqlens: want it to go from 0 to 6, the tokens, got 1 to 6"),
        ((X, X, X, cu(0, 6), 5), "cu_seqlens: want lengths of 0 to max_seqlen = 5, got 6 for sequence 0"),
        ((X, X, X, cu(0, 6), None), "max_seqlen: want an int, got NoneType"),
        ((X, X, X, cu(0, 6), 0), "max_seqlen: want an upper bound of the lengths, at least 1, got 0"),
        ((X, X, X, cu(0, 6).to("meta"), 6), r"cu_seqlens: want .* on cpu, got int32 \[2\] on meta"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(*arguments)


@pytest.mark.parametrize("scale", [-1, "1"])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale: want a number > 0 or None, got {scale!r}"):
        varlen_attention(X, X, X, cu(0, 6), 6, scale=scale)


@pytest.mark.gpu
def test_lengths_on_a_gpu_are_checked_when_asked_for(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS_CHECK", "1")
    x = X.cuda()
    with pytest.raises(ValueError, match="cu_seqlens: want it to go from 0 to 6"):
        varlen_attention(x, x, x, cu(0, 5).cuda(), 6)
