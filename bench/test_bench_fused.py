"""What our kernels fuse of a step, beside the same in plain PyTorch, at the shapes of the paper's models.

Norm and GELU are timed forward and backward, a sum by itself. `eager` is PyTorch's own operators one by one, `compiled`
those under torch.compile (GPU only). The optimizer updates weights, target and low-precision copies of both; `eager` is
the fused AdamW, then PyTorch's multi-tensor forms of the average and the casts. On a CPU batches are small, and the
optimizer takes one block of the model.
"""
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import AdamWEMA, add_layer_norm, bias_gelu, column_sum
from torch import Tensor

from bench.harness.compare import Case, Variant, assert_close
from bench.harness.workload import MODELS
from bench.test_bench_ops import CPU_BATCH, MOMENTUM, compiled, ema_shapes

EPS, LR, DECAY = 1e-6, 1e-3, 0.05
pytestmark = pytest.mark.parametrize("model", [pytest.param("B16", marks=pytest.mark.quick), "L16", "H14", "g16"])


def draw(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def low_precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def rows_of(model: str, device: torch.device) -> int:
    """Tokens of the target encoder."""
    size = MODELS[model]
    return (size.gpu_batch if device.type == "cuda" else CPU_BATCH) * size.grid**2


def fused_case(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    inputs: Callable[[torch.dtype | None], list[Tensor]],
    gradients: Callable[[], list[Tensor]],
    device: torch.device,
    nbytes: int,
) -> Case:
    """Forward and backward of `op`, against `plain` in float64. `inputs(dtype)`: all in that; None: as they are."""

    def run(function, leaves, upstream):
        out = function(*leaves)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, upstream)]

    def of(function):
        def make():
            leaves, upstream = [x.requires_grad_() for x in inputs(None)], gradients()
            call = function()
            return lambda: run(call, leaves, upstream)

        return Variant(make)

    few = slice(0, 256)  # rows do not depend on each other; sums over all rows are left to the tests
    exact = [x[few] if x.ndim == 2 else x for x in inputs(torch.float64)]
    leaves = [x.detach().requires_grad_() for x in exact]
    want = run(plain, leaves, [x[few].double() for x in gradients()])
    rowwise = [i for i, x in enumerate(want) if x.ndim == 2]

    def check(result):
        lowest = low_precision(device)  # a result is rounded to it once, and what it is computed from was
        tolerance = 2**-7 if lowest == torch.bfloat16 else 1e-5
        assert_close([result[i][few] for i in rowwise], [want[i] for i in rowwise], tolerance)

    variants = {"ours": of(lambda: op), "eager": of(lambda: plain), "compiled": of(lambda: compiled(plain, device))}
    shapes = {"inputs": [list(x.shape) for x in inputs(None)]}
    return Case(variants, shapes, low_precision(device), check, nbytes=nbytes)


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled"])
def test_bench_norm(bench, model, provider):
    """The residual addition and the norm of the sum: a stream in fp32, the branch and the norm in low precision."""

    def build():
        device, dim, rows = bench.device, MODELS[model].size.dim, rows_of(model, bench.device)
        low = low_precision(device)

        def inputs(dtype):
            x, branch = draw((rows, dim), 0, device, torch.float32), draw((rows, dim), 1, device, low)
            weight, bias = draw((dim,), 2, device, torch.float32), draw((dim,), 3, device, torch.float32)
            return [t if dtype is None else t.to(dtype) for t in (x, branch, weight, bias)]

        def gradients():
            return [draw((rows, dim), 4, device, torch.float32), draw((rows, dim), 5, device, low)]

        def ours(x, branch, weight, bias):
            return add_layer_norm(x, branch, weight, bias, eps=EPS, out_dtype=low)

        def plain(x, branch, weight, bias):
            new = x + branch
            normed = F.layer_norm(new, (dim,), weight, bias, EPS)
            return new, normed.to(low) if x.dtype == torch.float32 else normed

        # forward: x, branch -> new, normed; backward: two gradients, new -> those of x and branch
        nbytes = rows * dim * (5 * 4 + 4 * low.itemsize)
        return fused_case(ours, plain, inputs, gradients, device, nbytes)

    bench(build)


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled"])
def test_bench_gelu(bench, model, provider):
    def build():
        device, dim, rows = bench.device, MODELS[model].size.mlp_dim, rows_of(model, bench.device)
        low = low_precision(device)

        def inputs(dtype):
            return [draw((rows, dim), 0, device, dtype or low), draw((dim,), 1, device, dtype or low)]

        def gradients():
            return [draw((rows, dim), 2, device, low)]

        def ours(x, bias):
            return (bias_gelu(x, bias),)

        def plain(x, bias):
            return (F.gelu(x + bias),)

        return fused_case(ours, plain, inputs, gradients, device, 5 * rows * dim * low.itemsize)

    bench(build)


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled"])
def test_bench_column_sum(bench, model, provider):
    """The gradient of the bias of queries, keys and values, the one of a block that no other pass gives for free."""

    def build():
        device, dim = bench.device, 3 * MODELS[model].size.dim
        shape, low = (rows_of(model, device), dim), low_precision(device)

        def plain(x):
            return x.sum(0, dtype=torch.float32)

        def of(function):
            def make():
                x, call = draw(shape, 0, device, low), function()
                return lambda: call(x)

            return Variant(make)

        def check(result):
            x = draw(shape, 0, device, low).double()
            # Values around 0, whose sums are near it: n roundings of 2^-24 of the magnitudes at the most.
            assert_close([result], [x.sum(0)], shape[0] * 2**-24 * float(x.abs().sum(0).max() / x.sum(0).abs().max()))

        providers = {"ours": lambda: column_sum, "eager": lambda: plain, "compiled": lambda: compiled(plain, device)}
        variants = {provider: of(function) for provider, function in providers.items()}
        return Case(variants, {"x": list(shape)}, low, check, nbytes=shape[0] * dim * low.itemsize)

    bench(build)


@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_bench_adamw(bench, model, provider):
    shapes, device = ema_shapes(MODELS[model], bench.device), bench.device

    def tensors(seed: int) -> list[Tensor]:
        return [draw(shape, 8 * i + seed, device, torch.float32) for i, shape in enumerate(shapes)]

    def copies_of(weights: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]

    def make(optimizer_of):
        def build():
            weights, targets = [w.requires_grad_() for w in tensors(0)], tensors(1)
            for w, grad in zip(weights, tensors(2), strict=True):
                w.grad = grad
            step = optimizer_of(weights, targets, copies_of(weights), copies_of(targets))

            def call():
                step()
                return [*weights, *targets]

            return call

        return Variant(build, graph=False)  # both ask the host for what changes from step to step

    def ours(weights, targets, low, target_low):
        copies = dict(zip([*weights, *targets], [*low, *target_low], strict=True))
        of = dict(zip(weights, targets, strict=True))
        optimizer = AdamWEMA(weights, targets=of, copies=copies, lr=LR, weight_decay=DECAY)
        return lambda: optimizer.step(momentum=MOMENTUM)

    def eager(weights, targets, low, target_low):
        optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=DECAY, fused=True)

        def step():
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(targets, weights, 1 - MOMENTUM)
                torch._foreach_copy_(low, weights)
                torch._foreach_copy_(target_low, targets)

        return step

    def check(result):
        """Of the first step, whose moments are the gradient and its square: Adam's step is then the gradient's sign."""
        for i, shape in enumerate(shapes):
            w, t, g = (draw(shape, 8 * i + seed, device, torch.float32).double() for seed in (0, 1, 2))
            w = w * (1 - LR * DECAY) - LR * g / (g.abs() + 1e-8)
            t = MOMENTUM * t + (1 - MOMENTUM) * w
            # the second moment is rounded three times on its way to a step of 1e-3
            assert_close([result[i], result[len(shapes) + i]], [w, t], 1e-6)

    def build():
        elements = sum(shape.numel() for shape in shapes)
        about = {"tensors": len(shapes), "elements": elements}
        # weight, two moments, target: read and written; the gradient; two copies
        nbytes = elements * (8 * 4 + 4 + 2 * 2)
        return Case({"ours": make(ours), "eager": make(eager)}, about, torch.float32, check, nbytes=nbytes)

    bench(build)
