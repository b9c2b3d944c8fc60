"""smooth_l1_loss: value and gradient against float64 on every path, and what autograd and the compiler ask of an op."""
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels.loss import _forward_op, _launch_forward, _scale_gradient_, smooth_l1_loss, smooth_l1_loss_ref
from ijepa_kernels.packed import Packed

# The arithmetic is fp32 from the loaded values on, so against float64 on the same values:
#   layer norm: mean and variance are sums of D rounded terms, added in a tree: about log2(D) half ulps; the loss adds a
#   tree over T * D positive terms. 32 half ulps cover both up to D = 1408, with a factor of 2 in hand.
RELATIVE = 32 * 2**-24
# The gradient is rounded once more, to its dtype: half an ulp, of 8 bits in bf16 and 11 in fp16.
STORE = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def packed_of(lengths, num_patches, image, device="cpu", seed=0) -> Packed:
    """Random ascending patches of these lengths; sequence s looks at image[s]."""
    g = torch.Generator().manual_seed(seed)
    indices = [torch.randperm(num_patches, generator=g)[:n].sort()[0] for n in lengths]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *indices]).int()
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packed(indices, ends, torch.tensor(image).int(), num_patches).to(device)


def inputs(device, lengths=(5, 0, 1, 7), dim=48, num_patches=9, batch=3, dtype=torch.float32, target_dtype=None):
    g = torch.Generator().manual_seed(0)
    packed = packed_of(lengths, num_patches, [(2 * s + 1) % batch for s in range(len(lengths))], device)
    pred = torch.randn(sum(lengths), dim, generator=g).to(device, dtype)
    target = (2 * torch.randn(batch, num_patches, dim, generator=g) + 0.5).to(device, target_dtype or dtype)
    return pred.requires_grad_(), target, packed


def reference(pred, target, packed, upstream=1.0, **options):
    """Loss and gradient in float64, on the CPU."""
    p = pred.detach().double().cpu().requires_grad_()
    loss = smooth_l1_loss_ref(p, target.detach().double().cpu(), packed.to("cpu"), **options)
    (upstream * loss).backward()
    return loss.detach(), p.grad


def assert_matches(pred, target, packed, **options):
    loss = smooth_l1_loss(pred, target, packed, **options)
    (gradient,) = torch.autograd.grad(loss, pred)
    want_loss, want_gradient = reference(pred, target, packed, **options)
    assert loss.shape == ()
    assert (loss.dtype, gradient.dtype) == (torch.float32, pred.dtype)
    torch.testing.assert_close(loss.double().cpu(), want_loss, rtol=RELATIVE, atol=0)
    # Where d is near 0 the gradient's error is that of d: absolute, in units of pred and of a normalised target.
    if want_gradient.numel():
        truncates = os.environ.get("IJEPA_KERNELS") == "interpret"  # Triton's interpreter does, when it stores bf16
        rtol = STORE[pred.dtype] * (2 if truncates else 1)
        atol = 4 * RELATIVE * want_gradient.abs().max().item() + (2**-24 if pred.dtype == torch.float16 else 0)
        torch.testing.assert_close(gradient.double().cpu(), want_gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dim", [1, 63, 196, 197, 384, 1280, 1408])
@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
def test_every_width_matches_float64(device, dim, kind):
    assert_matches(*inputs(device, dim=dim), kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_matches_float64_on_the_same_values(device, dtype, target_dtype):
    assert_matches(*inputs(device, dtype=dtype, target_dtype=target_dtype))


@pytest.mark.parametrize(
    "options",
    [
        dict(beta=0.3),
        dict(beta=0.0),
        dict(normalize=False),
        dict(eps=0.1),
        dict(denominator=12345),
        dict(denominator=0.5, kind="l2", normalize=False),
    ],
)
def test_options_match_float64(device, options):
    assert_matches(*inputs(device), **options)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_any_lengths(lengths):
    assert_matches(*inputs("cpu", lengths=lengths))


@settings(max_examples=5, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_any_lengths_in_the_kernel(lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_KERNELS", "interpret")
        assert_matches(*inputs("cpu", lengths=lengths))


def test_no_tokens_give_zero(device):
    pred, target, packed = inputs(device, lengths=(0, 0))
    loss = smooth_l1_loss(pred, target, packed)
    loss.backward()
    assert loss.item() == 0
    assert pred.grad.shape == (0, 48)


@pytest.mark.parametrize("layout", ["class token sliced off", "transposed", "one image expanded", "half the columns"])
def test_targets_of_any_strides(device, layout):
    pred, target, packed = inputs(device)
    strided = {
        "class token sliced off": lambda: torch.cat([target[:, :1], target], 1)[:, 1:],
        "transposed": lambda: target.transpose(1, 2).contiguous().transpose(1, 2),
        "one image expanded": lambda: target[:1].expand(3, -1, -1),
        "half the columns": lambda: torch.cat([target, target], 2)[:, :, :48],
    }[layout]()
    assert not strided.is_contiguous()
    assert_matches(pred, strided, packed)


def test_predictions_of_any_strides(device):
    pred, target, packed = inputs(device)
    for strided in (pred.repeat(1, 2)[:, 48:], pred.t().contiguous().t(), pred[:1].expand(13, -1)):
        assert_matches(strided.detach().requires_grad_(), target, packed)


def test_reads_only_the_rows_that_are_selected(device):
    """Poison around: every other target row, and the memory before and after pred, is NaN."""
    pred, target, packed = inputs(device)
    poisoned = torch.full_like(target, float("nan"))
    image = packed.rows(9) // 9
    poisoned[image, packed.indices.long()] = target[image, packed.indices.long()]
    guarded = torch.full((15, 48), float("nan"), device=device)
    guarded[1:14] = pred.detach()
    assert_matches(guarded[1:14].requires_grad_(), poisoned, packed)


@pytest.mark.parametrize("dim", [1, 197, 384])
def test_writes_only_its_rows(kernel_device, dim):
    """Guard bands around both outputs stay as they were."""
    pred, target, packed = inputs(kernel_device, dim=dim)
    gradient = torch.full((15, dim), 777.0, device=kernel_device)
    partial = torch.full((15,), 777.0, device=kernel_device)
    _launch_forward(pred, target, packed, "l2", 1.0, True, 1e-5, 10.0, gradient[1:14], partial[1:14])
    for guarded in (gradient, partial):
        assert (guarded[[0, -1]] == 777).all()
        assert (guarded[1:14] != 777).all()


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.5, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_incoming_gradient(device, upstream, dtype):
    pred, target, packed = inputs(device, dtype=dtype)
    (smooth_l1_loss(pred, target, packed) * upstream).backward()
    want = reference(pred, target, packed, upstream)[1]
    atol = abs(upstream) * 1e-8 + (2**-24 if dtype == torch.float16 else 0)  # fp16's smallest number
    torch.testing.assert_close(pred.grad.double().cpu(), want, rtol=STORE[dtype] + RELATIVE, atol=atol)


def test_expanded_incoming_gradient(device):
    pred, target, packed = inputs(device)
    smooth_l1_loss(pred, target, packed).expand(3, 5).sum().backward()
    torch.testing.assert_close(pred.grad.double().cpu(), reference(pred, target, packed, 15.0)[1], rtol=1e-5, atol=1e-8)


def test_fp16_gradient_of_a_mean_does_not_underflow(device):
    pred, target, packed = inputs(device, dtype=torch.float16)
    loss = smooth_l1_loss(pred, target, packed, denominator=1e9)  # each gradient is below 2^-24, fp16's smallest number
    (loss * 2.0**20).backward()
    want = reference(pred, target, packed, 2.0**20, denominator=1e9)[1]
    torch.testing.assert_close(pred.grad.double().cpu(), want, rtol=2**-10, atol=2**-24)


def test_second_derivative_says_that_there_is_none(device):
    pred, target, packed = inputs(device)
    (gradient,) = torch.autograd.grad(smooth_l1_loss(pred, target, packed) ** 2, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_through_a_retained_graph(device):
    """The first backward scales the stored gradient in place; the second must not scale that again."""
    pred, target, packed = inputs(device)
    loss = smooth_l1_loss(pred, target, packed)
    grads = [torch.autograd.grad(loss * by, pred, retain_graph=True)[0].clone() for by in (3.0, 1.0, 3.0)]
    want = reference(pred, target, packed)[1]
    for by, gradient in zip((3.0, 1.0, 3.0), grads, strict=True):
        torch.testing.assert_close(gradient.double().cpu(), by * want, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_incoming_gradient_of_one_writes_nothing(device):
    """A signalling NaN comes back quiet from any multiplication, so bits that stay prove that none was done."""
    signalling = torch.full((1000,), 0x7F800001, dtype=torch.int32, device=device)
    gradient = signalling.clone().view(torch.float32)
    by = torch.ones((), device=device)
    if device == "cuda" and os.environ["IJEPA_KERNELS"] == "torch":
        pytest.skip("plain PyTorch on a GPU cannot look at the gradient without waiting for it")
    _scale_gradient_(gradient, by)
    assert torch.equal(gradient.view(torch.int32), signalling)
    _scale_gradient_(gradient, by * 2)
    assert not torch.equal(gradient.view(torch.int32), signalling)


def test_two_runs_are_bitwise_equal(device):
    def run():
        pred, target, packed = inputs(device, lengths=(9, 8, 9, 1), dim=197)
        loss = smooth_l1_loss(pred, target, packed)
        loss.backward()
        return loss, pred.grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_packed_equals_one_image_at_a_time(device):
    pred, target, packed = inputs(device, lengths=(5, 3, 7), batch=3)
    whole = smooth_l1_loss(pred, target, packed, denominator=100)
    parts, gradients = [], []
    for s, (start, stop) in enumerate(((0, 5), (5, 8), (8, 15))):
        image = packed.image[s].item()
        ends = torch.tensor([0, stop - start], device=device, dtype=torch.int32)
        one = Packed(packed.indices[start:stop], ends, torch.zeros_like(packed.image[:1]), 9)
        p = pred.detach()[start:stop].clone().requires_grad_()
        parts.append(smooth_l1_loss(p, target[image : image + 1], one, denominator=100))
        gradients.append(torch.autograd.grad(parts[-1], p)[0])
    torch.testing.assert_close(whole, sum(parts), rtol=RELATIVE, atol=0)
    # each row is computed by itself, so its gradient is the same to the bit
    assert torch.equal(torch.autograd.grad(whole, pred)[0], torch.cat(gradients))


def test_mask_major_rows_equal_the_released_order(device):
    """Packed.from_masks keeps the row order of the released apply_masks and repeat, so that code's tensors fit."""
    g = torch.Generator().manual_seed(0)
    masks = [torch.stack([torch.randperm(9, generator=g)[:4].sort()[0] for _ in range(3)]).to(device) for _ in range(2)]
    target = torch.randn(3, 9, 48, generator=g).to(device)
    pred = torch.randn(24, 48, generator=g).to(device)
    h = torch.nn.functional.layer_norm(target, (48,))
    h = torch.cat([torch.gather(h, 1, m.unsqueeze(-1).expand(-1, -1, 48)) for m in masks])
    want = torch.nn.functional.smooth_l1_loss(pred.view(6, 4, 48), h)
    torch.testing.assert_close(smooth_l1_loss(pred, target, Packed.from_masks(masks, 9)), want, rtol=1e-6, atol=0)


def test_without_grad_nothing_is_kept(device):
    pred, target, packed = inputs(device)
    with torch.no_grad():
        assert not smooth_l1_loss(pred, target, packed).requires_grad
    *_, gradient = _forward_op(pred, target, *packed, "l2", 1.0, True, 1e-5, None, False)
    assert gradient.numel() == 0


def test_opcheck(device):
    pred, target, packed = inputs(device, dtype=torch.float16)  # whose gradient is fp32
    torch.library.opcheck(_forward_op, (pred, target, *packed, "smooth_l1", 1.0, True, 1e-5, 99.0, True))
    torch.library.opcheck(_forward_op, (pred.detach(), target, *packed, "l2", 1.0, False, 1e-5, None, False))


def test_compiles_to_one_graph_over_changing_token_counts(device):
    graphs = []

    def count(graph, _example):
        graphs.append(graph)
        return graph

    def step(pred, target, packed, denominator):
        return smooth_l1_loss(pred * 2, target, packed, denominator=denominator) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=count, fullgraph=True, dynamic=True)
    for lengths, denominator in (((5, 2, 1, 7), 960.0), ((9, 2, 1, 3), 961.5), ((2, 6, 1, 4), 77.0)):
        pred, target, packed = inputs(device, lengths=lengths)
        got, want = (f(pred, target, packed, denominator) for f in (compiled, step))
        torch.testing.assert_close(got, want, rtol=2**-22, atol=0)  # the denominator is applied one rounding later
    assert len(graphs) == 1


def test_compiled_gradient_equals_eager(device):
    pred, target, packed = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: smooth_l1_loss(p * 2, target, packed) * 3, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(pred), pred)
    (want,) = torch.autograd.grad(smooth_l1_loss(pred * 2, target, packed) * 3, pred)
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"kind": "l2"}, {"beta": 0.0}, {"normalize": False}])
def test_padding_counts_for_nothing(device, options):
    """Whatever it holds; and the denominator may be a tensor, which a captured graph reads at each replay."""
    pred, target, packed = inputs(device)
    spare = 6
    more = torch.full((spare, pred.shape[1]), float("nan"), device=device)
    long = torch.cat([pred.detach(), more]).requires_grad_()
    indices = torch.cat([packed.indices, packed.indices.new_zeros(spare)])
    by = torch.tensor(37.0, device=device)
    loss = smooth_l1_loss(long, target, packed._replace(indices=indices), denominator=by, padded=True, **options)
    (gradient,) = torch.autograd.grad(loss, long)
    want = smooth_l1_loss(pred, target, packed, denominator=37.0, **options)
    torch.testing.assert_close(loss, want, rtol=RELATIVE, atol=0)
    (want_gradient,) = torch.autograd.grad(want, pred)
    torch.testing.assert_close(gradient[:-spare], want_gradient, rtol=2**-22, atol=0)  # two more roundings of 1 / 37
    assert not gradient[-spare:].any()


def cases():
    def case(name, match, **change):
        return pytest.param(match, change, id=name)

    pred, target, packed = inputs("cpu")
    pred = pred.detach()
    return [
        case("pred rank", r"pred: want a .* \[T, D\] tensor, got float32 \[1, 13, 48\]", pred=pred[None]),
        case("pred dtype", r"pred: want .*, got int64", pred=pred.long()),
        case("target rank", r"target: want a .* \[B, N, D\] tensor on cpu, got float32 \[9, 48\]", target=target[0]),
        case("width", r"target: want D = 48 as pred has columns, got float32 \[3, 9, 47\]", target=target[..., 1:]),
        case("device", r"target: want a .* tensor on cpu, got .* on meta", target=target.to("meta")),
        case("target grad", r"target: want a tensor that requires no gradient", target=target.clone().requires_grad_()),
        case("rows", r"packed: want 12 tokens as pred has rows, got 13", pred=pred[1:]),
        case("index", r"packed.indices: .*\[0, 7\].* got 0 to 8", target=target[:, :8]),
        case("image", r"packed.image: .*\[0, 1\].* got 0 to 2", target=target[:2]),
        case("lengths", r"packed.cu_seqlens", packed=packed._replace(cu_seqlens=packed.cu_seqlens.flip(0))),
        case("packed dtype", r"packed.image: .*int32.* got int64", packed=packed._replace(image=packed.image.long())),
        case("kind", r"kind: want one of smooth_l1, l2, got 'huber'", kind="huber"),
        case("beta", r"beta: want a number >= 0, got -1", beta=-1),
        case("no beta", r"beta: want a number >= 0, got NoneType", beta=None),
        case("eps", r"eps: want a number >= 0, got '1e-5'", eps="1e-5"),
        case("denominator text", r"denominator: want a number > 0 or None, got '3'", denominator="3"),
        case("denominator", r"denominator: want a number > 0 or None, got 0", denominator=0),
        case("denominator tensor", r"denominator: .* float32 \[\] on cpu, got int64", denominator=torch.tensor(3)),
        case("no denominator", r"denominator: want one where rows are padding", padded=True),
        case("too long", r"packed.cu_seqlens: want it to go from 0 to 11", denominator=1, padded=True,
             pred=pred[2:], packed=packed._replace(indices=packed.indices[2:])),
    ]


@pytest.mark.parametrize(("match", "change"), cases())
def test_bad_input(match, change):
    pred, target, packed = inputs("cpu")
    arguments = dict(pred=pred, target=target, packed=packed) | change
    with pytest.raises(ValueError, match=match):
        smooth_l1_loss(**arguments)


@pytest.mark.gpu
def test_cuda_graph_of_loss_and_gradient():
    pred, target, packed = inputs("cuda", dim=384)
    other = inputs("cuda", lengths=(4, 3, 2, 4), dim=384)  # as many tokens, in other sequences

    def step():
        return (loss := smooth_l1_loss(pred, target, packed)), *torch.autograd.grad(loss, pred)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for static, new in zip((pred, target, *packed[:3]), (other[0] * 2, other[1], *other[2][:3]), strict=True):
            static.copy_(new)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    pred, target, packed = inputs("cuda")
    smooth_l1_loss(pred, target, packed).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (smooth_l1_loss(pred, target, packed) * 2).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Targets of 4.3 GB, of which the last image's rows are read; then predictions and gradient of 4.3 GB each."""
    dim, num_patches = 1024, 256
    batch = 2**31 // (num_patches * dim) + 2
    target = torch.zeros(batch, num_patches, dim, device="cuda", dtype=torch.bfloat16)
    target[-1].normal_(generator=torch.Generator("cuda").manual_seed(0))
    packed = packed_of((7, 9), num_patches, (batch - 1, batch - 1), "cuda")
    pred = torch.randn(16, dim, device="cuda").bfloat16().requires_grad_()
    last = packed._replace(image=torch.zeros_like(packed.image))
    want = reference(pred, target[-1:], last)
    loss = smooth_l1_loss(pred, target, packed)
    torch.testing.assert_close(loss.double().cpu(), want[0], rtol=RELATIVE, atol=0)
    (gradient,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(gradient.double().cpu(), want[1], rtol=2**-8, atol=1e-8)
    del target

    sequences = 2**31 // (num_patches * dim) + 1
    many = Packed.dense(sequences, num_patches, "cuda")._replace(image=torch.zeros(sequences, dtype=torch.int32).cuda())
    target = torch.randn(1, num_patches, dim, device="cuda").bfloat16()
    pred = torch.zeros(sequences * num_patches, dim, device="cuda", dtype=torch.bfloat16)
    pred[-num_patches:].normal_()
    pred.requires_grad_()
    (gradient,) = torch.autograd.grad(2 * smooth_l1_loss(pred, target, many, denominator=1), pred)
    tail = pred.detach()[-num_patches:].requires_grad_()
    want = reference(tail, target, Packed.dense(1, num_patches), upstream=2.0, denominator=1)[1]
    torch.testing.assert_close(gradient[-num_patches:].double().cpu(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
def test_compiled_by_inductor():
    pred, target, packed = inputs("cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda p: smooth_l1_loss(p * 2, target, packed), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(pred), pred)
    (want,) = torch.autograd.grad(smooth_l1_loss(pred * 2, target, packed), pred)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)  # a fused multiplication rounds once less
