"""Products of e4m3 in the target encoder, beside bf16's: by it which of them pay is chosen.

`ours` has a scale for each row, `tensor` one for a whole matrix; `bf16` is the linear layer that both stand for. The
passes before the products are timed too, by what they write: e4m3 with scales of either kind, or bf16; and those that
round weights, which with a scale a row the optimizer does as it writes them. GPU only: a CPU emulates such products.
"""
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import (
    Quantized,
    add_layer_norm,
    add_layer_norm_fp8,
    bias_gelu,
    bias_gelu_fp8,
    fp8_linear,
    quantize_rows,
    quantize_tensor,
)
from ijepa_kernels.fp8 import Scales
from torch import Tensor

from bench.harness.compare import Case, NotRun, Variant, assert_close
from bench.harness.workload import MODELS
from bench.test_bench_fused import EPS, draw, rows_of

FOUR_BITS = 0.06  # of the largest result: a rounding is off by a 16th at most, a sum of products by less
pytestmark = pytest.mark.parametrize("model", ["H14", "B16", "L16", "g16"])


def shape_of(product: str, model: str) -> tuple[int, int]:
    """Columns in and out of a block's linear layer."""
    dim, mlp_dim = MODELS[model].size.dim, MODELS[model].size.mlp_dim
    return {"qkv": (dim, 3 * dim), "proj": (dim, dim), "fc1": (dim, mlp_dim), "fc2": (mlp_dim, dim)}[product]


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotRun("GPU only")


def without_gradients(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


@pytest.mark.parametrize("product", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("provider", ["ours", "tensor", "bf16"])
def test_bench_fp8_product(bench, model, product, provider):
    def build():
        device, (into, out), rows = bench.device, shape_of(product, model), rows_of(model, bench.device)

        def factors() -> tuple[Tensor, Tensor, Tensor]:
            x, weight = draw((rows, into), 0, device, torch.bfloat16), draw((out, into), 1, device, torch.bfloat16)
            return x, weight, draw((out,), 2, device, torch.bfloat16)

        def fp8(quantize: Callable[[Tensor], Quantized]):
            def make():
                need_gpu(device)
                x, weight, bias = factors()
                a, b = quantize(x), quantize(weight)
                return without_gradients(lambda: fp8_linear(a, b, bias, out_dtype=torch.bfloat16))

            return Variant(make)

        def bf16():
            need_gpu(device)
            x, weight, bias = factors()
            return without_gradients(lambda: F.linear(x, weight, bias))

        def check(result):
            x, weight, bias = (t.double() for t in factors())
            few = slice(0, 256)
            assert_close([result[few]], [F.linear(x[few], weight, bias)], FOUR_BITS)

        variants = {"ours": fp8(quantize_rows), "tensor": fp8(quantize_tensor), "bf16": Variant(bf16)}
        shapes = {"x": [rows, into], "weight": [out, into]}
        return Case(variants, shapes, torch.bfloat16, check, flops=2 * rows * into * out)

    bench(build)


@pytest.mark.parametrize("product", ["qkv", "fc1", "fc2"])
@pytest.mark.parametrize("provider", ["ours", "tensor"])
def test_bench_fp8_weight(bench, model, product, provider):
    def build():
        device, (into, out) = bench.device, shape_of(product, model)

        def of(quantize: Callable[..., Quantized]):
            def make():
                need_gpu(device)
                weight = draw((out, into), 1, device, torch.float32)
                low = quantize(weight)
                return lambda: quantize(weight, low)

            return Variant(make)

        def check(result):
            assert_close([result.dequantized()], [draw((out, into), 1, device, torch.float32).double()], FOUR_BITS)

        variants = {"ours": of(quantize_rows), "tensor": of(quantize_tensor)}
        return Case(variants, {"weight": [out, into]}, torch.float32, check, nbytes=5 * out * into)

    bench(build)


@pytest.mark.parametrize("part", ["norm", "gelu"])
@pytest.mark.parametrize("provider", ["ours", "tensor", "bf16"])
def test_bench_fp8_pass(bench, model, part, provider):
    def build():
        device, size, rows = bench.device, MODELS[model].size, rows_of(model, bench.device)
        dim = size.dim if part == "norm" else size.mlp_dim

        def inputs() -> list[Tensor]:
            stream = draw((rows, dim), 0, device, torch.float32 if part == "norm" else torch.bfloat16)
            more = [draw((rows, dim), 1, device, torch.bfloat16)] if part == "norm" else []
            vectors = 3 if part == "norm" else 1
            return [stream, *more, *(draw((dim,), 2 + i, device, torch.float32) for i in range(vectors))]

        def norm(scales: Scales | None):
            x, branch, weight, bias, branch_bias = inputs()
            options = {"branch_bias": branch_bias, "eps": EPS}
            if scales is not None:
                return lambda: add_layer_norm_fp8(x, branch, weight, bias, **options, scales=scales)[1]
            return lambda: add_layer_norm(x, branch, weight, bias, **options, out_dtype=torch.bfloat16)[1]

        def gelu(scales: Scales | None):
            if scales == "tensor":
                raise NotRun("rows of GELUs have scales of their own")
            x, bias = inputs()
            return (lambda: bias_gelu(x, bias)) if scales is None else lambda: bias_gelu_fp8(x, bias)

        def of(scales: Scales | None):
            def make():
                need_gpu(device)
                return without_gradients((norm if part == "norm" else gelu)(scales))

            return Variant(make)

        def check(result):
            few = [x[:256].double() if x.ndim == 2 else x.double() for x in inputs()]
            if part == "norm":
                x, branch, weight, bias, branch_bias = few
                want = F.layer_norm(x + branch + branch_bias, (dim,), weight, bias, EPS)
            else:
                want = F.gelu(few[0] + few[1])
            got = result.dequantized() if isinstance(result, Quantized) else result
            assert_close([got[:256]], [want], FOUR_BITS)

        nbytes = rows * dim * (4 + 2 + 4 + 1 if part == "norm" else 3)  # of the one that writes e4m3
        variants = {"ours": of("row"), "tensor": of("tensor"), "bf16": of(None)}
        return Case(variants, {"x": [rows, dim]}, torch.bfloat16, check, nbytes=nbytes)

    bench(build)
