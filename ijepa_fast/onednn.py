"""Linear layers in fp32 by oneDNN, on CPUs where PyTorch's own take half of the vector units.

PyTorch multiplies fp32 matrices by MKL, which on AMD's processors has no AVX-512 but AVX2. oneDNN, which comes with
PyTorch for other dtypes, has. On Zen 5 it is twice as fast:

    pytest bench/test_bench_linear.py --benchmark-only

MKL stays for small products and on all other processors. On an EPYC with AVX2 alone oneDNN was slower. Zen 4 was not
measured: it computes AVX-512 in two halves. On Intel's processors MKL takes AVX-512 itself.
"""
import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from ijepa_kernels.registration import is_plain_eager
from torch import Tensor
from torch.autograd.function import once_differentiable

from ijepa_fast import compat

# Multiply-adds. oneDNN compiles a product when it first meets a number of rows, which varies from batch to batch. On
# two cores of a Zen 5 that took 0.4 to 1 ms, as long as MKL takes for about so many.
LEAST = 100_000_000

ZEN_5 = 26  # AMD's number of that family


@functools.cache
def pays() -> bool:
    """Whether this processor is one of those."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not compat.has_onednn_linear():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", about, re.MULTILINE)
    return "AuthenticAMD" in about and family is not None and int(family[1]) >= ZEN_5


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these: in eager code, and where autocast asks for no other dtype.

    `torch.backends.mkldnn.enabled = False` forbids it.
    """
    return (
        x.is_cpu
        and is_plain_eager()
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 2
        and len(x) * weight.numel() >= LEAST
        and pays()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return compat.onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = compat.onednn_linear(grad, weight.t())
        # oneDNN copies the first matrix of a product where it is a transpose. Let that be the smaller one: a weight's
        # gradient that comes out transposed is copied too, by autograd, but it has no row for each token.
        if ctx.needs_input_grad[1]:
            if grad.shape[1] < x.shape[1]:
                grad_weight = compat.onednn_linear(grad.t(), x.t())
            else:
                grad_weight = compat.onednn_linear(x.t(), grad.t()).t()
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by whoever is fastest."""
    return Linear.apply(x, weight, bias) if takes(x, weight) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(F.linear(x, weight, bias))`. oneDNN without gradients computes it in one pass."""
    if not torch.is_grad_enabled() and takes(x, weight):
        return compat.onednn_linear(x, weight, bias, activation="gelu")
    return F.gelu(linear(x, weight, bias))
