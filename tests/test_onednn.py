"""Linear layers by oneDNN on a CPU, against float64 and PyTorch's own."""
import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import Packed
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_fast import compat, onednn
from ijepa_fast.model import build_encoder

needs_onednn = pytest.mark.skipif(not compat.has_onednn_linear(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def everywhere(monkeypatch):
    """oneDNN multiplies whatever the processor and the size; counts its products."""
    calls, real = [], compat.onednn_linear

    def counted(*args, **kwargs):
        calls.append(kwargs.get("activation", "none"))
        return real(*args, **kwargs)

    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(compat, "onednn_linear", counted)
    return calls


def operands(rows, columns, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, columns), (outputs, columns), (outputs,), (rows, outputs)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(function, x, weight, bias, grad):
    """The result, and the gradients of x, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(values, exact):
    pairs = zip(values, exact, strict=True)
    return [(value.double() - wanted).abs().max() / wanted.abs().max() for value, wanted in pairs]


@needs_onednn
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 16, 16), (63, 96, 384), (197, 384, 96), (130, 48, 48)])
@pytest.mark.parametrize("function", ["linear", "linear_gelu"])
def test_result_and_gradients_are_as_exact_as_pytorchs(function, rows, columns, outputs, everywhere):
    plain = F.linear if function == "linear" else lambda *args: F.gelu(F.linear(*args))
    wide = operands(rows, columns, outputs)
    exact = results(plain, *wide)
    narrow = [t.float() for t in wide]
    ours, theirs = (error(results(f, *narrow), exact) for f in (getattr(onednn, function), plain))
    assert everywhere == ["none"] * 3
    # Both round each product and sum once, in another order: fp32's 2^-24 a term, whose sum grows with the terms' root.
    for one, other in zip(ours, theirs, strict=True):
        assert one <= 2 * other + 2**-22


@needs_onednn
def test_gelu_is_fused_where_there_is_no_gradient(everywhere):
    x, weight, bias, _ = (t.float() for t in operands(50, 64, 128))
    with_gradient = onednn.linear_gelu(x, weight.requires_grad_(), bias)
    with torch.no_grad():
        fused = onednn.linear_gelu(x, weight, bias)
    assert everywhere == ["none", "gelu"]
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double())).detach()
    assert error([fused], [exact])[0] <= 2 * error([with_gradient.detach()], [exact])[0] + 2**-22


@needs_onednn
def test_only_the_gradients_that_are_needed_are_computed(everywhere):
    x, weight, bias, grad = (t.float() for t in operands(20, 32, 16))
    onednn.linear(x, weight.requires_grad_(), bias).backward(grad)
    assert everywhere == ["none"] * 2
    assert x.grad is None
    # A gradient without memory of its own, as that of a sum.
    (expanded,) = torch.autograd.grad(onednn.linear(x, weight, bias).sum(), weight)
    torch.testing.assert_close(expanded, x.sum(0).expand(16, 32), rtol=1e-5, atol=1e-5)  # sums of 20 terms


@needs_onednn
def test_an_encoder_computes_the_same(everywhere, monkeypatch):
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", image_size=32, patch_size=8)
    images, packed, grad = torch.randn(3, 3, 32, 32), Packed.dense(3, 16), torch.randn(48, 192)

    def run():
        out = encoder(images, packed)
        encoder.zero_grad()
        out.backward(grad)
        return [out.detach(), *(p.grad for p in encoder.parameters() if p.requires_grad)]

    ours = run()
    assert len(everywhere) == 12 * 4 * 3  # blocks, layers, products
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    plain = run()
    assert len(everywhere) == 12 * 4 * 3
    for one, other in zip(ours, plain, strict=True):  # twelve blocks of roundings, relative to the largest element
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_who_multiplies(monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda: True)
    large, weight = torch.empty(2000, 256), torch.empty(256, 256)
    assert onednn.takes(large, weight)
    assert not onednn.takes(large[:1500], weight)  # small
    assert not onednn.takes(large.bfloat16(), weight.bfloat16())
    assert not onednn.takes(large.to("meta"), weight.to("meta"))
    with Watched():  # which is to see the operators that it knows
        assert not onednn.takes(large, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.takes(large, weight)
    for of, name, value in ((torch.backends.mkldnn, "enabled", False), (onednn, "pays", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(of, name, value)
            assert not onednn.takes(large, weight)
    assert onednn.takes(large, weight)


@pytest.mark.parametrize(
    ("simd", "vendor", "family", "there", "expected"),
    [
        ("AVX512", "AuthenticAMD", 26, True, True),
        ("AVX512", "AuthenticAMD", 25, True, False),
        ("AVX2", "AuthenticAMD", 26, True, False),
        ("AVX512", "GenuineIntel", 26, True, False),
        ("AVX512", "AuthenticAMD", 26, False, False),
    ],
)
def test_which_processors(simd, vendor, family, there, expected, monkeypatch):
    about = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: simd)
    monkeypatch.setattr(onednn.Path, "exists", lambda self: True)
    monkeypatch.setattr(onednn.Path, "read_text", lambda self: about)
    monkeypatch.setattr(compat, "has_onednn_linear", lambda: there)
    assert onednn.pays.__wrapped__() is expected
