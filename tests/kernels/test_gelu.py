"""bias_gelu: value and gradients against float64 on every path, and what autograd asks of an op."""
import pytest
import torch
from ijepa_kernels import gelu
from ijepa_kernels.gelu import _backward_op, _forward_op, bias_gelu, bias_gelu_ref
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error

# Phi is off by 7.5e-8 (Abramowitz and Stegun, 7.1.26) and a few roundings of 2^-24: of h * Phi that is as much of h.
PHI = 7.5e-8 + 8 * 2**-24
B, F, H = torch.bfloat16, torch.float32, torch.float16


def inputs(device, rows=5, dim=48, dtype=F, with_bias=True, scale=2.0):
    g = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(rows, dim, generator=g)).to(device, dtype).requires_grad_()
    bias = torch.randn(dim, generator=g).to(device).requires_grad_()
    return [x, bias if with_bias else None]


def run(function, tensors):
    x = tensors[0]
    out = function(*tensors)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(x)  # exact in every dtype
    return out.detach(), *torch.autograd.grad(out, [t for t in tensors if t is not None], weights)


def assert_matches(tensors):
    got = run(bias_gelu, tensors)
    want = run(bias_gelu_ref, [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors])
    x = tensors[0]
    largest = float(x.detach().abs().max()) + 5 if x.numel() else 1
    for a, b, dtype, terms in zip(got, want, (x.dtype, x.dtype, F), (1, 4, 4 * x.shape[0]), strict=False):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        # A bias sums what each row is off by; gradients carry an upstream of at most 4.
        smallest = 2**-24 if dtype == H else 0
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=store_error(dtype) + 8 * 2**-24, atol=terms * largest * PHI + smallest
        )


@pytest.mark.parametrize("dim", [1, 63, 192, 1536, 1408])
def test_every_width_matches_float64(device, dim):
    assert_matches(inputs(device, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [768, 3072, 5120, 6144])
def test_the_hidden_widths_match_float64(device, dim):
    assert_matches(inputs(device, dim=dim))


@pytest.mark.parametrize("dtype", [B, F, H])
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_dtype_matches_float64_on_the_same_values(device, dtype, with_bias):
    assert_matches(inputs(device, dtype=dtype, with_bias=with_bias))


def test_far_from_zero(device):
    """The tail is no difference of two numbers near 1: down there its relative error stays small."""
    x = torch.tensor([[-100.0, -12.0, -5.0, -0.0, 0.0, 5.0, 12.0, 100.0]], device=device).requires_grad_()
    assert_matches([x, None])
    got, want = (f(x.detach()[:, 2:3].to(t)) for f, t in ((bias_gelu, F), (bias_gelu_ref, torch.float64)))
    tolerance = 2e-3 if gelu._runs_kernel(x) else 0.1  # 1 + erf, as ATen has it, is a multiple of 2^-24: of 5.7e-7
    assert float((got.double() / want.to(got.device) - 1).abs()) < tolerance
    assert bias_gelu(torch.tensor([[float("nan")]], device=device)).isnan().all()


def test_more_rows_than_programs(device, monkeypatch):
    monkeypatch.setattr(gelu, "BACKWARD_PROGRAMS", 2)
    assert_matches(inputs(device, rows=70))


def test_no_rows(device):
    x, bias = inputs(device, rows=0)
    bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == (0, 48)
    assert not bias.grad.any()


def test_strided_inputs_and_expanded_gradients(device):
    x, bias = (t.detach() for t in inputs(device))
    assert_matches([x.t().contiguous().t().requires_grad_(), bias.repeat(2)[::2].requires_grad_()])
    x, bias = inputs(device)
    (got,) = torch.autograd.grad(bias_gelu(x, bias).sum(), bias)
    (want,) = torch.autograd.grad(bias_gelu(x, bias), bias, torch.ones(5, 48, device=device))
    assert torch.equal(got, want)


def test_writes_only_its_outputs(kernel_device, monkeypatch):
    with guarded_outputs(monkeypatch):
        assert_matches(inputs(kernel_device, dim=63))


def test_two_runs_are_bitwise_equal(reproducible_device):
    tensors = inputs(reproducible_device, rows=70, dtype=B)
    assert all(torch.equal(a, b) for a, b in zip(run(bias_gelu, tensors), run(bias_gelu, tensors), strict=True))


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    x, bias = (t.detach().double().requires_grad_() for t in inputs("cpu", 3, 5))
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))
    assert torch.autograd.gradcheck(bias_gelu, (x,))


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(device, with_bias):
    x, bias = inputs(device, dtype=B, with_bias=with_bias)
    torch.library.opcheck(_forward_op, (x, bias))
    torch.library.opcheck(_backward_op, (torch.ones_like(x), x.detach(), None if bias is None else bias.detach()))


def test_compiles_to_one_graph_over_changing_numbers_of_rows(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    assert_compiles_once(lambda x, bias: bias_gelu(x * 2, bias), [inputs("cpu", rows=rows) for rows in (7, 11, 5)])


@pytest.mark.parametrize(
    ("match", "x", "bias"),
    [
        (r"x: want a .* \[T, D\] tensor, got float32 \[8\]", torch.zeros(8), None),
        (r"bias: want a .* \[8\] tensor on cpu, got float32 \[7\]", torch.zeros(3, 8), torch.zeros(7)),
    ],
)
def test_bad_input(match, x, bias):
    with pytest.raises(ValueError, match=match):
        bias_gelu(x, bias)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    tensors = inputs("cuda", dtype=B)
    run(bias_gelu, tensors)
    with forbidden_sync():
        bias_gelu(*tensors).sum().backward()
