"""e4m3 with a scale a row or one in all: rounding, the linear layer and the fused passes, against float64 and PyTorch's
rounding."""
import pytest
import torch
from ijepa_kernels import (
    Quantized,
    add_layer_norm_fp8,
    bias_gelu_fp8,
    fp8,
    fp8_fused,
    fp8_linear,
    quantize_rows,
    quantize_tensor,
)
from ijepa_kernels.compat import scaled_mm
from ijepa_kernels.fp8 import E4M3
from ijepa_kernels.gelu import bias_gelu_ref
from ijepa_kernels.norm import add_layer_norm_ref

B, F, H = torch.bfloat16, torch.float32, torch.float16
either = pytest.mark.parametrize("quantize", [quantize_rows, quantize_tensor])


def random(*shape, seed=0, dtype=F, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def every_e4m3(device):
    """All finite numbers of the format, the points halfway between neighbours, and what lies next to those."""
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    half = (numbers[1:] + numbers[:-1]) / 2
    near = [half, half * (1 + 2**-22), half * (1 - 2**-22)]
    positive = torch.cat([numbers, *near])
    return torch.cat([positive, -positive]).to(device)


def assert_rounded(got: Quantized, want, spare: float = 0.0):
    """`want` in fp64, [T, D]. An e4m3 is off by 2^-4 of its value, or 2^-10 scales; `spare`: of fp32 arithmetic."""
    assert got.rows == len(want)
    scale = got.scale[: got.rows].cpu().double()
    error = (got.values[: got.rows].float().cpu().double() * scale - want).abs()
    bound = (want.abs() * 2**-4).maximum(scale * 2**-10) * (1 + 2**-20) + spare
    assert (error <= bound).all(), float((error / bound).max())


@either
def test_rounds_as_pytorch_does(device, quantize):
    """To the number, ties and subnormal ones included: a row whose largest value is 448 has the scale 1."""
    x = every_e4m3(device).expand(2, -1)
    got = quantize(x)
    assert got.scale.flatten().tolist()[:2] == [1] * (2 if quantize is quantize_rows else 1)
    assert torch.equal(got.values[:2].float(), x.to(E4M3).float())


@pytest.mark.parametrize("dtype", [F, B, H])
@pytest.mark.parametrize("dim", [1, 192, 300, 1408])
def test_a_row_has_a_scale_of_its_own(device, dim, dtype):
    x = (random(5, dim, dtype=dtype) * torch.tensor([[1e-3], [1.0], [100.0], [0.0], [3.0]], dtype=dtype)).to(device)
    got = quantize_rows(x)
    assert got.values.dtype == E4M3
    assert_rounded(got, x.cpu().double())
    largest = x.abs().amax(1).float()
    live = largest > 0
    assert (got.values[:5].float().abs().amax(1)[live] == 448).all()
    torch.testing.assert_close(got.scale[:5, 0][live], largest[live] / 448, rtol=2**-22, atol=0)
    assert not got.values[3].float().any()


@pytest.mark.parametrize("dtype", [F, B, H])
@pytest.mark.parametrize("dim", [1, 192, 300])
def test_a_matrix_has_one_scale(device, dim, dtype):
    x = (random(5, dim, dtype=dtype) * torch.tensor([[1e-3], [1.0], [-100.0], [0.0], [3.0]], dtype=dtype)).to(device)
    got = quantize_tensor(x)
    assert got.values.dtype == E4M3
    assert got.scale.shape == (1, 1)
    torch.testing.assert_close(got.scale[0, 0], x.abs().max().float() / 448, rtol=2**-22, atol=0)
    assert_rounded(got, x.cpu().double())
    assert got.values[:5].float().abs().max() == 448
    assert not quantize_tensor(torch.zeros_like(x)).dequantized().any()
    written = quantize_tensor(2 * x, got)
    assert written is got
    assert_rounded(got, 2 * x.cpu().double())


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden_in_a_matrix(device, what):
    x = random(3, 64).to(device)
    x[1, 5] = what
    assert quantize_tensor(x).dequantized().isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_is_not_hidden(device):
    x = random(3, 64).to(device)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    got = quantize_rows(x).dequantized()
    assert got[0, 5].isnan()
    assert got[1, 7].isnan()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("stream", [F, B])
@pytest.mark.parametrize("with_branch", [True, False])
def test_the_norm_is_what_the_unquantised_one_rounds_to(device, stream, with_branch):
    dim = 192
    x, weight, bias = random(7, dim, dtype=stream).to(device), *(random(dim, seed=i).to(device) for i in (1, 2))
    branch = random(7, dim, seed=3, dtype=B).to(device) if with_branch else None
    branch_bias = random(dim, seed=4).to(device) if with_branch else None
    new, normed = add_layer_norm_fp8(x, branch, weight, bias, branch_bias=branch_bias, eps=1e-6)
    want_new, _ = add_layer_norm_ref(x, branch, weight, bias, branch_bias=branch_bias, eps=1e-6)
    assert new.dtype == stream
    rtol = 2**-7 if stream == B else 2**-23  # the interpreter cuts bf16
    torch.testing.assert_close(new, want_new, rtol=rtol, atol=0)
    _, want = add_layer_norm_ref(new.cpu().double(), None, weight.cpu().double(), bias.cpu().double(), eps=1e-6)
    assert_rounded(normed, want, spare=64 * 2**-24)  # a norm's values are about 4, of a few fp32 roundings
    assert (normed.values[:7].float().abs().amax(1) == 448).all()


def uneven(dim, device):
    """Weights and biases of a norm, the weights of three sizes; and a column with the largest sum of their bounds."""
    weight = torch.tensor([0.02, 1.0, -5.0]).repeat(dim // 3 + 1)[:dim]
    bias = random(dim, seed=2, scale=0.5)
    return weight.to(device), bias.to(device), int((weight.double().abs() * dim**0.5 + bias.double().abs()).argmax())


@pytest.mark.parametrize("dim", [192, 384, 1280, 1408])
@pytest.mark.parametrize(("stream", "with_branch"), [(F, True), (F, False), (B, True)])
def test_the_norm_by_one_scale_is_off_by_what_its_bound_explains(device, dim, stream, with_branch):
    """The bound is reached by a row with one element alone, and nothing is beyond it."""
    weight, bias, most = uneven(dim, device)
    x = random(7, dim, dtype=stream).to(device)
    x[2] = 0
    x[4] *= 1e-4
    x[5], x[5, most] = 0, 1e4 * (weight[most] * bias[most]).sign()
    branch = random(7, dim, seed=3, dtype=B).to(device) if with_branch else None
    branch_bias = random(dim, seed=4).to(device) if with_branch else None
    if with_branch:
        branch[2], branch[5] = 0, 0
    new, normed = add_layer_norm_fp8(x, branch, weight, bias, branch_bias=branch_bias, eps=1e-6, scales="tensor")
    want_new, by_row = add_layer_norm_fp8(x, branch, weight, bias, branch_bias=branch_bias, eps=1e-6)
    assert torch.equal(new, want_new)
    a, b = weight.cpu().double(), bias.cpu().double()
    bound = float((a.abs() * dim**0.5 + b.abs()).max())
    assert normed.scale.shape == (1, 1)
    assert float(normed.scale) == pytest.approx(bound / 448, rel=2**-22)
    _, want = add_layer_norm_ref(new.cpu().double(), None, a, b, eps=1e-6)
    assert want.abs().max() < bound
    assert_rounded(normed, want, spare=bound * 2**-20)
    if not with_branch:
        assert normed.values[5].float().abs().max() == 448
    # Of the largest numbers of a row nothing is lost: they are as far off as by a scale of the row's own.
    large = want.abs() > bound * 2**-14.8
    errors = [((low.dequantized().cpu().double() - want) / want).abs()[large].max() for low in (normed, by_row)]
    assert float(max(errors)) < 2**-4 * (1 + 1e-3)


@pytest.mark.parametrize("offset", [1.0, 1e5, 1e9])
def test_no_row_overflows_by_one_scale(device, offset):
    """Not even where a norm in fp32 is made of roundings alone. What is beyond 448 is cut to it."""
    x = torch.full((3, 192), offset, device=device)
    x[1] *= 1 + random(192, scale=1e-7).to(device)
    x[2, 3] *= -3e4
    weight, bias, _ = uneven(192, device)
    normed = add_layer_norm_fp8(x, None, weight, bias, eps=1e-6, scales="tensor")[1]
    assert (normed.values[:3].float().abs() < 448).all()


def test_every_program_takes_the_one_scale_that_the_first_one_stores(kernel_device, monkeypatch):
    """Rows of all programs come out alike where x is the same in all, and nothing is written beside the scale."""
    beside = []

    def guarded(x, scales):
        values, _ = fp8.empty_quantized(x, scales)
        beside.append(torch.full((99, 1), 7.0, device=x.device))
        return values, beside[-1][7:8]

    weight, bias, _ = uneven(192, kernel_device)
    x = random(1, 192).to(kernel_device).expand(35, -1)
    want = add_layer_norm_fp8(x[:1], None, weight, bias, eps=1e-6, scales="tensor")[1]
    monkeypatch.setattr(fp8_fused, "empty_quantized", guarded)
    got = add_layer_norm_fp8(x, None, weight, bias, eps=1e-6, scales="tensor")[1]
    assert torch.equal(got.values[:35].view(torch.uint8), want.values[:1].view(torch.uint8).expand(35, -1))
    assert torch.equal(got.scale, want.scale)
    (around,) = beside
    assert (around.flatten() != 7).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dim", [192, 1000])
def test_the_kernel_has_pytorch_s_one_scale(kernel_device, dim, monkeypatch):
    weight, bias, _ = uneven(dim, kernel_device)
    x = random(3, dim).to(kernel_device)
    of_kernel = add_layer_norm_fp8(x, None, weight, bias, eps=1e-6, scales="tensor")[1].scale
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    scale = add_layer_norm_fp8(x, None, weight, bias, eps=1e-6, scales="tensor")[1].scale
    torch.testing.assert_close(of_kernel, scale, rtol=2**-23 if x.is_cuda else 0, atol=0)  # a GPU fuses * and +


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_leaves_the_others_by_one_scale(device):
    weight, bias, _ = uneven(192, device)
    x = random(3, 192).to(device)
    x[1, 5] = float("inf")
    got = add_layer_norm_fp8(x, None, weight, bias, eps=1e-6, scales="tensor")[1].dequantized()
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dim", [48, 768, 1100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gelu_is_what_the_unquantised_one_rounds_to(device, dim, with_bias):
    x = (random(6, dim, dtype=B) * torch.tensor([[1.0], [5.0], [1e-3], [0.1], [30.0], [1.0]], dtype=B)).to(device)
    x[5] = -x[5].abs() - 1  # a row without a positive value
    bias = 0.01 * random(dim, seed=1).to(device) if with_bias else None
    got = bias_gelu_fp8(x, bias)
    want = bias_gelu_ref(x.cpu().double(), None if bias is None else bias.cpu().double())
    assert_rounded(got, want, spare=2e-6)  # Phi is off by 7.5e-8, of at most 30 and its roundings
    assert (got.values[:6].float().abs() <= 448).all()
    assert got.values[1].float().abs().max() == 448  # its largest value has the largest number there is


def exact_product(x, weight, bias):
    """In float64, of what the two matrices hold; and the same of the magnitudes."""
    a, b = x.dequantized().cpu().double(), weight.dequantized().cpu().double()
    return a @ b.t() + bias.double(), a.abs() @ b.abs().t()


def assert_is_product(got, x, weight, bias):
    """Rounded to bf16 once; and summed in fp32, or on a GPU, 32 products at a time, in numbers of 13 bits."""
    exact, magnitude = exact_product(x, weight, bias)
    steps, unit = (x.values.shape[1] / 32, 2**-13) if x.values.is_cuda else (x.values.shape[1], 2**-24)
    error = (got - exact).abs()
    bound = 2**-8 * exact.abs() + steps * unit * magnitude
    assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@either
@pytest.mark.parametrize("columns", [1280, 5120])
@pytest.mark.parametrize("rows", [256, 1000])
def test_products_of_a_model_s_width(columns, rows, quantize):
    x, weight = random(rows, columns).cuda(), random(1280, columns, seed=1, scale=0.02).cuda()
    bias = random(1280, seed=2, dtype=B)
    a, b = quantize(x), quantize(weight)
    got = fp8_linear(a, b, bias.cuda(), out_dtype=B).cpu().double()
    assert_is_product(got, a, b, bias)
    exact = exact_product(a, b, bias)[0]
    print(f"relative error of the sums, {columns} columns: {float((got - exact).norm() / exact.norm()):.1e}")
    assert float((got - exact).norm() / exact.norm()) < 2**-8  # what is lost in sums is less than in the rounding


@either
def test_the_linear_layer_is_off_by_what_rounding_explains(device, quantize):
    x, weight = random(32, 192).to(device), random(64, 192, seed=1, scale=0.02).to(device)
    bias = random(64, seed=2, dtype=B)
    quantised, low = quantize(x), quantize(weight)
    got = fp8_linear(quantised, low, bias.to(device), out_dtype=B).cpu().double()
    assert_is_product(got, quantised, low, bias)
    exact = exact_product(quantised, low, bias)[0]
    # Against the fp32 layer: each factor is off by 2^-4 of itself at most, each product by 2^-3 and a little.
    a, b = x.cpu().double(), weight.cpu().double()
    error = (got - (a @ b.t() + bias.double())).abs()
    bound = (2**-3 + 2**-8) * (a.abs() @ b.abs().t()) + 2**-8 * exact.abs()
    tiny = quantised.scale[:32].cpu().double() * low.scale[:64].cpu().double().t() * 192 * 448 * 2**-9
    assert (error <= bound + tiny).all()
    assert float(error.norm() / (a @ b.t()).norm()) < 0.06  # as random roundings add up: 2^-4 / sqrt(3) a factor


@either
def test_the_cpu_computes_what_scaled_mm_does(quantize):
    """The op that a GPU runs, where a CPU has it too."""
    x, weight = quantize(random(32, 192)), quantize(random(64, 192, seed=1))
    bias = random(64, seed=2, dtype=B)
    try:
        want = scaled_mm(x.values, weight.values, x.scale, weight.scale, bias, B)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch has no such product on a CPU: {str(error)[:60]}")
    torch.testing.assert_close(fp8_linear(x, weight, bias, out_dtype=B), want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("scales", "quantize"), [("row", quantize_rows), ("tensor", quantize_tensor)])
@pytest.mark.parametrize("rows", [0, 1, 257])
def test_any_number_of_rows(device, rows, scales, quantize):
    x = random(rows, 192).to(device)
    vectors = (random(192, seed=i).to(device) for i in (1, 2))
    normed = add_layer_norm_fp8(x, None, *vectors, eps=1e-6, scales=scales)[1]
    assert quantize(x).dequantized().shape == (rows, 192)
    hidden = fp8_linear(normed, quantize(random(48, 192, seed=3).to(device)), out_dtype=B)
    assert hidden.shape == (rows, 48)
    out = fp8_linear(bias_gelu_fp8(hidden), quantize_rows(random(16, 48, seed=4).to(device)), out_dtype=B)
    assert out.shape == (rows, 16)
    assert out.isfinite().all()


def test_registered_ops(device):
    """opcheck: schemas and fakes. The test of schemas cannot multiply by e4m3, which the first two write."""
    x, weight, bias = (random(*shape).to(device) for shape in ((4, 48), (48,), (48,)))
    rounding = (torch.ops.ijepa.quantize_rows_.default, torch.ops.ijepa.quantize_tensor_.default)
    for op, arguments in (
        (rounding[0], (x, *quantize_rows(x)[:2])),
        (rounding[1], (x, *quantize_tensor(x)[:2])),
        (torch.ops.ijepa.add_layer_norm_fp8.default, (x, x.bfloat16(), bias, weight, bias, 1e-6, False)),
        (torch.ops.ijepa.add_layer_norm_fp8.default, (x, None, None, weight, bias, 1e-6, True)),
        (torch.ops.ijepa.bias_gelu_fp8.default, (x, bias)),
    ):
        schema = () if op in rounding else ("test_schema",)
        torch.library.opcheck(op, arguments, test_utils=(*schema, "test_faketensor"))


def refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_refuses(device):
    x = random(4, 48).to(device)
    trained = x.clone().requires_grad_()
    refused(lambda: quantize_rows(trained), "no gradient")
    refused(lambda: quantize_tensor(trained), "no gradient")
    refused(lambda: bias_gelu_fp8(x, trained[0]), "no gradient")
    refused(lambda: add_layer_norm_fp8(x, None, trained[0], x[0], eps=1e-6), "no gradient")
    refused(lambda: quantize_rows(x[0]), r"x: want a .* \[T, D\]")
    refused(lambda: add_layer_norm_fp8(x.double(), None, x[0], x[0], eps=1e-6), "x: want a float32")
    refused(lambda: add_layer_norm_fp8(x, x[:2], x[0], x[0], eps=1e-6), "branch: want")
    low = quantize_rows(x)
    refused(lambda: quantize_rows(x[:3], low), "out: want one for float32 \\[3, 48\\]")
    one = quantize_tensor(x)
    refused(lambda: quantize_tensor(x[:3], one), "out: want one for float32 \\[3, 48\\]")
    refused(lambda: quantize_rows(x, one), r"one scale a row, got 4 rows of .* with scales float32 \[1, 1\]")
    refused(lambda: quantize_tensor(x, low), "one scale a tensor, got 4 rows")
    refused(lambda: add_layer_norm_fp8(x, None, x[0], x[0], eps=1e-6, scales="column"), "scales: want 'row' or")
    refused(lambda: fp8_linear(low, one, out_dtype=B), r"weight: want scales of one kind, .* float32 \[1, 1\].* weight")
    refused(lambda: fp8_linear(one, low, out_dtype=B), r"weight: want scales of one kind, .* float32 \[1, 1\].* of x")
    refused(lambda: fp8_linear(x, low, out_dtype=B), "x: want a Quantized")
    refused(lambda: fp8_linear(low, quantize_rows(x[:, :32]), out_dtype=B), "weight: want 48 columns")
    refused(lambda: fp8_linear(low, low, x[0, :3].bfloat16(), out_dtype=B), r"bias: want a bfloat16 \[4\]")
    refused(lambda: fp8_linear(low, low, out_dtype=torch.float64), "out_dtype: want bfloat16")
    with torch.no_grad():
        quantize_rows(trained)


@pytest.mark.gpu
def test_a_gpu_refuses_widths_that_its_products_have_not(device):
    low = quantize_rows(random(4, 40).to(device))
    refused(lambda: fp8_linear(low, low, out_dtype=B), "multiples of 16")


@either
def test_spare_rows_of_a_gpu(monkeypatch, quantize):
    """On a GPU rows are rounded up to 256, and nothing reads what the spare ones hold."""
    monkeypatch.setattr(fp8, "padded_rows", lambda x: -(-x.shape[0] // 256) * 256)
    x = random(5, 192)
    low = quantize(x)
    assert low.values.shape == (256, 192)
    assert fp8_linear(low, low, out_dtype=F).shape == (5, 5)
    assert low.dequantized().isfinite().all()
    assert bias_gelu_fp8(x).values.shape == (256, 192)
