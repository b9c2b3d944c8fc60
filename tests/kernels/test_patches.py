"""gather_patches and embed_patches against unfold and a float64 convolution."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD, Packed, embed_patches, gather_patches
from ijepa_kernels import patches as op
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs, store_error
from packed_samples import random_packed


def normalised(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """float64 [B, C, H, W], as torchvision's ToTensor and Normalize do it."""
    if images.dtype != torch.uint8:
        return images.double()
    mean, std = (torch.tensor(v, dtype=torch.float64, device=images.device) for v in (mean, std))
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def expected_patches(images, packed, patch_size, **kwargs):
    dense = F.unfold(normalised(images, **kwargs), patch_size, stride=patch_size).transpose(1, 2)  # [B, N, C*p*p]
    return dense.flatten(0, 1)[packed.rows(dense.shape[1])]


def expected_tokens(images, packed, weight, bias, pos_embed):
    dense = F.conv2d(normalised(images), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    dense = dense + pos_embed
    return dense.flatten(0, 1)[packed.rows(dense.shape[1])]


def random_images(batch, height, width, kind, seed=0, device="cpu", channels=3):
    g = torch.Generator().manual_seed(seed)
    if kind == torch.uint8:
        return torch.randint(256, (batch, height, width, channels), generator=g, dtype=kind).to(device)
    return torch.randn(batch, channels, height, width, generator=g).to(device, kind)


# Normalised bytes reach 2.7: a product and a sum in fp32, each rounded once, beside a scale rounded once.
FP32 = 4 * 2.7 * 2**-24


@pytest.mark.parametrize("patch_size", [14, 16, 5])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patches(device, patch_size, kind, dtype):
    images = random_images(2, 3 * patch_size, 4 * patch_size, kind, device=device)
    packed = random_packed([5, 0, 12, 1], 12, 2, device=device)
    out = gather_patches(images, packed, patch_size=patch_size, dtype=dtype)
    assert out.dtype == dtype
    assert out.shape == (18, 3 * patch_size**2)
    want = expected_patches(images, packed, patch_size)
    torch.testing.assert_close(out.double(), want, rtol=store_error(dtype), atol=FP32)


@pytest.mark.parametrize(("patch_size", "channels", "width"), [(14, 3, 592), (16, 3, 768), (5, 4, 104), (5, 1, 32)])
def test_rows_are_stored_padded_with_zeros(device, patch_size, channels, width, monkeypatch):
    images = random_images(1, 2 * patch_size, 2 * patch_size, torch.uint8, device=device, channels=channels)
    norm = {"mean": IMAGENET_MEAN[:1] * channels, "std": IMAGENET_STD[:1] * channels, "dtype": torch.bfloat16}
    with guarded_outputs(monkeypatch):
        out = gather_patches(images, Packed.dense(1, 4, device), patch_size=patch_size, **norm)
    columns = channels * patch_size**2
    assert out.stride() == (width, 1)
    stored = out.as_strided((4, width), (width, 1))
    assert torch.equal(stored[:, columns:], torch.zeros(4, width - columns, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
def test_any_strides(device, kind):
    packed = random_packed([3, 4], 6, 2, device=device)
    images = random_images(4, 60, 40, kind, device=device)
    channels_last = kind == torch.uint8
    cut = images[::2, 7:52, 5:35] if channels_last else images[::2, :, 7:52, 5:35]
    turned = cut.transpose(1, 2) if channels_last else cut.transpose(2, 3)
    mirrored = cut.contiguous(memory_format=torch.channels_last)  # the other channel order in memory
    one = cut[:1].expand(2, *cut.shape[1:])
    for images in (cut, turned, mirrored, one):
        out = gather_patches(images, packed, patch_size=15)
        torch.testing.assert_close(out.double(), expected_patches(images, packed, 15), rtol=0, atol=FP32)


def test_own_mean_and_std_and_channels(device):
    images = random_images(2, 8, 8, torch.uint8, device=device, channels=2)
    packed = random_packed([3, 4], 4, 2, device=device)
    own = {"mean": (0.1, 0.2), "std": (0.5, 0.25)}
    out = gather_patches(images, packed, patch_size=4, **own)
    torch.testing.assert_close(out.double(), expected_patches(images, packed, 4, **own), rtol=0, atol=FP32)


@pytest.mark.parametrize(("patch_size", "dim"), [(14, 63), (16, 192), (4, 1)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("frozen", [True, False])
def test_tokens_and_gradients(device, patch_size, dim, kind, frozen):
    images = random_images(2, 3 * patch_size, 4 * patch_size, kind, device=device)
    packed = random_packed([5, 0, 12, 1], 12, 2, device=device)
    g = torch.Generator().manual_seed(1)
    shapes = [(dim, 3, patch_size, patch_size), (dim,), (1, 12, dim)]
    leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
    leaves[2].requires_grad_(not frozen)
    out = embed_patches(images, packed, *leaves, patch_size=patch_size)
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = expected_tokens(images, packed, *leaves64)
    # Sums of up to 770 fp32 products of order 1, in any order: about sqrt(770) roundings of partial sums below 150.
    torch.testing.assert_close(out.double(), want, rtol=0, atol=28 * 150 * 2**-24)
    grad = torch.randn(out.shape, generator=g).to(device)
    out.backward(grad)
    want.backward(grad.double())
    assert (leaves[2].grad is None) == frozen
    for leaf, leaf64 in zip(leaves[: 2 if frozen else 3], leaves64, strict=False):
        torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=0, atol=5 * 20 * 2**-24)  # 18 terms


@pytest.mark.parametrize(("with_bias", "with_positions"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("frozen", [True, False])
def test_without_bias_or_positions(device, with_bias, with_positions, frozen):
    images, packed = random_images(2, 12, 16, torch.uint8, device=device), Packed.dense(2, 12, device)
    g = torch.Generator().manual_seed(1)
    weight, bias, pos_embed = (torch.randn(shape, generator=g).to(device) for shape in ((8, 3, 4, 4), (8,), (12, 8)))
    pos_embed.requires_grad_(not frozen)
    given = weight.requires_grad_(), bias if with_bias else None, pos_embed if with_positions else None
    out = embed_patches(images, packed, *given, patch_size=4)
    zeroed = weight, bias * with_bias, pos_embed * with_positions
    want = expected_tokens(images, packed, *(leaf.detach().double() for leaf in zeroed))
    # Sums of 50 fp32 products of order 1, as above.
    torch.testing.assert_close(out.double(), want, rtol=0, atol=7 * 40 * 2**-24)
    out.sum().backward()
    patches = expected_patches(images, packed, 4).double()
    wanted = patches.sum(0).expand(8, -1).view(8, 3, 4, 4)
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=0, atol=5 * 40 * 2**-24)  # 24 terms


@pytest.mark.parametrize("frozen", [True, False])
def test_tokens_in_bf16(device, frozen):
    """No further from float64 than twice what rounding patches, weights and result to bf16 costs by itself."""
    images = random_images(2, 28, 28, torch.uint8, device=device)
    packed = Packed.dense(2, 4, device)
    g = torch.Generator().manual_seed(1)
    shapes = [(64, 3, 14, 14), (64,), (4, 64)]
    leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
    leaves[2].requires_grad_(not frozen)
    out = embed_patches(images, packed, *leaves, patch_size=14, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    want = expected_tokens(images, packed, *(leaf.detach().double() for leaf in leaves))
    patches = expected_patches(images, packed, 14).bfloat16().double()
    weight, bias, position = (leaf.detach().double() for leaf in leaves)
    low = patches @ weight.flatten(1).bfloat16().double().t() + (bias + position).bfloat16()[packed.indices.long()]
    error = (out.double() - want).abs().max()
    ulps = store_error(torch.bfloat16) / 2**-8  # 2 where stores truncate
    assert error <= 2 * ulps * (low.bfloat16().double() - want).abs().max()
    out.sum().backward()
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_tokens(images, packed, *leaves64).sum().backward()
    for leaf, leaf64 in zip(leaves[: 2 if frozen else 3], leaves64, strict=False):
        assert leaf.grad.dtype == torch.float32
        # 8 patch values below 2.7 rounded to bf16, their sum below 22 rounded once more.
        torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=0, atol=2 * 22 * store_error(torch.bfloat16))


def test_two_runs_are_bitwise_equal(reproducible_device):
    images = random_images(2, 16, 16, torch.uint8, device=reproducible_device)
    packed = random_packed([4] * 6, 4, 2, device=reproducible_device)
    shapes = [(8, 3, 8, 8), (8,), (4, 8)]
    leaves = [torch.randn(shape, device=reproducible_device, requires_grad=True) for shape in shapes]
    grad = torch.randn(24, 8, device=reproducible_device)
    runs = [torch.autograd.grad(embed_patches(images, packed, *leaves, patch_size=8), leaves, grad) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@settings(
    derandomize=True, deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 6), max_size=5), st.integers(0, 1000))
def test_packed_equals_one_image_at_a_time(device, lengths, seed):
    images = random_images(3, 8, 12, torch.uint8, seed, device)
    packed = random_packed(lengths, 6, 3, seed, device)
    out = gather_patches(images, packed, patch_size=4)
    ends = packed.cu_seqlens.tolist()
    for s, b in enumerate(packed.image.tolist()):
        one = Packed.from_masks([packed.indices[None, ends[s] : ends[s + 1]]], 6)
        assert torch.equal(out[ends[s] : ends[s + 1]], gather_patches(images[b : b + 1], one, patch_size=4))


def test_packed_tokens_and_gradients_equal_one_image_at_a_time(device):
    """The gradients of a batch are the sums of its images' own."""
    images, packed, *leaves = inputs(device, lengths=(5, 0, 12, 1))
    out = embed_patches(images, packed, *leaves, patch_size=4)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    ends = packed.cu_seqlens.tolist()
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for s, b in enumerate(packed.image.tolist()):
        rows = slice(ends[s], ends[s + 1])
        one = Packed.from_masks([packed.indices[None, rows]], 12)
        alone = embed_patches(images[b : b + 1], one, *leaves, patch_size=4)
        # A library sums another number of rows in another order: 48 products, partial sums below 64.
        torch.testing.assert_close(alone, out[rows], rtol=0, atol=48 * 64 * 2**-24)
        for total, part in zip(sums, torch.autograd.grad(alone, leaves, grad[rows]), strict=True):
            total += part
    for total, whole in zip(sums, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(total, whole, rtol=0, atol=18 * 32 * 2**-24)  # 18 terms, partial sums below 32


def inputs(device, lengths=(5, 0, 12, 1), dim=16, patch_size=4, kind=torch.uint8):
    images = random_images(2, 3 * patch_size, 4 * patch_size, kind, device=device)
    packed = random_packed(lengths, 12, 2, device=device)
    g = torch.Generator().manual_seed(1)
    shapes = [(dim, 3, patch_size, patch_size), (dim,), (12, dim)]
    return images, packed, *(torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_writes_its_output_and_nothing_else(kernel_device, patch_size, kind, monkeypatch):
    images, packed, *_ = inputs(kernel_device, patch_size=patch_size, kind=kind)
    with guarded_outputs(monkeypatch):
        out = gather_patches(images, packed, patch_size=patch_size)
    torch.testing.assert_close(out.double(), expected_patches(images, packed, patch_size), rtol=0, atol=FP32)


def test_expanded_gradient(device):
    images, packed, *leaves = inputs(device)
    embed_patches(images, packed, *leaves, patch_size=4).sum().backward()
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_tokens(images, packed, *leaves64).sum().backward()
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=0, atol=18 * 48 * 2**-24)  # 18 terms below 2.7


def test_opcheck(device):
    images, packed, weight, bias, pos_embed = inputs(device, lengths=(5, 0, 12), dim=8)
    arguments = *packed, 4, list(IMAGENET_MEAN), list(IMAGENET_STD), torch.bfloat16  # not the weight's
    torch.library.opcheck(op._gather_op, (images, *arguments))
    for position in (pos_embed.detach(), None):
        torch.library.opcheck(op._embed_op, (images, weight, bias, position, *arguments))


def test_compiles_to_one_graph_over_changing_token_counts(device):
    def step(images, weight, bias, pos_embed, packed):
        return embed_patches(images, packed, weight * 2, bias, pos_embed, patch_size=4) * 3

    images, _, *leaves = inputs(device)
    # No count equals another size of the step: the compiler would take the two for one.
    packs = [random_packed(lengths, 12, 2, device=device) for lengths in ([5, 0, 6], [9, 2, 3], [1, 11, 12])]
    assert_compiles_once(step, [(images, *leaves, packed) for packed in packs])


@pytest.mark.gpu
def test_never_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    images, packed, *leaves = inputs("cuda")
    with forbidden_sync():
        embed_patches(images, packed, *leaves, patch_size=4).sum().backward()


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements(monkeypatch):
    """The last tokens' rows lie beyond 2^31 elements of the output, the last image's bytes beyond 2^31."""
    monkeypatch.setenv("IJEPA_KERNELS", "triton")
    batch = 14400  # 14400 * 224 * 224 * 3 = 2.17e9
    images = torch.zeros(batch, 224, 224, 3, dtype=torch.uint8, device="cuda")
    images[-1] = torch.randint(256, (224, 224, 3), device="cuda")
    packed = Packed.dense(batch, 196, "cuda")
    out = gather_patches(images, packed, patch_size=16, dtype=torch.bfloat16)
    last = gather_patches(images[-1:].clone(), Packed.dense(1, 196, "cuda"), patch_size=16, dtype=torch.bfloat16)
    assert torch.equal(out[-196:], last)


def make(**change):
    return {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "packed": Packed.dense(2, 4),
        "weight": torch.zeros(5, 3, 4, 4),
        "bias": torch.zeros(5),
        "pos_embed": torch.zeros(1, 4, 5),
        "patch_size": 4,
    } | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, r"images: want a uint8 \[B, H, W, C\] tensor"),
        ({"images": torch.zeros(2, 8, 8, 5, dtype=torch.uint8)}, "images: want 1 to 4 channels in uint8 .* got 5"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, r"images: want a float32 or .* \[B, C, H, W\] tensor"),
        ({"images": torch.zeros(2, 3, 8, 8, requires_grad=True)}, "images: want a tensor that requires no gradient"),
        ({"patch_size": 3}, "images: want sides divisible by patch_size = 3, got 8 x 8"),
        ({"mean": (0.5,)}, "mean, std: want 3 numbers each"),
        ({"mean": None}, "mean: want a list of numbers, one a channel, got NoneType"),
        ({"mean": None, "images": torch.zeros(2, 3, 8, 8)}, "mean: want a list of numbers, .* got NoneType"),
        ({"std": (0.5, None, 1.0)}, "std: want a list of numbers, one a channel, got tuple"),
        ({"mean": torch.zeros(3)}, r"mean: want a list of numbers, one a channel, got float32 \[3\]"),
        ({"patch_size": 4.0}, "patch_size: want an int, got 4.0"),
        ({"patch_size": None}, "patch_size: want an int, got NoneType"),
        ({"packed": Packed.dense(2, 4)._replace(max_seqlen=None)}, "packed.max_seqlen: want an int, got NoneType"),
        ({"pos_embed": 4}, r"pos_embed: want a .* \[4, 5\] tensor on cpu, got 4"),
        ({"bias": 4}, r"bias: want a .* \[5\] tensor on cpu, got 4"),
        ({"std": (0.5, 0.0, 1.0)}, "mean, std: want 3 numbers each, .* std positive"),
        ({"dtype": torch.int32}, "dtype: want float32, bfloat16 or float16, got torch.int32"),
        ({"packed": Packed.dense(3, 4)}, r"packed.image: want images in \[0, 1\], got 0 to 2"),
        ({"packed": Packed.dense(2, 5)}, r"packed.indices: want patches in \[0, 3\], got 0 to 4"),
        ({"packed": torch.arange(4)}, "packed: want a Packed"),
        ({"weight": torch.zeros(5, 48)}, r"weight: want a .* \[D, C, p, p\] tensor, got float32 \[5, 48\]"),
        ({"weight": torch.zeros(5, 1, 4, 4)}, r"weight: want a .* \[5, 3, 4, 4\] tensor on cpu, got"),
        ({"bias": torch.zeros(4)}, r"bias: want a .* \[5\] tensor on cpu, got float32 \[4\]"),
        ({"pos_embed": torch.zeros(1, 5, 5)}, r"pos_embed: want a .* \[1, 4, 5\] tensor on cpu, got"),
        ({"pos_embed": torch.zeros(4, 5, device="meta")}, "pos_embed: want a .* on cpu, got float32 .* on meta"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        embed_patches(**make(**change))
