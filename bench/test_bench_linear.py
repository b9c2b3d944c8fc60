"""The linear layers of a block in fp32 on a CPU, forward and backward: who multiplies is chosen by the processor.

`ours` is `ijepa_fast.onednn.linear`, `mkl` PyTorch's own, `onednn` oneDNN wherever this runs. Rows are those of the
target encoder. CPU only: on a GPU one library multiplies.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.compare import Case, NotRun, Variant, assert_close
from bench.test_bench_fp8 import shape_of
from bench.test_bench_fused import draw, rows_of
from ijepa_fast import compat, onednn

pytestmark = pytest.mark.parametrize("model", [pytest.param("B16", marks=pytest.mark.quick), "H14"])


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not compat.has_onednn_linear():
        raise NotRun("this PyTorch has no oneDNN")
    return onednn.Linear.apply(x, weight, bias)


@pytest.mark.parametrize("product", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("provider", ["ours", "mkl", "onednn"])
def test_bench_linear(bench, model, product, provider):
    def build():
        (into, out), rows = shape_of(product, model), rows_of(model, bench.device)
        shapes = (rows, into), (out, into), (out,), (rows, out)

        def factors(rows: slice = slice(None)) -> list[Tensor]:
            x, weight, bias, grad = (draw(shape, i, bench.device, torch.float32) for i, shape in enumerate(shapes))
            return [x[rows], weight, bias, grad[rows]]

        def run(function, x, weight, bias, grad):
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            result = function(*leaves)
            return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

        def of(function):
            def make():
                if bench.device.type != "cpu":
                    raise NotRun("CPU only")
                inputs = factors()
                return lambda: run(function, *inputs)

            return Variant(make)

        def check(results):
            few = slice(0, 64)  # sums over all rows are left to the tests
            want = run(F.linear, *(t.double().detach() for t in factors(few)))
            assert_close([t[few] for t in results[:2]], want[:2], 1e-5)

        variants = {"ours": of(onednn.linear), "mkl": of(F.linear), "onednn": of(by_onednn)}
        named = {"x": [rows, into], "weight": [out, into]}
        return Case(variants, named, torch.float32, check, flops=3 * 2 * rows * into * out)

    bench(build)
