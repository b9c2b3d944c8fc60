"""gather_tokens and apply_masks against plain indexing in float64."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ijepa_kernels import Packed, apply_masks, gather_tokens
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
    # A row is taken by at most 6 sequences: 5 additions, each rounded once in x's dtype, of terms of order 1.
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0, atol=5 * 4 * torch.finfo(dtype).eps)


def test_strided_input_and_expanded_gradient(device):
    packed = random_packed([5, 0, 9], 16, 2, device=device)
    x = torch.randn(2, 40, 33, device=device).transpose(1, 2)[:, 3:19].detach().requires_grad_()
    out = gather_tokens(x, packed)
    assert torch.equal(out, expected(x, packed))
    out.sum().backward()
    x64 = x.detach().double().requires_grad_()
    expected(x64, packed).sum().backward()
    assert torch.equal(x.grad.double(), x64.grad)  # sums of ones are exact


def test_two_runs_are_bitwise_equal(device):
    packed = random_packed([9] * 24, 12, 2, device=device)
    x = torch.randn(2, 12, 65, device=device, requires_grad=True)
    grad = torch.randn(9 * 24, 65, device=device)
    first, second = (torch.autograd.grad(gather_tokens(x, packed), x, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 12), max_size=7), st.integers(0, 1000))
def test_packed_equals_per_sequence(lengths, seed):
    packed = random_packed(lengths, 12, 3, seed)
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(gather_tokens(x, packed), expected(x, packed))


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
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, "packed.cu_seqlens: want lengths .* got -1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32)}, "want it to go from 0 to 3, .* 0 to 2"),
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
