"""AdamWEMA: the kernel against PyTorch's AdamW, an average and casts, and its state against AdamW's."""
import copy

import pytest
import torch
from ijepa_kernels import AdamWEMA, adamw_tables
from op_proofs import forbidden_sync, store_error

B, F = torch.bfloat16, torch.float32
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
# An update is some ten roundings of fp32 beside 2^-24 of the weight; where the two orders of arithmetic differ, a
# thousand of them add up as a random walk, or at worst linearly: 1,000 * 2^-24 of weights of order 1.
STEP = 4 * 2**-24


def weights(device, sizes=((70, 32), (33,), (5, 7), (0,))):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g).to(device).requires_grad_() for size in sizes]


def set_gradients(tensors, step, dtype=F):
    g = torch.Generator().manual_seed(step)
    for p in tensors:
        grad = torch.randn(p.shape, generator=g).to(p.device, p.dtype) * 0.1 + p.detach() * 0.01
        p.grad = grad.to(F if p.dtype == torch.float64 else dtype).to(p.dtype)


def groups(tensors):
    return [{"params": tensors[::2], "weight_decay": 0.1}, {"params": tensors[1::2], "weight_decay": 0.0}]


def build(device, targets=True, copies=True):
    """An optimizer of four weights, the first two with targets, all with copies."""
    ws = weights(device)
    ts = {p: p.detach().clone() * 0.5 for p in ws[:2]} if targets else {}
    low = {t: torch.full_like(t, 7, dtype=B, requires_grad=False) for t in (*ws, *ts.values())} if copies else {}
    return AdamWEMA(groups(ws), targets=ts, copies=low, **OPTIONS), ws, ts, low


def run(device, steps, **options):
    optimizer, ws, ts, low = build(device, **options)
    for step in range(steps):
        set_gradients(ws, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step / 10)
        optimizer.step(momentum=0.9 + 0.001 * (step % 50))
    return optimizer, ws, ts, low


def reference(steps):
    """Weights and targets by torch's own AdamW in float64 and the formula of the average."""
    ws = [w.detach().double().requires_grad_() for w in weights("cpu")]
    ts = [w.detach().clone() * 0.5 for w in ws[:2]]
    optimizer = torch.optim.AdamW(groups(ws), **OPTIONS)
    for step in range(steps):
        set_gradients(ws, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step / 10)
        optimizer.step()
        for t, w in zip(ts, ws[:2], strict=True):
            t.lerp_(w.detach(), 1 - (0.9 + 0.001 * (step % 50)))
    return ws, ts


def assert_follows(device, steps):
    optimizer, ws, ts, low = run(device, steps)
    want_ws, want_ts = reference(steps)
    for got, want in zip([*ws, *ts.values()], [*want_ws, *want_ts], strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=0, atol=steps * STEP)
        rounding = store_error(B)
        torch.testing.assert_close(low[got].float(), got.detach(), rtol=rounding, atol=2**-126)
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(steps)}


def test_ten_steps_are_adamw_and_an_average(device):
    assert_follows(device, 10)


@pytest.mark.slow
def test_a_thousand_steps_are_adamw_and_an_average(device):
    assert_follows(device, 1000)


@pytest.mark.parametrize("options", [dict(targets=False), dict(copies=False), dict(targets=False, copies=False)])
def test_without_targets_or_copies_the_weights_are_the_same(device, options):
    for got, want in zip(run(device, 2, **options)[1], run(device, 2)[1], strict=True):
        assert torch.equal(got, want)


def test_gradients_in_bf16_and_at_odd_addresses(kernel_device):
    results = []
    for dtype, offset in ((F, 0), (B, 0), (F, 1)):
        optimizer, ws, *_ = build(kernel_device)
        set_gradients(ws, 0, B)
        for p in ws:
            values, p.grad = p.grad.to(dtype), None
            buffer = torch.full((p.numel() + 16,), float("nan"), dtype=dtype, device=p.device)
            p.grad_dtype = dtype
            p.grad = buffer[offset : offset + p.numel()].view(p.shape)
            p.grad.copy_(values)
        optimizer.step(momentum=0.5)
        results.append([p.detach() for p in ws])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_writes_only_its_tensors(kernel_device):
    """Guard bands around everything that a step writes stay as they were; the last tensor's chunk is cut."""
    optimizer, ws, ts, low = build(kernel_device)
    set_gradients(ws, 0)
    optimizer.step(momentum=0.5)
    bands = []
    for tensors in (ws, ts.values(), low.values(), *([s[n] for s in optimizer.state.values()] for n in
                                                     ("exp_avg", "exp_avg_sq"))):
        for x in tensors:
            buffer = torch.full((x.numel() + 128,), 77.0, dtype=x.dtype, device=x.device)
            buffer[64 : 64 + x.numel()] = x.detach().flatten()
            x.data = buffer[64 : 64 + x.numel()].view(x.shape)
            bands += [buffer[:64], buffer[64 + x.numel() :]]
    before = [p.detach().clone() for p in ws]
    optimizer.step(momentum=0.5)
    assert all((band == 77).all() for band in bands)
    assert not any(torch.equal(a, b) for a, b in zip(before, ws, strict=True) if a.numel())


def test_two_runs_are_bitwise_equal(device):
    first, second = (run(device, 2) for _ in range(2))
    for a, b in zip([*first[1], *first[2].values()], [*second[1], *second[2].values()], strict=True):
        assert torch.equal(a, b)


def test_autograd_and_copies_see_that_weights_changed(device):
    optimizer, ws, ts, low = build(device)
    before = [x._version for x in (*ws, *ts.values(), *low.values()) if x.numel()]
    set_gradients(ws, 0)
    optimizer.step(momentum=0.5)
    after = [x._version for x in (*ws, *ts.values(), *low.values()) if x.numel()]
    assert all(a < b for a, b in zip(before, after, strict=True))


def test_its_state_goes_to_adamw_and_back(device):
    optimizer, ws, *_ = run(device, 3)
    plain_ws = [w.detach().clone().requires_grad_() for w in ws]
    plain = torch.optim.AdamW(groups(plain_ws), **OPTIONS, fused=True)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two would share moments
    again, again_ws, *_ = build(device, targets=False)
    with torch.no_grad():
        for a, w in zip(again_ws, ws, strict=True):
            a.copy_(w)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    for tensors, opt in ((ws, optimizer), (plain_ws, plain), (again_ws, again)):
        set_gradients(tensors, 3)
        opt.step()
    for opt in (optimizer, plain, again):  # each weight has a number of its own, whatever memory it lies in
        assert [float(state["step"]) for state in opt.state.values()] == [4.0] * 4
        assert {(state["step"].shape, state["step"].dtype) for state in opt.state.values()} == {(torch.Size(), F)}
    for a, b, c in zip(ws, plain_ws, again_ws, strict=True):
        assert torch.equal(a, c)  # resumed as if it had never stopped
        torch.testing.assert_close(a, b, rtol=0, atol=STEP)
    assert plain.state_dict().keys() == optimizer.state_dict().keys()


def test_a_parameter_without_a_gradient_is_left_alone(device):
    optimizer, ws, *_ = build(device)
    set_gradients(ws, 0)
    ws[0].grad = None
    before = [w.detach().clone() for w in ws]
    optimizer.step(momentum=0.5)
    assert torch.equal(ws[0], before[0])
    assert not torch.equal(ws[1], before[1])


W = torch.zeros(4, requires_grad=True)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"targets: want parameters as keys, got float32 \[4\]", dict(targets={torch.zeros(4): torch.zeros(4)})),
        (r"targets: want a tensor of its parameter's shape .*, got float32 \[3\]", dict(targets={W: torch.zeros(3)})),
        (r"targets: .*, got bfloat16 \[4\]", dict(targets={W: torch.zeros(4, dtype=B)})),
        (r"copies: want a tensor .*, got int8 \[4\]", dict(copies={W: torch.zeros(4, dtype=torch.int8)})),
    ],
)
def test_bad_input(match, options):
    with pytest.raises(ValueError, match=match):
        AdamWEMA([W], **options)
    with pytest.raises(ValueError, match=r"momentum: want a number in \[0, 1\], got 1.5"):
        AdamWEMA([W]).step(momentum=1.5)


def test_under_a_gradient_scaler(device):
    """Gradients a power of two larger lose nothing; a step with an infinite one is left out."""
    optimizer, ws, ts, _ = build(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for step in (0, 1):
        set_gradients(ws, step)
        for p in ws:
            p.grad *= 1024
        if step:
            ws[0].grad[3, 5] = float("inf")
        scaler.scale(torch.zeros((), device=device))  # as of the loss: the scaler makes its tensors here
        scaler.step(optimizer, momentum=0.9)
        scaler.update()
    plain, wanted, wanted_ts, _ = build(device)
    set_gradients(wanted, 0)
    plain.step(momentum=0.9)
    for got, want in zip([*ws, *ts.values()], [*wanted, *wanted_ts.values()], strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    optimizer, ws, *_ = build("cuda")
    for step in range(2):
        set_gradients(ws, step)
        if step == 0:
            optimizer.step(momentum=0.5)  # makes its tables
    finite, scale = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    with forbidden_sync():
        optimizer.step(momentum=0.5)
        optimizer.step(momentum=0.5, finite=finite, grad_scale=scale)


def test_the_table_is_made_once(kernel_device, monkeypatch):
    made, make = [], AdamWEMA._make_tables
    monkeypatch.setattr(AdamWEMA, "_make_tables", lambda *args: made.append(1) or make(*args))
    optimizer, *_ = run(kernel_device, 3)
    assert made == [1]
    launches = optimizer._tables.launches
    assert [len(launch.table) for launch in launches] == [4, 1]  # with a target, without; none for the empty weight
    assert launches[0].table.shape[1] == adamw_tables.FIELDS
    assert launches[0].table[:, 9].tolist() == [0, 0, 0, 1]  # both groups in one launch
