"""The backward of short sequences, on its own and where `varlen_attention` takes it, against float64."""
import pytest
import torch
from ijepa_kernels import attention_short, attention_triton
from ijepa_kernels.attention import varlen_attention, varlen_attention_qkv
from op_proofs import guarded_outputs
from test_attention import assert_near, gradient, packed_qkv, reference, run

LENGTHS = [0, 1, 63, 64, 0, 65, 128, 129, 196, 256, 257, 0]  # every number of tiles, both launches, both edges of each
BOUND = 320


def backwards(qkv, cu_seqlens, max_seqlen, scale, grads=None):
    """The gradient of qkv by the kernel itself, into `grads` or tensors of its own."""
    grad = gradient(qkv)
    out, lse = attention_triton.forward(*qkv.unbind(1), cu_seqlens, max_seqlen, scale)
    return attention_short.backward(grad, *qkv.unbind(1), out, lse, cu_seqlens, max_seqlen, scale, grads)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(24, torch.float32), (24, torch.bfloat16), (32, torch.float16), (16, torch.bfloat16)],
    ids=str,
)
def test_every_length(head_dim, dtype, kernel_device, monkeypatch):
    """Views of one qkv, gradients into views of another; what is not written stays NaN, what is around it is seen."""
    if kernel_device == "cuda" and dtype == torch.float32:
        pytest.skip("`fits` refuses fp32: its wgmma is wrong. The interpreter computes in fp32, to a tighter tolerance")
    qkv, cu_seqlens = packed_qkv(LENGTHS, 1, head_dim, dtype, kernel_device)
    _, expected = reference(qkv, cu_seqlens, gradient(qkv), 0.3)
    with guarded_outputs(monkeypatch):
        grad_qkv = torch.empty(qkv.shape, dtype=dtype, device=qkv.device)
        backwards(qkv, cu_seqlens, BOUND, 0.3, grad_qkv.unbind(1))
        own = torch.stack(backwards(qkv, cu_seqlens, BOUND, 0.3), 1)
    for part in range(3):  # each by its own largest element
        assert_near([grad_qkv[:, part]], [expected[:, part]], dtype)
    assert torch.equal(own, grad_qkv)  # two runs, too


@pytest.mark.parametrize(("bound", "launches"), [(128, [(0, 2)]), (129, [(0, 2), (2, 5)])])
def test_a_bound_of_128_needs_one_launch(bound, launches, kernel_device, monkeypatch):
    kernel, seen = attention_short._attention_short_bwd_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                seen.append((constants["BEYOND"], constants["MOST"]))
                kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(attention_short, "_attention_short_bwd_kernel", Watched())
    qkv, cu_seqlens = packed_qkv([128, 7], 3, 24, torch.float16, kernel_device)
    grads = backwards(qkv, cu_seqlens, bound, 0.3)
    assert seen == launches
    _, expected = reference(qkv, cu_seqlens, gradient(qkv), 0.3)
    assert_near([torch.stack(grads, 1)], [expected], torch.float16)


def test_strides_that_it_cannot_read_and_keys_of_another_layout(kernel_device):
    qkv, cu_seqlens = packed_qkv([66, 3], 2, 24, torch.float16, kernel_device)
    _, expected = reference(qkv, cu_seqlens, gradient(qkv), 0.3)
    q = torch.empty(69, 2, 29, dtype=torch.float16, device=kernel_device)[..., :24].copy_(qkv[:, 0])
    k = qkv[:, 1].transpose(0, 1).contiguous().transpose(0, 1)
    out, lse = attention_triton.forward(q, k, qkv[:, 2], cu_seqlens, 70, 0.3)
    grad = gradient(qkv).transpose(0, 1).contiguous().transpose(0, 1)
    grads = attention_short.backward(grad, q, k, qkv[:, 2], out, lse, cu_seqlens, 70, 0.3)
    assert_near([torch.stack(grads, 1)], [expected], torch.float16)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, kernel_device):
    """Logits of +-400: with a key past the end at logit 0, exp2 overflows where all others are far below."""
    qkv, cu_seqlens = packed_qkv([9, 67], 1, 32, torch.float16, kernel_device)
    qkv[:, 0] = 20
    qkv[:, 1] = sign * 20 / 32**0.5
    _, expected = reference(qkv, cu_seqlens, gradient(qkv))
    assert_near([torch.stack(backwards(qkv, cu_seqlens, 80, 32**-0.5), 1)[:, 2]], [expected[:, 2]], torch.float16)
    assert all(x.isfinite().all() for x in backwards(qkv, cu_seqlens, 80, 32**-0.5))


def test_no_token(kernel_device):
    qkv, cu_seqlens = packed_qkv([0, 0], 2, 24, torch.float16, kernel_device)
    assert [x.shape for x in backwards(qkv, cu_seqlens, 5, 1.0)] == [(0, 2, 24)] * 3


@pytest.mark.parametrize(
    ("head_dim", "dtype", "bound", "taken"),
    [
        (24, torch.bfloat16, 320, True),
        (24, torch.bfloat16, 321, False),
        (24, torch.float32, 20, False),
        (32, torch.bfloat16, 20, False),  # not in the table
    ],
)
def test_where_it_is_taken(head_dim, dtype, bound, taken, kernel_device, monkeypatch):
    monkeypatch.setattr(attention_triton, "SHORT_BACKWARD", frozenset({24}))
    calls, backward = [], attention_short.backward
    monkeypatch.setattr(attention_short, "backward", lambda *args: calls.append(1) or backward(*args))
    qkv, cu_seqlens = packed_qkv([17, 0, 3], 2, head_dim, dtype, kernel_device)
    grad = gradient(qkv)
    actual = run(varlen_attention, qkv, cu_seqlens, grad, bound)
    assert_near(actual, reference(qkv, cu_seqlens, grad), dtype)
    leaf = qkv.detach().requires_grad_()
    varlen_attention_qkv(leaf, cu_seqlens, bound).backward(grad)
    assert torch.equal(leaf.grad, actual[1])
    assert len(calls) == (2 if taken else 0)


def test_what_fits():
    """Of H/14, the longest of our recipes at 224 px: a context of 225 patches and a target of 54."""
    assert attention_short.fits(24, torch.bfloat16, 225 + 54)
    assert not attention_short.fits(40, torch.float16, 20)
    assert max(launch.most for launch in attention_short.LAUNCHES) * attention_short.ROWS == 320
