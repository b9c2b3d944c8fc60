"""AdamWEMA with copies of targets in e4m3: the bits of an update without them, and of `quantize_rows` after it."""
import math

import pytest
import torch
from ijepa_kernels import AdamWEMA, Quantized, adamw_begin, adamw_kernels, fp8, quantize_rows
from test_adamw import OPTIONS, B, F
from test_adamw_steps import NoOperator, Recorder, move

GUARD = 32


class Guarded:
    """Makes tensors `offset` elements off their alignment, with memory on both sides that nobody may write."""

    def __init__(self, device, offset):
        self.device, self.offset, self.bands = device, offset, []

    def __call__(self, values, dtype):
        start, stop = GUARD + self.offset, GUARD + self.offset + values.numel()
        buffer = torch.full((stop + GUARD,), 77.0, device=self.device).to(dtype)
        buffer[start:stop] = values.flatten().to(self.device, dtype)
        self.bands += [buffer[:start], buffer[stop:]]
        return buffer[start:stop].view(values.shape)

    def unharmed(self):
        return all((band.float() == torch.tensor(77.0).to(band.dtype).item()).all() for band in self.bands)


def drawn(shape, seed):
    """Rows of different sizes, the last one of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim == 2:
        x *= torch.logspace(-3, 1, len(x))[:, None]
        x[-1] = 0
    return x


class Built:
    """An optimizer of weights of these shapes with targets. Those of two dimensions have a copy of their target in
    e4m3, made by the update, or with `two_passes` by `quantize_rows` after it."""

    def __init__(self, device, shapes, grad=F, copies=True, offset=0, two_passes=False):
        self.make, self.grad, self.two_passes = Guarded(device, offset), grad, two_passes
        self.ws = [self.make(drawn(shape, i), F).requires_grad_() for i, shape in enumerate(shapes)]
        self.ts = [self.make(0.5 * w.detach(), F) for w in self.ws]
        self.low = {w: self.make(torch.full(w.shape, 7.0), B) for w in self.ws} if copies else {}
        self.rounded = {}
        for t in self.ts:
            if t.ndim == 2:
                values, scale = (torch.full((fp8.padded_rows(t), n), 7.0) for n in (t.shape[1], 1))
                self.rounded[t] = Quantized(self.make(values, fp8.E4M3), self.make(scale, F), len(t))
            elif copies:
                self.low[t] = self.make(torch.full(t.shape, 7.0), B)
        written = self.low if two_passes else self.low | self.rounded
        targets = dict(zip(self.ws, self.ts, strict=True))
        self.optimizer = AdamWEMA(self.ws, targets=targets, copies=written, weight_decay=0.1, **OPTIONS)

    def set_gradients(self, number):
        for i, w in enumerate(self.ws):
            w.grad_dtype = self.grad
            w.grad = self.make(0.1 * drawn(w.shape, 100 + 10 * number + i), self.grad)

    def step(self, number, **options):
        self.set_gradients(number)
        self.optimizer.step(momentum=0.9, **options)
        if self.two_passes:
            for t, low in self.rounded.items():
                quantize_rows(t, low)

    def bits(self):
        tensors = [*self.ws, *self.ts, *self.low.values()]
        for name in ("exp_avg", "exp_avg_sq"):
            tensors += [state[name] for state in self.optimizer.state.values()]
        tensors += [x[: low.rows] for low in self.rounded.values() for x in low[:2]]
        assert self.make.unharmed()
        return [x.detach().flatten().view(torch.uint8).clone() for x in tensors]


def assert_same_bits(built, other):
    for i, (a, b) in enumerate(zip(built, other, strict=True)):
        assert torch.equal(a, b), i


# Rows of whole programs and a few more, whole programs alone, fewer than a program's; and a width that no model has.
SHAPES = [(35, 192), (16, 384), (5, 1280), (9, 1408), (2, 5120), (3, 1280), (7, 20)]


def assert_as_two_passes(device, shape, **options):
    one, two = (Built(device, [shape], two_passes=two_passes, **options) for two_passes in (False, True))
    for number in range(2):
        one.step(number)
        two.step(number)
        assert_same_bits(one.bits(), two.bits())
    (low,) = one.rounded.values()
    assert (low.values[: low.rows - 1].float().abs().amax(1) == 448).all()
    assert not low.values[low.rows - 1].float().any()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *((shape, {}) for shape in SHAPES),
        *((shape, dict(offset=1)) for shape in ((16, 192), (9, 1408), (2, 5120))),
        *((shape, dict(copies=False)) for shape in ((35, 192), (5, 1280))),
    ],
)
def test_the_bits_are_those_of_two_passes(device, shape, options):
    assert_as_two_passes(device, shape, **options)


@pytest.mark.parametrize("shape", [(9, 384), (5, 1280)])
@pytest.mark.parametrize("options", [{}, dict(copies=False, offset=3)])
def test_and_so_they_are_with_gradients_in_bf16(kernel_device, shape, options):
    assert_as_two_passes(kernel_device, shape, grad=B, **options)


MIXED = [(4, 1280), (6, 192), (33,), (3, 1280), (3, 192), (1, 5120)]


def test_a_launch_for_each_width(kernel_device):
    one, two = (Built(kernel_device, MIXED, two_passes=two_passes) for two_passes in (False, True))
    for number in range(2):
        one.step(number)
        two.step(number)
    assert_same_bits(one.bits(), two.bits())
    tables = one.optimizer._tables
    assert [launch.constexprs.get("DIM") for launch in tables.launches] == [1280, 192, None, 5120]
    assert [len(launch.table) for launch in tables.launches] == [2, 2, 1, 1]
    assert [launch.constexprs.get("BLOCK") for launch in tables.launches] == [256, 64, None, 1024]
    buffers = tables.buffers()
    assert all(any(launch.table is x for x in buffers) for launch in tables.launches)


@pytest.mark.parametrize("options", [{}, dict(offset=1)])
def test_a_step_that_is_skipped_changes_nothing(device, options):
    one, two = (Built(device, [(17, 192), (33,)], two_passes=two_passes, **options) for two_passes in (False, True))
    one.step(0)
    before = one.bits()
    one.step(1, finite=torch.tensor(math.nan, device=device))
    assert_same_bits(one.bits(), before)
    assert one.optimizer.skipped == 1
    for number in (0, 2):
        two.step(number)
    one.step(2)
    assert_same_bits(one.bits(), two.bits())


def test_the_first_step_may_be_skipped(device):
    one = Built(device, [(17, 192)])
    before = one.bits()[:2]
    one.step(0, finite=torch.tensor(False, device=device))
    assert_same_bits(one.bits()[:2], before)
    (low,) = one.rounded.values()
    assert all((x.float() == 7).all() for x in low[:2])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_rounded_as_ever(device, bad):
    one, two = (Built(device, [(17, 192)], two_passes=two_passes) for two_passes in (False, True))
    for built in (one, two):
        with torch.no_grad():
            built.ts[0][0, 3] = built.ts[0][16, 100] = bad
        built.step(0)
    (low,) = one.rounded.values()
    assert low.dequantized()[0, 3].isnan()
    assert low.dequantized()[16, 100].isnan()
    assert low.dequantized()[1:16].isfinite().all()
    assert_same_bits(one.bits()[-2:], two.bits()[-2:])


def test_without_a_gradient_all_are_rounded_all_the_same(kernel_device):
    """An update without our kernel: the targets move, whether or not their weights do."""
    one, two = (Built(kernel_device, MIXED, two_passes=two_passes) for two_passes in (False, True))
    for built in (one, two):
        built.set_gradients(0)
        built.ws[0].grad = None
    before = [x._version for low in one.rounded.values() for x in low[:2]]
    for built in (one, two):
        built.optimizer.step(momentum=0.9)
    for t, low in two.rounded.items():
        quantize_rows(t, low)
    assert one.optimizer._tables is None
    rounded = 2 * len(one.rounded)
    assert_same_bits(one.bits()[-rounded:], two.bits()[-rounded:])
    after = [x._version for low in one.rounded.values() for x in low[:2]]
    assert all(a < b for a, b in zip(before, after, strict=True))


def test_autograd_sees_that_they_changed(device):
    one = Built(device, [(17, 192)])
    (low,) = one.rounded.values()
    before = [x._version for x in low[:2]]
    one.step(0)
    assert all(x._version > was for x, was in zip(low[:2], before, strict=True))


@pytest.mark.parametrize("name", ["values", "scale", "replaced"])
def test_what_moved_is_found_at_its_new_address(kernel_device, name):
    one, two = (Built(kernel_device, [(17, 192)], two_passes=two_passes) for two_passes in (False, True))
    one.step(0)
    two.step(0)
    (target, low), layout = next(iter(one.rounded.items())), one.optimizer.layout
    if name == "replaced":
        old, new = [*low[:2]], quantize_rows(target)
        one.optimizer.copies[target] = one.rounded[target] = new
    else:
        old = [move(getattr(low, name))]
    was = [x.clone() for x in old]
    one.step(1)
    two.step(1)
    assert one.optimizer.layout == layout + 1
    assert_same_bits(one.bits(), two.bits())
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(old, was, strict=True))


def test_apply_is_launches_alone_that_may_be_repeated(kernel_device, monkeypatch):
    """What a CUDA graph would hold, replayed with other gradients, once skipped."""
    one, two = (Built(kernel_device, [(17, 192), (33,)], two_passes=two_passes) for two_passes in (False, True))
    one.step(0)
    two.step(0)
    finite, launches = torch.ones((), device=kernel_device), []
    for number in range(1, 4):
        one.set_gradients(number)
        one.optimizer.prepare(0.9)
        finite.fill_(math.inf if number == 2 else 1)
        if not launches:
            with monkeypatch.context() as patch, NoOperator():
                for module, name in ((adamw_begin, "_begin_kernel"), (adamw_kernels, "_adamw_ema_kernel"),
                                     (adamw_kernels, "_adamw_ema_rows_kernel")):
                    patch.setattr(module, name, Recorder(getattr(module, name), launches))
                one.optimizer.apply(finite=finite)
        for kernel, grid, args, options in launches:
            kernel[grid](*args, **options)
        two.step(number, finite=finite)
    assert len(launches) == 3
    assert_same_bits(one.bits(), two.bits())


@pytest.mark.gpu
def test_a_cuda_graph_holds_it():
    one, two = (Built("cuda", [(512, 1280), (100, 1408), (33,)], two_passes=two_passes) for two_passes in (False, True))
    one.step(0)
    two.step(0)
    one.set_gradients(1)
    one.optimizer.prepare(0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.optimizer.apply()
    for number in range(1, 4):
        one.set_gradients(number)
        one.optimizer.prepare(0.9)
        graph.replay()
        two.step(number)
    assert_same_bits(one.bits(), two.bits())


def sharded(x):
    x.to_local = lambda: x
    return x


W, T = torch.zeros(4, 16, requires_grad=True), torch.zeros(4, 16)
LOW = quantize_rows(T)


@pytest.mark.parametrize(
    ("match", "targets", "copies"),
    [
        (r"alone, got one for the trained float32 \[4, 16\]", {W: T}, {W: LOW}),
        (r"alone, got one for the target float32 \[4, 4, 4\]", {W.view(4, 4, 4): T.view(4, 4, 4)}, LOW),
        (r"alone, got one for the sharded float32 \[4, 16\]", {W: sharded(T.clone())}, LOW),
        (r"of its target, float32 \[4, 16\] on cpu, got 3 rows of float8_e4m3fn \[4", {W: T}, LOW._replace(rows=3)),
        (r"got 4 rows of float8_e4m3fn \[4, 8\]", {W: T}, quantize_rows(T[:, :8])),
        (r"got 4 rows of bfloat16 \[4, 16\]", {W: T}, LOW._replace(values=T.bfloat16())),
        (r"got 4 rows of .* with scales float64 \[4, 1\]", {W: T}, LOW._replace(scale=LOW.scale.double())),
        (r"got 4 rows of .* with scales float32 \[4\]", {W: T}, LOW._replace(scale=LOW.scale[:, 0])),
        (r"got 4 rows of float8_e4m3fn \[4, 16\] on meta", {W: T}, LOW._replace(values=LOW.values.to("meta"))),
    ],
)
def test_bad_input(match, targets, copies):
    (weight, target), *_ = targets.items()
    weight = weight.detach().requires_grad_() if weight is not W else W
    copies = {target: copies} if isinstance(copies, Quantized) else copies
    with pytest.raises(ValueError, match=r"copies: want a Quantized .*" + match):
        AdamWEMA([weight], targets={weight: target}, copies=copies)


def test_gaps_are_refused(kernel_device):
    w = torch.zeros(4, 16, device=kernel_device, requires_grad=True)
    target = torch.zeros(4, 16, device=kernel_device)
    low = quantize_rows(target)
    wide = torch.zeros(len(low.values), 32, device=kernel_device).to(fp8.E4M3)[:, :16]
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match="params: want contiguous tensors, targets and copies"):
        AdamWEMA([w], targets={w: target}, copies={target: low._replace(values=wide)}).step()
