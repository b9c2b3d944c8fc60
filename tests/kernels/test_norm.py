"""add_layer_norm: stream, norm and all gradients against float64 on every path, and what autograd asks of an op."""
import pytest
import torch
from ijepa_kernels import norm
from ijepa_kernels.norm import _backward_op, _forward_op, add_layer_norm, add_layer_norm_ref
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error

EPS = 1e-6
# fp32 from the loaded values on: mean, variance and the sums over D and T are trees, some log2(D) half ulps each, and
# the gradient of x is a difference of three terms of its size. 64 half ulps of the largest entry cover D up to 1408.
RELATIVE = 64 * 2**-24


def inputs(device, rows=5, dim=48, stream=torch.float32, branch=torch.float32, with_bias=True, weights=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(rows, dim, generator=g) + 0.5).to(device, stream)
    added = None if branch is None else torch.randn(rows, dim, generator=g).to(device, branch)
    weight, bias, branch_bias = (torch.randn(dim, generator=g).to(device, weights) + shift for shift in (1, 0, 0))
    tensors = [x, added, weight, bias, branch_bias if with_bias and branch is not None else None]
    return [None if t is None else t.requires_grad_() for t in tensors]


def run(function, tensors, upstream, out_dtype):
    """Results and the gradients of all tensors; `upstream`: which of the two results takes part."""
    x, branch, weight, bias, branch_bias = tensors
    results = function(x, branch, weight, bias, branch_bias=branch_bias, eps=EPS, out_dtype=out_dtype)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).bfloat16() for _ in results]  # exact in every dtype
    total = sum((r * w.to(r)).sum() for r, w, use in zip(results, weights, upstream, strict=True) if use)
    leaves = [t for t in tensors if t is not None]
    return [*results, *torch.autograd.grad(total, leaves, allow_unused=True)]


def assert_matches(tensors, upstream=(True, True), out_dtype=None):
    got = run(add_layer_norm, tensors, upstream, out_dtype)
    doubles = [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    x, branch, *_, branch_bias = doubles
    # The norm is that of the stream as it is stored: the reference rounds at the same place.
    with torch.no_grad():
        if branch is not None:
            total = x + branch if branch_bias is None else x + branch + branch_bias
            branch += got[0].detach().cpu().double() - total
            rounding = store_error(tensors[0].dtype) + 2**-23
            torch.testing.assert_close(got[0].cpu().double(), total, rtol=rounding, atol=4 * 2**-24)
    want = run(add_layer_norm_ref, doubles, upstream, torch.float64)
    leaves = [t for t in tensors if t is not None]
    dtypes = [tensors[0].dtype, out_dtype or tensors[0].dtype, *(t.dtype for t in leaves)]
    for a, b, dtype in zip(got, want, dtypes, strict=True):
        if b is None:  # as autograd says it: nothing of it was used
            assert a is None or not a.any()
            continue
        assert (a.dtype, a.shape) == (dtype, b.shape)
        atol = RELATIVE * float(b.detach().abs().max())
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=store_error(dtype), atol=atol)


@pytest.mark.parametrize("dim", [8, 63, 192, 384, 1280, 1408])
def test_every_width_matches_float64(device, dim):
    assert_matches(inputs(device, dim=dim))


@pytest.mark.slow
def test_the_widest_rows_match_float64(device):
    assert_matches(inputs(device, dim=6144))
    assert_matches(inputs(device, dim=8200, rows=2))  # beyond what a program holds


B, F, H = torch.bfloat16, torch.float32, torch.float16


@pytest.mark.parametrize(
    ("stream", "branch", "out", "weights"),
    [(F, B, B, F), (B, B, B, F), (F, B, F, B), (H, H, H, F), (B, F, F, F), (F, None, B, F), (B, None, B, F)],
)
def test_every_dtype_matches_float64_on_the_same_values(device, stream, branch, out, weights):
    upstream = branch is not None, True  # without a branch x_new is x: autograd adds the two gradients, not the op
    assert_matches(inputs(device, stream=stream, branch=branch, weights=weights), upstream, out)


@pytest.mark.parametrize("upstream", [(True, False), (False, True)])
@pytest.mark.parametrize("change", [{}, {"with_bias": False}, {"branch": None}])
def test_one_result_alone_has_its_gradient(device, upstream, change):
    assert_matches(inputs(device, **change), upstream)


def test_more_rows_than_programs(device, monkeypatch):
    """Each program of the backward then sums several tiles of rows, the last one in part."""
    monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 2)
    assert_matches(inputs(device, rows=21))


def test_no_rows(device):
    tensors = inputs(device, rows=0)
    new, normed = add_layer_norm(*tensors[:4], branch_bias=tensors[4], eps=EPS)
    (new.sum() + normed.sum()).backward()
    assert new.shape == normed.shape == (0, 48)
    assert all(not t.grad.any() for t in tensors)


def test_strided_inputs_and_expanded_gradients(device):
    x, branch, weight, bias, _ = (t.detach() for t in inputs(device))
    strided = [x.t().contiguous().t(), branch.repeat(1, 2)[:, 48:], *(v.repeat(2)[::2] for v in (weight, bias))]
    assert_matches([t.requires_grad_() for t in strided] + [None])
    tensors = inputs(device, with_bias=False)
    new, normed = add_layer_norm(*tensors[:4], eps=EPS)
    (got,) = torch.autograd.grad(new.sum() + normed.sum(), tensors[2], retain_graph=True)
    ones = torch.ones(5, 48, device=device)
    (want,) = torch.autograd.grad((new, normed), tensors[2], (ones, ones))
    assert torch.equal(got, want)


def test_writes_only_its_outputs(kernel_device, monkeypatch):
    with guarded_outputs(monkeypatch):
        assert_matches(inputs(kernel_device, dim=63), out_dtype=F)


def test_two_runs_are_bitwise_equal(reproducible_device):
    tensors = inputs(reproducible_device, rows=21, branch=B)
    first, second = (run(add_layer_norm, tensors, (True, True), B) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_on_a_cpu_it_is_bitwise_what_pytorch_computes(monkeypatch):
    """So that no run there is another one since the addition and the norm are one op."""
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    for branch in (F, None):
        tensors = inputs("cpu", rows=50, dim=96, branch=branch, with_bias=False)
        for a, b in zip(*(run(f, tensors, (True, True), F) for f in (add_layer_norm, add_layer_norm_ref)), strict=True):
            assert torch.equal(a, b)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    x, branch, weight, bias, branch_bias = (t.detach().double().requires_grad_() for t in inputs("cpu", 3, 5))

    def function(x, weight, bias, *branch):
        added, of_branch = (*branch, None, None)[:2]
        return add_layer_norm(x, added, weight, bias, branch_bias=of_branch, eps=1e-3)

    assert torch.autograd.gradcheck(function, (x, weight, bias, branch, branch_bias))
    assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("branch", [B, None])
def test_opcheck(device, branch):
    x, added, weight, bias, branch_bias = inputs(device, branch=branch)
    torch.library.opcheck(_forward_op, (x, added, branch_bias, weight, bias, EPS, B))
    with torch.no_grad():
        new, normed, mean, rstd = _forward_op(x, added, branch_bias, weight, bias, EPS, B)
    grad = None if added is None else torch.ones_like(new)
    new = x.detach() if added is None else new
    dtype = None if added is None else B
    arguments = grad, torch.ones_like(normed), new, mean, rstd, weight.detach(), dtype, branch_bias is not None
    torch.library.opcheck(_backward_op, arguments)


def test_under_a_dispatch_mode_it_is_the_registered_op(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    tensors = inputs(device, branch=B)
    eager = run(add_layer_norm, tensors, (True, True), B)
    with Record():
        registered = run(add_layer_norm, tensors, (True, True), B)
    assert {_forward_op, _backward_op} <= set(seen)
    assert all(torch.equal(a, b) for a, b in zip(eager, registered, strict=True))


def test_compiles_to_one_graph_over_changing_numbers_of_rows(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")

    def step(x, branch, weight, bias):
        new, normed = add_layer_norm(x * 2, branch, weight, bias, eps=EPS)
        return new + normed

    assert_compiles_once(step, [inputs("cpu", rows=rows, with_bias=False)[:4] for rows in (7, 11, 5)])


X, ROW = torch.zeros(3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"x: want a .* \[T, D\] tensor, got float32 \[8\]", dict(x=ROW)),
        (r"branch: want a floating tensor of x's shape .*, got float32 \[8\]", dict(branch=ROW)),
        (r"branch: want .*, got int64", dict(branch=X.long())),
        (r"weight: want a .* \[8\] tensor on cpu, got float32 \[7\]", dict(weight=ROW[1:])),
        (r"bias: want a .* \[8\] tensor", dict(bias=None)),
        (r"branch_bias: want a .* \[8\] tensor", dict(branch_bias=X)),
        (r"branch_bias: want None where branch is None", dict(branch=None, branch_bias=ROW)),
        (r"eps: want a number >= 0, got -1", dict(eps=-1)),
        (r"out_dtype: want a floating dtype, got torch.int8", dict(out_dtype=torch.int8)),
    ],
)
def test_bad_input(match, change):
    arguments = dict(x=X, branch=X, weight=ROW, bias=ROW, eps=EPS) | change
    with pytest.raises(ValueError, match=match):
        add_layer_norm(**arguments)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    tensors = inputs("cuda", branch=B)
    run(add_layer_norm, tensors, (True, True), B)
    with forbidden_sync():
        new, normed = add_layer_norm(*tensors[:4], branch_bias=tensors[4], eps=EPS, out_dtype=B)
        (new.sum() + normed.sum()).backward()
