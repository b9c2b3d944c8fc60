"""AdamWEMA between steps: what is skipped and scaled on the device, what moved in memory, and the halves of a step."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from ijepa_kernels import AdamWEMA, adamw, adamw_begin, adamw_kernels, adamw_tables
from test_adamw import B, F, build, run, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode


def everything(optimizer, ws, ts, low):
    """All that a step may change, by name."""
    found = {"w": ws, "target": list(ts.values()), "copy": list(low.values())}
    for name in ("exp_avg", "exp_avg_sq", "step"):
        found[name] = [state[name] for state in optimizer.state.values()]
    return found


def values(built):
    return {name: [x.detach().clone() for x in xs] for name, xs in everything(*built).items()}


def assert_same_bits(built, other):
    for name, tensors in everything(*built).items():
        for got, want in zip(tensors, other[name], strict=True):
            assert torch.equal(got.detach(), want), name


def step(built, number, **options):
    set_gradients(built[1], number)
    built[0].step(momentum=0.9, **options)


BAD = [(math.nan, F), (math.inf, F), (-math.inf, B), (math.nan, torch.float64), (False, torch.bool)]


@pytest.mark.parametrize(("value", "dtype"), BAD)
def test_a_step_that_is_not_finite_changes_nothing(device, value, dtype):
    built, twin = build(device), build(device)
    for one in (built, twin):
        step(one, 0)
    before = values(built)
    step(built, 1, finite=torch.tensor(value, dtype=dtype, device=device))
    assert_same_bits(built, before)
    good = torch.tensor(3e38 if dtype == F else True, dtype=dtype, device=device)  # as large as they come is finite
    for one in (built, twin):
        step(one, 2, finite=good)  # the second update, by its corrections too
    assert_same_bits(built, values(twin))
    assert [float(x) for x in everything(*built)["step"]] == [2.0] * 4
    assert (built[0].skipped.item(), twin[0].skipped.item()) == (1, 0)
    assert built[0].skipped.shape == ()


def test_the_first_step_may_be_skipped(device):
    built = build(device)
    weights = [w.detach().clone() for w in built[1]]
    step(built, 0, finite=torch.tensor(False, device=device))
    assert all(torch.equal(a, b) for a, b in zip(weights, built[1], strict=True))
    # There is a state to save, as after any step: without one a checkpoint would make it by a step of its own.
    with_gradient = [w for w in built[1] if w.grad is not None]
    assert [float(built[0].state[w]["step"]) for w in with_gradient] == [0.0] * len(with_gradient)
    assert not any(built[0].state[w][name].any() for w in with_gradient for name in ("exp_avg", "exp_avg_sq"))
    step(built, 1)
    twin = build(device)
    step(twin, 1)
    assert_same_bits(built, values(twin))


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_gradients_are_scaled_on_their_way(device, scale):
    """By a power of two, so that the product is exact and no compiler's fused multiply-add can show."""
    built, twin = build(device), build(device)
    for number in range(2):
        set_gradients(built[1], number)
        set_gradients(twin[1], number)
        for p in twin[1]:
            p.grad *= scale
        before = [(p.grad, p.grad.clone()) for p in built[1]]
        built[0].step(momentum=0.9, grad_scale=torch.tensor(scale, device=device))
        twin[0].step(momentum=0.9)
        for p, (grad, was) in zip(built[1], before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, was)
    assert_same_bits(built, values(twin))


def test_rates_are_what_double_arithmetic_makes_of_them(kernel_device):
    """Of more groups than the kernel takes at once, and of more weights."""
    groups, weights = adamw_begin.LANES + 1, adamw_begin.BLOCK + 3
    options = [dict(lr=1e-3 * (i + 1), betas=(0.9, 0.999 - i * 1e-3), eps=1e-8, weight_decay=0.1 * i)
               for i in range(groups)]
    for done in (0, 1, 9, 999, 10**6):
        tables = SimpleNamespace(
            given=torch.zeros(groups, adamw_tables.GIVEN, dtype=torch.float64, device=kernel_device),
            rates=torch.zeros(groups, adamw_tables.RATES, device=kernel_device),
            steps=torch.full((weights,), float(done), device=kernel_device),
        )
        adamw_tables.upload(adamw_begin.rates_of(options, 0.996), tables.given)
        skipped = torch.zeros((), dtype=torch.int64, device=kernel_device)
        adamw_begin.begin(tables, None, torch.tensor(0.3, device=kernel_device), skipped)
        assert (tables.steps == done + 1).all()
        for got, o in zip(tables.rates.tolist(), options, strict=True):
            (beta1, beta2), t = o["betas"], done + 1
            step_size, correction = o["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)
            want = [1 - o["lr"] * o["weight_decay"], 1 - beta1, beta2, 1 - beta2, 1e-8, 1 - 0.996, step_size]
            assert got[:10] == pytest.approx([*want, correction, 0.3, 1.0], rel=1.001 * 2**-24, abs=0)  # one rounding


def move(x):
    """Give a tensor other memory; the old is kept, and must not be touched again."""
    old = x.data
    x.data = old.clone()
    return old


@pytest.mark.parametrize("name", ["w", "exp_avg", "exp_avg_sq", "target", "copy"])
def test_what_moved_is_found_at_its_new_address(kernel_device, name):
    built, twin = build(kernel_device), build(kernel_device)
    for one in (built, twin):
        step(one, 0)
    layout = built[0].layout
    left = [move(x) for x in everything(*built)[name]]
    before = [x.clone() for x in left]
    for one in (built, twin):
        step(one, 1)
    assert built[0].layout == layout + 1
    assert_same_bits(built, values(twin))
    assert all(torch.equal(a, b) for a, b in zip(left, before, strict=True))
    step(built, 2)
    assert built[0].layout == layout + 1


def replaced(built, name):
    optimizer, ws, _ts, _low = built
    if name in ("targets", "copies"):
        pairs = getattr(optimizer, name)
        pairs[ws[0]] = pairs[ws[0]].clone()
        return pairs[ws[0]]
    if name == "state":
        optimizer.state[ws[0]]["exp_avg"] = optimizer.state[ws[0]]["exp_avg"].clone()
        return optimizer.state[ws[0]]["exp_avg"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer.state[ws[0]]["exp_avg"]


@pytest.mark.parametrize("name", ["targets", "copies", "state", "load_state_dict"])
def test_what_was_replaced_is_found(kernel_device, name):
    """The old tensor lives on at its address, in other hands."""
    built = build(kernel_device)
    step(built, 0)
    old = {"targets": built[0].targets, "copies": built[0].copies}.get(name, {}).get(built[1][0])
    old = built[0].state[built[1][0]]["exp_avg"] if old is None else old
    was = old.clone()
    new = replaced(built, name)
    assert torch.equal(new, was)
    step(built, 1)
    assert torch.equal(old, was)
    assert not torch.equal(new, was)
    assert {float(x) for x in everything(*built)["step"]} == {2.0}


def test_gradients_are_read_where_they_are(kernel_device, monkeypatch):
    """The host sends the rates at each step, and addresses of gradients when they have moved."""
    sent = []
    upload = adamw_tables.upload
    for module in (adamw, adamw_tables):
        monkeypatch.setattr(module, "upload", lambda what, to: sent.append(len(what)) or upload(what, to))
    built, twin = build(kernel_device), build(kernel_device)
    set_gradients(built[1], 0)
    kept = [p.grad for p in built[1]]
    for number in range(4):
        set_gradients(twin[1], number)
        if number < 3:  # in place
            for grad, p in zip(kept, twin[1], strict=True):
                grad.copy_(p.grad)
        else:
            set_gradients(built[1], number)
        sent.clear()
        built[0].step(momentum=0.9)
        rates = 2 * adamw_tables.GIVEN
        assert sent == ([4, rates] if number in (0, 3) else [rates])
        twin[0].step(momentum=0.9)
    assert_same_bits(built, values(twin))


def test_gradients_with_gaps(kernel_device):
    built, twin = build(kernel_device), build(kernel_device)
    for number in range(2):
        set_gradients(built[1], number)
        set_gradients(twin[1], number)
        p = built[1][0]
        p.grad = p.grad.t().contiguous().t()
        assert not p.grad.is_contiguous()
        built[0].step(momentum=0.9)
        twin[0].step(momentum=0.9)
    assert_same_bits(built, values(twin))


class Recorder:
    """Stands for a kernel, and keeps what it was launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((self.kernel, grid, args, options))

        return launch


class NoOperator(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"apply called {func}")


def recorded(monkeypatch, built, **options):
    launches = []
    with monkeypatch.context() as patch:
        for module, name in ((adamw_begin, "_begin_kernel"), (adamw_kernels, "_adamw_ema_kernel")):
            patch.setattr(module, name, Recorder(getattr(module, name), launches))
        with NoOperator():
            built[0].apply(**options)
    return launches


def assert_replays(built, twin, finite, scale, replay):
    """Four updates, the third of them skipped: `replay` on `built` does what a step does on `twin`."""
    for number in range(1, 5):
        for optimizer, ws, *_ in (built, twin):
            set_gradients(ws, number)
            optimizer.param_groups[1]["lr"] = 0.1 / number
        built[0].prepare(0.5 + 0.1 * number)
        finite.fill_(math.nan if number == 3 else 1)
        scale.fill_(0.5**number)
        replay()
        twin[0].step(momentum=0.5 + 0.1 * number, finite=finite, grad_scale=scale)
    assert built[0].skipped == 1
    assert_same_bits(built, values(twin))


def test_apply_is_launches_alone_that_may_be_repeated(kernel_device, monkeypatch):
    """What a CUDA graph would hold, replayed at other rates, with other gradients, some skipped, some scaled."""
    built, twin = build(kernel_device), build(kernel_device)
    for one in (built, twin):
        step(one, 0)
    finite, scale = torch.ones((), device=kernel_device), torch.ones((), device=kernel_device)
    launches, layout = [], built[0].layout

    def replay():
        launches.extend(() if launches else recorded(monkeypatch, built, finite=finite, grad_scale=scale))
        for kernel, grid, args, options in launches:
            kernel[grid](*args, **options)

    assert_replays(built, twin, finite, scale, replay)
    assert built[0].layout == layout


def test_what_a_capture_asks_for(kernel_device, monkeypatch):
    built = optimizer, ws, *_ = build(kernel_device)
    capturing = []
    monkeypatch.setattr(adamw, "is_capturing", lambda weights: bool(capturing))

    def captured():
        capturing.append(True)
        with pytest.raises(RuntimeError, match="prepare: want it before the capture of a CUDA graph"):
            optimizer.prepare(0.9)
        try:
            optimizer.apply()
        finally:
            capturing.clear()

    def with_gaps():
        ws[0].grad = ws[0].grad.t().contiguous().t()

    step(built, 0)
    with_gaps()
    optimizer.prepare(0.9)
    with pytest.raises(ValueError, match="params: want contiguous gradients where a CUDA graph holds apply"):
        captured()
    set_gradients(ws, 1)
    optimizer.prepare(0.9)
    captured()
    kept = [table for table, *_ in optimizer._tables.launches]
    with_gaps()
    with pytest.raises(ValueError, match="params: want contiguous gradients where a CUDA graph holds apply"):
        optimizer.prepare(0.9)
    for weights_stay in (True, False):  # the tables live while the weights' memory does
        if weights_stay:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            for w in ws:
                move(w)
        set_gradients(ws, 2)
        optimizer.prepare(0.9)
        captured()
        held = [x for _, buffers in optimizer._captured for x in buffers]
        assert any(x is kept[0] for x in held) == weights_stay


@pytest.mark.gpu
def test_a_cuda_graph_holds_apply():
    built, twin = build("cuda"), build("cuda")
    finite, scale = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    for one in (built, twin):
        step(one, 0, finite=finite, grad_scale=scale)  # compiles
    set_gradients(built[1], 1)
    built[0].prepare(0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="prepare: want it before the capture"):
            built[0].prepare(0.9)
        built[0].apply(finite=finite, grad_scale=scale)
    assert_replays(built, twin, finite, scale, graph.replay)


def test_the_halves_are_the_whole(device):
    built = build(device)
    for number in range(2):
        set_gradients(built[1], number)
        for group in built[0].param_groups:
            group["lr"] = 1e-2 / (1 + number / 10)
        built[0].prepare(0.9 + 0.001 * number)
        built[0].apply()
    assert_same_bits(built, values(run(device, 2)))
    with pytest.raises(RuntimeError, match="apply: want a call of prepare before each"):
        built[0].apply()
    built[0].prepare(0.9)
    built[0].load_state_dict(built[0].state_dict())  # whose state is not what was prepared
    with pytest.raises(RuntimeError, match="apply: want a call of prepare before each"):
        built[0].apply()


def test_gradients_live_from_prepare_to_apply(kernel_device):
    built, twin = build(kernel_device), build(kernel_device)
    set_gradients(built[1], 0)
    built[0].prepare(0.9)
    built[0].zero_grad(set_to_none=True)
    others = [torch.full_like(p, 7) for p in built[1]]  # where freed gradients would be
    built[0].apply()
    step(twin, 0)
    assert_same_bits(built, values(twin))
    del others


def test_weights_of_different_counts_are_refused(kernel_device):
    optimizer, ws, *_ = built = build(kernel_device)
    step(built, 0)
    set_gradients(ws, 1)
    ws[0].grad = None
    optimizer.step()  # without the kernel: one number fewer
    assert [float(x) for x in everything(*built)["step"]] == [1.0, 2.0, 2.0, 2.0]
    set_gradients(ws, 2)
    with pytest.raises(ValueError, match=r"state: want one number of steps for all parameters, got \[1, 2\]"):
        optimizer.step()


def test_weights_in_shards(kernel_device, tmp_path):
    """DTensors over one process: their local tensors are what the kernel writes."""
    from torch import distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    backend = "nccl" if kernel_device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh(kernel_device, (1,))
        plain = [torch.arange(8.0, device=kernel_device).reshape(4, 2), torch.ones(3, device=kernel_device)]
        results = []
        for make in (lambda x: x.clone(), lambda x: distribute_tensor(x.clone(), mesh, [Shard(0)])):
            ws = [make(x).requires_grad_() for x in plain]
            targets = {ws[0]: make(plain[0])}
            optimizer = AdamWEMA(ws, targets=targets)
            scale = torch.tensor(0.5, device=kernel_device)
            for number in range(3):
                for w, x in zip(ws, plain, strict=True):
                    w.grad = make(x * 0.1 * (number + 1) + 0.5)
                finite = torch.tensor(math.nan if number == 1 else 1.0, device=kernel_device)
                optimizer.step(momentum=0.5, finite=finite, grad_scale=scale)
            assert optimizer._tables is not None
            results.append([adamw_tables.local(x.detach()) for x in (*ws, *targets.values())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(results[0][0], plain[0])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"finite: want a 0-dim bool or .* tensor on cpu, got float32 \[1\] on cpu", dict(finite=torch.ones(1))),
        (r"finite: want a 0-dim bool .*, got int64 \[\] on cpu", dict(finite=torch.tensor(1))),
        (r"finite: want a 0-dim bool .*, got 1.0", dict(finite=1.0)),
        (r"finite: want .* tensor on cpu, got float32 \[\] on meta", dict(finite=torch.ones((), device="meta"))),
        (r"grad_scale: want a 0-dim float32 tensor on cpu, got bfloat16", dict(grad_scale=torch.ones((), dtype=B))),
    ],
)
def test_bad_input(match, options):
    w = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=match):
        AdamWEMA([w]).step(**options)
