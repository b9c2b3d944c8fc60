"""gather_tokens and apply_masks against plain indexing in float64."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ijepa_kernels import Packed, apply_masks, gather_tokens
from ijepa_kernels import tokens as op
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error
from packed_samples import random_packed


def expected(x, packed):
    """One sequence at a time."""
    ends = packed.cu_seqlens.tolist()
    parts = [x[b, packed.indices[i:j].long()] for b, i, j in zip(packed.image.tolist(), ends, ends[1:], strict=False)]
    return torch.cat([x[0, :0], *parts])


LENGTHS = {"ragged": [5, 1, 0, 16, 7, 7], "empty": [0, 0], "one": [1], "no sequence": [], "whole": [16, 16]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dim", [1, 63, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathers_and_adds_back(device, lengths, dim, dtype):
    packed = random_packed(lengths, 16, 3, device=device)
    x = torch.randn(3, 16, dim, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    out = gather_tokens(x, packed)
    assert torch.equal(out, expected(x, packed))  # a copy: exact in every dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    out.backward(grad)
    x64 = x.detach().double().requires_grad_()
    expected(x64, packed).backward(grad.double())
    # A row is taken by at most 6 sequences: 5 additions in fp32 of partial sums below 16, one rounding to x's dtype.
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=store_error(dtype), atol=5 * 16 * 2**-24)


def test_strided_input_and_expanded_gradient(device):
    packed = random_packed([5, 0, 9], 16, 2, device=device)
    x = torch.randn(2, 40, 33, device=device).transpose(1, 2)[:, 3:19].detach().requires_grad_()
    out = gather_tokens(x, packed)
    assert torch.equal(out, expected(x, packed))
    out.sum().backward()
    x64 = x.detach().double().requires_grad_()
    expected(x64, packed).sum().backward()
    assert torch.equal(x.grad.double(), x64.grad)  # sums of ones are exact


def test_two_runs_are_bitwise_equal(reproducible_device):
    packed = random_packed([9] * 24, 12, 2, device=reproducible_device)
    x = torch.randn(2, 12, 65, device=reproducible_device, requires_grad=True)
    grad = torch.randn(9 * 24, 65, device=reproducible_device)
    first, second = (torch.autograd.grad(gather_tokens(x, packed), x, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


@settings(
    derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 12), max_size=7), st.integers(0, 1000))
def test_packed_equals_per_sequence(device, lengths, seed):
    packed = random_packed(lengths, 12, 3, seed, device)
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
    out = gather_tokens(x, packed)
    want = expected(x, packed)
    assert torch.equal(out, want)
    grads = [torch.autograd.grad(o, x, torch.ones_like(o))[0] for o in (out, want)]
    assert torch.equal(*grads)  # sums of ones are exact


@pytest.mark.parametrize("dim", [63, 64, 1280])
def test_writes_its_output_and_nothing_else(kernel_device, dim, monkeypatch):
    packed = random_packed([5, 1, 0, 16, 7], 16, 3, device=kernel_device)
    x = torch.randn(3, 16, dim, device=kernel_device, requires_grad=True)
    with guarded_outputs(monkeypatch):
        out = gather_tokens(x, packed)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(out, expected(x, packed))
    assert not grad.isnan().any()


def test_rows_nobody_takes_get_zero(device):
    x = torch.randn(2, 40, 16, device=device, requires_grad=True)
    packed = Packed.from_masks([torch.tensor([[3, 39]], device=device)], 40)
    gather_tokens(x, packed).sum().backward()
    want = torch.zeros(2, 40, 16, device=device)
    want[0, [3, 39]] = 1
    assert torch.equal(x.grad, want)


def test_opcheck(device):
    packed = random_packed([5, 0, 7], 16, 2, device=device)
    x = torch.randn(2, 16, 24, device=device).bfloat16().requires_grad_()
    torch.library.opcheck(op._forward_op, (x, *packed))
    torch.library.opcheck(op._backward_op, (torch.randn(12, 24, device=device).bfloat16(), *packed, 2, 16))


def test_compiles_to_one_graph_over_changing_token_counts(device):
    x = torch.randn(2, 16, 24, device=device, requires_grad=True)
    packs = [random_packed(lengths, 16, 2, device=device) for lengths in ([5, 0, 7], [9, 2, 3], [1, 16, 16])]
    assert_compiles_once(lambda x, packed: gather_tokens(x * 2, packed) * 3, [(x, packed) for packed in packs])


def test_apply_masks_compiles_to_one_graph(device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 24, generator=g).to(device).requires_grad_()
    masks = [[torch.randint(20, (3, k), generator=g).to(device) for _ in range(2)] for k in (7, 11, 5)]
    assert_compiles_once(lambda x, masks: apply_masks(x * 2, masks), [(x, m) for m in masks])


@pytest.mark.gpu
def test_never_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    packed = random_packed([5, 0, 7], 16, 2, device="cuda")
    x = torch.randn(2, 16, 24, device="cuda", requires_grad=True)
    with forbidden_sync():
        gather_tokens(x, packed).sum().backward()


@pytest.mark.gpu
def test_values_on_the_device_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS_CHECK", "1")
    packed = Packed.dense(2, 17, "cuda")
    with pytest.raises(ValueError, match=r"packed.indices: want patches in \[0, 15\], got 0 to 16"):
        gather_tokens(torch.randn(2, 16, 24, device="cuda"), packed)


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements(monkeypatch):
    """The last image's rows lie beyond 2^31 elements, in x, in the output and in the gradient."""
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    batch, num_patches, dim = 8400, 256, 1024  # 2.2e9 elements, 4.4 GB in bf16
    x = torch.empty(batch, num_patches, dim, dtype=torch.bfloat16, device="cuda")
    x[:-1], x[-1] = 0, torch.randn(num_patches, dim, device="cuda")
    packed = Packed.dense(batch, num_patches, "cuda")
    out = gather_tokens(x.requires_grad_(), packed)
    assert torch.equal(out[-num_patches:], x[-1])
    (grad,) = torch.autograd.grad(out, x, out)
    assert torch.equal(grad, x)


@pytest.mark.parametrize("count", [1, 4])
def test_apply_masks_is_cat_over_gather(device, count):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 24, generator=g).to(device).requires_grad_()
    masks = [torch.stack([torch.randperm(20, generator=g)[:7] for _ in range(3)]).to(device) for _ in range(count)]
    plain = torch.cat([torch.gather(x, 1, m[:, :, None].expand(-1, -1, 24)) for m in masks])
    ours = apply_masks(x, masks)
    assert torch.equal(ours, plain)
    for part, m in zip(apply_masks(x, masks, concat=False), masks, strict=True):
        assert torch.equal(part, torch.gather(x, 1, m[:, :, None].expand(-1, -1, 24)))
    grad = torch.randn(plain.shape, generator=g).to(device)
    # Rows taken by several masks are summed, perhaps in another order: 4 fp32 terms of order 1.
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, grad)[0] for out in (ours, plain)), rtol=0, atol=4 * 4 * 2**-24
    )


def test_apply_masks_refuses_another_batch():
    with pytest.raises(ValueError, match="x: want 2 images as masks has rows, got 3"):
        apply_masks(torch.zeros(3, 4, 5), [torch.zeros(2, 1, dtype=torch.int64)])


def test_apply_masks_of_several_lengths_comes_as_a_list():
    x = torch.randn(2, 6, 3)
    masks = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[5], [4]])]
    assert [part.shape for part in apply_masks(x, masks, concat=False)] == [(2, 2, 3), (2, 1, 3)]
    with pytest.raises(ValueError, match=r"masks: want one length to concatenate, got \[2, 1\]"):
        apply_masks(x, masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"x: want a .* \[B, N, D\] tensor, got float32 \[4, 5\]"),
        ({"x": torch.zeros(2, 6, 4, dtype=torch.int64)}, "x: want a float32 or bfloat16 or float16 .* got int64"),
        ({"x": torch.zeros(2, 6, 4, device="meta")}, "packed.indices: want .* on meta, got int32 .* on cpu"),
        ({"indices": torch.tensor([0, 1, 6], dtype=torch.int32)}, r"packed.indices: .* got 0 to 6"),
        ({"indices": torch.tensor([0, -1, 5], dtype=torch.int32)}, r"packed.indices: .* got -1 to 5"),
        ({"indices": torch.tensor([0, 1, 5])}, "packed.indices: want a int32 .* got int64"),
        ({"image": torch.tensor([0, 2], dtype=torch.int32)}, r"packed.image: want images in \[0, 1\], got 0 to 2"),
        ({"image": torch.tensor([0], dtype=torch.int32)}, "packed.cu_seqlens: want one entry more .* 2, got 3"),
        ({"image": torch.zeros(1, dtype=torch.int32).expand(2)}, "packed.image: want a contiguous tensor"),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, "packed.cu_seqlens: want lengths .* got -1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32)}, "want it to go from 0 to 3, .* 0 to 2"),
        (
            {"cu_seqlens": torch.tensor([0], dtype=torch.int32), "image": torch.zeros(0, dtype=torch.int32)},
            "packed.indices: want no token where there is no sequence, got 3",
        ),
    ],
)
def test_refuses(change, message):
    x = change.get("x", torch.zeros(2, 6, 4))
    packed = Packed(
        torch.tensor([0, 1, 5], dtype=torch.int32),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        6,
    )._replace(**{field: value for field, value in change.items() if field != "x"})
    with pytest.raises(ValueError, match=message):
        gather_tokens(x, packed)
