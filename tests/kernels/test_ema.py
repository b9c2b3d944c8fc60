"""ema_update_: against float64 and torch.lerp on every path, over lists of every size, dtype and layout."""
import math
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels import ema
from ijepa_kernels.ema import CHUNK, _update_op, ema_update_, ema_update_ref
from op_proofs import forbidden_sync
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

SIZES = [(1,), (63,), (CHUNK,), (CHUNK + 1,), (0,), (196, 197), (), (2, 3, 5)]


def lists(device, shapes=SIZES, dtypes=(torch.float32, torch.float32), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=g).to(device, dtype) for shape in shapes] for dtype in dtypes]


def clones(tensors):
    return [x.clone() for x in tensors]


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in fp32 numbers between a and b, of one sign."""
    return (a.contiguous().view(torch.int32).long() - b.contiguous().view(torch.int32).long()).abs()


def assert_within_one_ulp_of_lerp(got, target, source, weight):
    """Of the fp32 lerp, as the device's torch computes it; its own operations are fused multiply-adds or not."""
    for x, t, s in zip(got, target, source, strict=True):
        want = t.float().lerp(s.float(), weight)
        # near a zero crossing an ulp of the result is far below one of the operands, which bounds the rounding
        scale = torch.maximum(t.abs(), s.abs()).float() * 2**-23
        assert ((ulps(x, want) <= 1) | ((x - want).abs() <= scale)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.996, 0.9999, 1.0])
def test_within_one_ulp_of_the_fp32_lerp(device, momentum):
    target, source = lists(device)
    before = clones(target)
    ema_update_(target, source, momentum)
    assert_within_one_ulp_of_lerp(target, before, source, 1 - momentum)
    exact = {0.0: source, 1.0: before}.get(momentum, target)
    assert all(torch.equal(a, b) for a, b in zip(target, exact, strict=True))


def test_equal_weights_stay_bit_for_bit(device):
    target, _ = lists(device)
    source = clones(target)
    ema_update_(target, source, 0.996)
    assert all(torch.equal(a, b) for a, b in zip(target, source, strict=True))


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_steps_follow_float64(device, steps, monkeypatch):
    """At momentum 0.9999 an fp32 average stagnates: each step rounds by half an ulp of the target, the average forgets
    by 1 - momentum, so after k steps the error is at most half an ulp * (1 - momentum^k) / (1 - momentum): 4e-4 of the
    largest target after 10,000, never above 2^-24 / 1e-4 = 6e-4.
    """
    momentum = 0.9999
    if os.environ["IJEPA_KERNELS"] == "interpret":
        steps = min(steps, 1_000)  # 3 ms each
    monkeypatch.setattr(ema, "CHUNK", 32)  # the interpreter's cost is by the program and the element
    (target, goal), g = lists(device, [(32,)]), torch.Generator().manual_seed(1)
    exact, largest = target[0].double(), 0.0
    noise = torch.randn(100, 32, generator=g).to(device)
    for step in range(steps):
        source = goal[0] + noise[step % 100]
        before = target[0].clone()
        ema_update_(target, [source], momentum)
        assert_within_one_ulp_of_lerp(target, [before], [source], 1 - momentum)
        exact = momentum * exact + (1 - momentum) * source.double()
        largest = max(largest, exact.abs().max().item())
    error = (target[0].double() - exact).abs().max().item()
    assert error <= 2**-24 * (1 - momentum**steps) / (1 - momentum) * largest
    assert (exact - lists(device, [(32,)])[0][0].double()).abs().max() > 100 * error  # and the average has moved


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_compute_in_fp32(device, target_dtype, source_dtype):
    target, source = lists(device, dtypes=(target_dtype, source_dtype))
    before = clones(target)
    ema_update_(target, source, 0.9)
    for x, t, s in zip(target, before, source, strict=True):
        exact = t.double().lerp(s.double(), 0.1)
        ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[target_dtype]
        # half an ulp of the dtype; a whole one where the interpreter truncates; fp32's own rounding on top
        assert ((x.double() - exact).abs() <= ulp * exact.abs() + 2**-22 * (1 + s.double().abs())).all()


def test_mixed_dtypes_within_one_list(device):
    target, source = lists(device)
    source[1], source[5] = source[1].bfloat16(), source[5].half()
    before = clones(target)
    ema_update_(target, source, 0.9)
    assert_within_one_ulp_of_lerp(target, before, source, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_copies_are_a_rounding_of_the_result(device, request, dtype):
    target, source = lists(device)
    low = [torch.zeros_like(t, dtype=dtype) for t in target]
    ema_update_(target, source, 0.996, low_precision=low)
    truncates = dtype == torch.bfloat16 and "interpret" in request.node.callspec.id  # Triton's interpreter does
    for t, x in zip(target, low, strict=True):
        kept_bits = (t.view(torch.int32) & -0x10000).view(torch.float32)
        assert torch.equal(x, kept_bits.to(dtype) if truncates else t.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_as_a_tensor(device, dtype):
    target, source = lists(device)
    before, momentum = clones(target), torch.tensor(0.996, dtype=dtype, device=device)
    ema_update_(target, source, momentum)
    assert_within_one_ulp_of_lerp(target, before, source, (1 - momentum).float())
    before = clones(target)
    momentum.fill_(0.25)
    ema_update_(target, source, momentum)
    assert_within_one_ulp_of_lerp(target, before, source, 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_minus_momentum_is_taken_in_the_dtype_of_momentum(device, dtype):
    target, momentum = [torch.zeros(5, device=device)], torch.tensor(0.9999, dtype=dtype, device=device)
    ema_update_(target, [torch.ones(5, device=device)], momentum)
    assert (target[0] == (1 - momentum).float()).all()  # 1.0001659e-4 from fp32, 1e-4 from fp64


def test_momentum_as_a_host_tensor(device):
    target, source = lists(device)
    expected = clones(target)
    ema_update_(target, source, torch.tensor(0.996, dtype=torch.float64))
    ema_update_(expected, source, 0.996)
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


def test_any_layout(device):
    """Transposed, sliced, expanded source, and memory that does not begin at a multiple of 16 bytes."""
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(2, 90, 90, generator=g).to(device) for _ in range(2)]
    target = [base[0][0].t(), base[0][1, :, ::2], base[0].new_ones(90, 90), base[0].new_ones(8101)[1:]]
    source = [base[1][0].t(), base[1][1, :, ::2], base[1][0, :1].expand(90, 90), base[1][0].reshape(-1)]
    before, untouched = clones(target), base[0][1, :, 1::2].clone()
    ema_update_(target, source, 0.9)
    assert_within_one_ulp_of_lerp(target, before, source, 0.1)
    assert torch.equal(base[0][1, :, 1::2], untouched)


@pytest.mark.parametrize("size", [1, 5, CHUNK - 1, CHUNK, CHUNK + 3])
def test_writes_only_its_tensors(device, size):
    """Guard bands around target and copy stay, and NaN around source is not read."""
    padded = size + 32
    target, low = torch.full((padded,), 777.0, device=device), torch.full((padded,), 777.0, device=device).half()
    source = torch.full((padded,), float("nan"), device=device)
    inner = slice(16, 16 + size)
    target[inner], source[inner] = 1.0, 2.0
    ema_update_([target[inner]], [source[inner]], 0.5, low_precision=[low[inner]])
    for x in (target, low):
        assert (x[:16] == 777).all()
        assert (x[16 + size :] == 777).all()
        assert (x[inner] == 1.5).all()


@settings(max_examples=15, derandomize=True, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * 64), max_size=6), path=st.sampled_from(["torch", "interpret"]))
def test_any_sizes(sizes, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_KERNELS", path)
        patch.setattr(ema, "CHUNK", 64)
        target, source = lists("cpu", [(n,) for n in sizes])
        before = clones(target)
        ema_update_(target, source, 0.9)
        assert_within_one_ulp_of_lerp(target, before, source, 0.1)


def test_two_runs_are_bitwise_equal(device):
    target, source = lists(device)
    again = clones(target)
    ema_update_(target, source, 0.996)
    ema_update_(again, source, 0.996)
    assert all(torch.equal(a, b) for a, b in zip(target, again, strict=True))


def test_parameters_and_autograd(device):
    """Parameters are updated in place, outside autograd, and their version counter says so."""
    target, source = ([torch.nn.Parameter(x) for x in y] for y in lists(device, [(5,), (7,)]))
    versions = [t._version for t in target]
    ema_update_(target, source, 0.9)
    assert all(t._version > v and t.is_leaf and t.requires_grad for t, v in zip(target, versions, strict=True))


def test_any_iterable_will_do(device):
    target, source = (torch.nn.Linear(5, 7).to(device) for _ in range(2))
    low = {name: torch.zeros_like(p) for name, p in target.named_parameters()}
    before = [p.detach().clone() for p in target.parameters()]
    ema_update_(target.parameters(), source.parameters(), 0.9, low_precision=low.values())
    assert_within_one_ulp_of_lerp(target.parameters(), before, source.parameters(), 0.1)
    assert all(torch.equal(p, x) for p, x in zip(target.parameters(), low.values(), strict=True))


def test_the_plan_follows_the_addresses(kernel_device, monkeypatch):
    """A table built for one set of tensors must never be used for another: it would write to freed memory."""
    monkeypatch.setattr(ema, "_plans", {})
    target, source = (x[:6] for x in lists(kernel_device, dtypes=(torch.float32, torch.bfloat16)))
    ema_update_(target, source, 0.9)
    ema_update_(target, source, 0.9)
    assert len(ema._plans) == 1
    changes = [
        lambda t, s: (t, s.clone()),  # another address
        lambda t, s: (t, s.view(torch.float16)),  # another dtype at the same one
        lambda t, s: (t[:50], s[:50]),  # fewer elements
        lambda t, s: (t[:, :190], s[:, :190]),  # rows that are not contiguous
    ]
    for i, change in enumerate(changes):
        source[5].fill_(1.5 + i)  # 1.5 ... 4.5 as bf16 are ordinary numbers as fp16 too
        into, one = change(target[5], source[5])
        before = into.clone()
        ema_update_([*target[:5], into], [*source[:5], one], 0.5)
        assert len(ema._plans) == 2 + i
        assert_within_one_ulp_of_lerp([into], [before], [one], 0.5)
    target, source = lists(kernel_device)
    square = target[3][: CHUNK].view(64, 64)
    ema_update_([square], [source[3][: CHUNK].view(64, 64)], 0.5)
    before = square.clone()
    ema_update_([square], [source[3][: CHUNK].view(64, 64).t()], 0.5)  # same addresses, another order
    assert_within_one_ulp_of_lerp([square], [before], [source[3][: CHUNK].view(64, 64).t()], 0.5)


def test_old_plans_are_dropped(kernel_device, monkeypatch):
    monkeypatch.setattr(ema, "_plans", {})
    kept = [lists(kernel_device, [(3,)]) for _ in range(2 * ema.MAX_PLANS)]
    for target, source in kept:
        ema_update_(target, source, 0.9)
    assert len(ema._plans) == ema.MAX_PLANS


def test_tables_of_captured_updates_live_as_long_as_their_targets(kernel_device, monkeypatch):
    """`_plans` may drop a plan whose table a CUDA graph still reads; a graph whose targets are gone reads no more."""
    monkeypatch.setattr(ema, "_plans", {})
    monkeypatch.setattr(ema, "_captured", [])
    shapes = [(0,), (3,)]  # an empty shard, as of FSDP, says nothing of the others' life

    def capture(target, source):
        ema_update_(target, source, 0.9)
        with monkeypatch.context() as patch:
            patch.setattr(ema, "_is_capturing", lambda x: True)
            ema_update_(target, source, 0.9)
            ema_update_(target, source, 0.9)
        return ema._captured[-1][1]

    target, source = lists(kernel_device, shapes)
    plan = capture([x[:] for x in target], source)  # views, as DTensor.to_local() gives them, die at once
    others = [lists(kernel_device, shapes) for _ in range(ema.MAX_PLANS)]
    for pair in others:
        capture(*pair)
    assert not any(other is plan for other in ema._plans.values())
    assert len(ema._captured) == 1 + ema.MAX_PLANS
    del others, pair
    last = lists(kernel_device, shapes)
    assert {id(capture(*last)), id(plan)} == {id(other) for _, other in ema._captured}
    del target
    assert [id(capture(*last))] == [id(other) for _, other in ema._captured]


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("path", ["torch", "interpret"])
def test_dtensors_stand_for_their_shards(mesh, monkeypatch, path):
    monkeypatch.setenv("IJEPA_KERNELS", path)
    target, source = lists("cpu", [(8, 3), (0, 3), (5,)])
    before = clones(target)
    ema_update_(*([DTensor.from_local(x, mesh, [Replicate()]) for x in y] for y in (target, source)), 0.9)
    assert_within_one_ulp_of_lerp(target, before, source, 0.1)


def test_opcheck(device):
    target, source = lists(device, [(5,), (7, 3)])
    low = [t.bfloat16() for t in target]
    momentum = torch.tensor(0.9, device=device)
    torch.library.opcheck(_update_op, (target, source, [], 0.9, None))
    torch.library.opcheck(_update_op, (target, source, low, 0.0, momentum))


def test_compiles_to_one_graph(device):
    graphs = []

    def count(graph, _example):
        graphs.append(graph)
        return graph

    def step(target, source, momentum):
        doubled = [2 * s for s in source]
        ema_update_(target, doubled, momentum)
        return target[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=count, fullgraph=True)
    momentum = torch.tensor(0.0, device=device, dtype=torch.float64)
    target, source = lists(device, [(5,), (7, 3)])
    expected = clones(target)
    for value in (0.9, 0.95, 0.99):  # a tensor, since a float that changes is a constant to the compiler
        momentum.fill_(value)
        assert torch.equal(compiled(target, source, momentum), step(expected, source, momentum))
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))
    assert len(graphs) == 1


def test_empty_lists(device):
    ema_update_([], [], 0.9)
    ema_update_([torch.empty(0, device=device)], [torch.empty(0, device=device)], 0.9)


def cases():
    a, b, c = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    return [
        pytest.param(match, arguments, id=match[:24])
        for match, arguments in [
            (r"source: want 2 tensors as target has, got 1", ([a, b], [a], 0.9)),
            (r"low_precision: want 1 tensors as target has, got 2", ([a], [b], 0.9, [a, b])),
            (r"target: want a list or another iterable of tensors, got float32 \[3\]", (a, [b], 0.9)),
            (r"source: want a list or another iterable of tensors, got NoneType", ([a], None, 0.9)),
            (r"source\[0\]: want a tensor, got 1.0", ([a], [1.0], 0.9)),
            (r"target\[0\]: want a fp32, bf16 or fp16 tensor, got int64", ([a.long()], [b], 0.9)),
            (r"source\[0\]: want .* tensor \[3\] on cpu .*, got float32 \[1, 3\]", ([a], [b[None]], 0.9)),
            (r"source\[0\]: want .* tensor \[3\] on cpu .*, got float64", ([a], [b.double()], 0.9)),
            (r"source\[0\]: want .* on cpu as target\[0\], got .* on meta", ([a], [b.to("meta")], 0.9)),
            (r"target\[1\]: want it on cpu as target\[0\], got .* on meta", ([a, b.to("meta")], [b, a], 0.9)),
            (r"low_precision\[0\]: want .* \[3\] on cpu as .*, got .*\[4\]", ([a], [b], 0.9, [torch.zeros(4)])),
            (r"low_precision\[0\]: want a fp32, .*, got int32", ([a], [b], 0.9, [a.int()])),
            (r"low_precision\[0\]: want a fp32, .*, got float64", ([a], [b], 0.9, [a.double()])),
            (r"low_precision\[0\]: want a fp32, .*, got float8_e5m2", ([a], [b], 0.9, [a.to(torch.float8_e5m2)])),
            (r"low_precision\[0\]: want memory of its own", ([a], [b], 0.9, [a])),
            (r"low_precision\[1\]: want memory of its own", ([a, a + 1], [b, b], 0.9, [c, c])),
            (r"low_precision\[0\]: want memory of its own, got a target's", ([a, c], [b, b], 0.9, [c, b + 1])),
            (r"momentum: want a number in \[0, 1\], got 1.5", ([a], [b], 1.5)),
            (r"momentum: want a number in \[0, 1\], got nan", ([a], [b], math.nan)),
            (r"momentum: want a number in \[0, 1\], got NoneType", ([a], [b], None)),
            (r"momentum: want a number in \[0, 1\], got '0.9'", ([a], [b], "0.9")),
            (r"momentum: want a number or a 0-dim .*, got float32 \[1\]", ([a], [b], torch.ones(1))),
            (r"momentum: want it on the device of target or the host", ([a], [b], torch.ones((), device="meta"))),
            (r"target: want every tensor once", ([a, a], [b, b], 0.9)),
        ]
    ]


@pytest.mark.parametrize("path", ["torch", "interpret"])
@pytest.mark.parametrize(("match", "arguments"), cases())
def test_bad_input(monkeypatch, path, match, arguments):
    monkeypatch.setenv("IJEPA_KERNELS", path)
    target, source, momentum, *low = arguments
    with pytest.raises(ValueError, match=match):
        ema_update_(target, source, momentum, low_precision=low[0] if low else None)


@pytest.mark.parametrize("path", ["torch", "interpret"])
def test_bad_input_changes_nothing(monkeypatch, path):
    monkeypatch.setenv("IJEPA_KERNELS", path)
    target, source = lists("cpu", [(3,), (4,)])
    before = clones(target)
    with pytest.raises(ValueError, match=r"source\[1\]"):
        ema_update_(target, [source[0], source[1][:2]], 0.9)
    assert all(torch.equal(a, b) for a, b in zip(target, before, strict=True))


def test_reference_takes_float64():
    target, source = lists("cpu", [(3,)], (torch.float64, torch.float64))
    want = 0.9 * target[0] + 0.1 * source[0]
    ema_update_ref(target, source, 0.1)
    torch.testing.assert_close(target[0], want, rtol=1e-15, atol=1e-15)


@pytest.mark.gpu
def test_cuda_graph_follows_momentum_and_weights(monkeypatch):
    """A captured update reads momentum and weights when it is replayed, and its table outlives the cache of plans."""
    monkeypatch.setattr(ema, "_plans", {})
    target, source = lists("cuda")
    low = [t.bfloat16() for t in target]
    momentum = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    ema_update_(target, source, momentum, low_precision=low)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(target, source, momentum, low_precision=low)
    kept = [lists("cuda", [(3,)]) for _ in range(2 * ema.MAX_PLANS)]
    for pair in kept:
        ema_update_(*pair, 0.9)
    for value in (0.996, 0.0):
        momentum.fill_(value)
        for s in source:
            s.add_(1)
        before = clones(target)
        graph.replay()
        assert_within_one_ulp_of_lerp(target, before, source, 1 - value)
        assert all(torch.equal(x, t.bfloat16()) for x, t in zip(low, target, strict=True))


@pytest.mark.gpu
def test_capture_without_a_first_call_says_so(monkeypatch):
    monkeypatch.setattr(ema, "_plans", {})
    target, source = lists("cuda")
    says = "call it once with these tensors before capturing"
    with pytest.raises(RuntimeError, match=says), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ema_update_(target, source, 0.9)


@pytest.mark.gpu
def test_one_launch_and_no_wait_for_the_device():
    target, source = lists("cuda")
    momentum = torch.tensor(0.9, device="cuda")
    ema_update_(target, source, momentum)
    # The profiler itself waits for the device when it starts and stops, and may list more than kernels.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, forbidden_sync():
        ema_update_(target, source, momentum)
    assert sum("_ema_kernel" in event.name for event in profile.events()) == 1


@pytest.mark.gpu
def test_a_table_outlives_its_plan_on_another_stream(monkeypatch):
    """A plan is made on one stream and dropped before another one has read its table: that memory is not given out."""
    monkeypatch.setattr(ema, "_plans", {})
    target, source = lists("cuda")
    ema_update_(target, source, 0.9)
    (plan,) = ema._plans.values()
    address, size = plan.launches[0][0].data_ptr(), plan.launches[0][0].shape
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = clones(target)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        ema_update_(target, source, 0.9)
    del plan
    ema._plans.clear()
    others = [torch.empty(size, dtype=torch.int64, device="cuda") for _ in range(1000)]
    assert address not in {other.data_ptr() for other in others}
    torch.cuda.synchronize()
    assert_within_one_ulp_of_lerp(target, before, source, 0.1)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    size = 2**31 + CHUNK + 5
    target = torch.zeros(size, device="cuda")
    source = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    ema_update_([target], [source], 0.75)
    assert target.aminmax() == (0.25, 0.25)
