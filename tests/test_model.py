"""Encoder and predictor: names, sizes, positions, initialisation, packing, precision."""
import math

import numpy as np
import pytest
import torch
from ijepa_kernels import Packed
from torch import nn

from ijepa_fast.blocks import COSTLY, Block, Branch, LayerNorm, Linear
from ijepa_fast.model import (
    SIZES,
    Size,
    VisionTransformer,
    build_encoder,
    build_predictor,
    init_weights,
    sincos_positions,
)

SMALL = Size(dim=96, depth=2, num_heads=3, mlp_dim=384)


def small_encoder(**dtypes: torch.dtype) -> VisionTransformer:
    """Two blocks over a 6 x 6 grid, weights a function of nothing else."""
    dtypes = {"compute_dtype": torch.float32, "residual_dtype": torch.float32, **dtypes}
    encoder = VisionTransformer(SMALL, 96, 16, **dtypes)
    init_weights(encoder, torch.Generator().manual_seed(0))
    return encoder


def ragged(lengths: list[int], images: list[int], num_patches: int = 36) -> Packed:
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(num_patches, generator=generator)[:length].sort().values for length in lengths]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(torch.cat(chosen).int(), ends, torch.tensor(images, dtype=torch.int32), num_patches)


def test_parameter_names_are_timms_and_the_released_codes():
    def block(prefix: str, index: int) -> set[str]:
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        return {f"{prefix}.{index}.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}

    with torch.device("meta"):
        encoder = build_encoder("vit_tiny", image_size=96, patch_size=16)
        predictor = build_predictor(encoder, depth=2, dim=48)
    pairs = {f"{part}.{leaf}" for part in ("patch_embed.proj", "norm") for leaf in ("weight", "bias")}
    assert set(encoder.state_dict()) == {"pos_embed"} | pairs | set().union(*(block("blocks", i) for i in range(12)))
    parts = ("predictor_embed", "predictor_norm", "predictor_proj")
    pairs = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    blocks = block("predictor_blocks", 0) | block("predictor_blocks", 1)
    assert set(predictor.state_dict()) == {"mask_token", "predictor_pos_embed"} | pairs | blocks
    frozen = [name for m in (encoder, predictor) for name, p in m.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "predictor_pos_embed"]


@pytest.mark.parametrize(
    ("name", "patch_size", "published"),
    [  # timm's and torchvision's counts without the classifier; they have a class token and its position, 2 * dim more
        ("vit_tiny", 16, 5_524_416),
        ("vit_small", 16, 21_665_664),
        ("vit_base", 16, 85_798_656),
        ("vit_large", 16, 303_301_632),
        ("vit_huge", 14, 630_764_800),
    ],
)
def test_parameter_counts_are_the_published_ones(name, patch_size, published):
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=224, patch_size=patch_size)
    assert sum(p.numel() for p in encoder.parameters()) + 2 * SIZES[name].dim == published


def test_the_giant_has_a_billion_parameters_and_the_shapes_of_its_release():
    with torch.device("meta"):
        encoder = build_encoder("vit_giant", image_size=224, patch_size=16)
        predictor = build_predictor(encoder, depth=16, dim=384)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e9, 2) == 1.01
    assert encoder.blocks[39].mlp.fc1.weight.shape == (6144, 1408)
    assert len(encoder.blocks) == 40
    assert encoder.pos_embed.shape == (1, 196, 1408)
    assert len(predictor.predictor_blocks) == 16
    assert predictor.predictor_blocks[0].attn.num_heads == 16  # so its heads are 24 wide


def test_positions_are_the_published_formula():
    grid, dim = 5, 24
    expected = np.empty((grid * grid, dim))
    for row in range(grid):
        for column in range(grid):
            for k in range(dim // 4):
                wavelength = 10000 ** (4 * k / dim)
                entries = math.sin(column / wavelength), math.cos(column / wavelength)
                entries += math.sin(row / wavelength), math.cos(row / wavelength)
                expected[row * grid + column, k :: dim // 4] = entries
    positions = sincos_positions(grid, dim)
    assert positions.dtype == torch.float32
    np.testing.assert_allclose(positions.numpy(), expected, rtol=0, atol=1e-7)  # one rounding to fp32 of values <= 1


def test_positions_of_column_come_first_sines_before_cosines():
    dim = SIZES["vit_small"].dim
    positions = build_encoder("vit_small", image_size=224, patch_size=16).pos_embed[0].view(14, 14, dim)
    assert (positions[:, :, : dim // 2] == positions[:1, :, : dim // 2]).all()  # the first half knows no row
    assert (positions[:, :, dim // 2 :] == positions[:, :1, dim // 2 :]).all()  # the second no column
    origin = positions[0, 0].view(4, dim // 4)
    assert (origin == torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]).all()


def test_weights_are_a_function_of_the_generator_alone():
    def build(seed: int, unrelated: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(unrelated)
        encoder = build_encoder("vit_tiny", image_size=96, patch_size=16)
        predictor = build_predictor(encoder, depth=2, dim=48)
        generator = torch.Generator().manual_seed(seed)
        init_weights(encoder, generator)
        init_weights(predictor, generator)
        return encoder.state_dict() | predictor.state_dict()

    first, same, other = build(0, 1), build(0, 2), build(1, 1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_every_matrix_has_the_released_runs_spread_at_every_depth():
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", image_size=96, patch_size=16)
    predictor = build_predictor(encoder, depth=2, dim=48)
    for model in (encoder, predictor):
        for name, p in model.named_parameters():
            if name.endswith("pos_embed"):
                continue
            if p.ndim == 1:
                is_scale = "norm" in name and name.endswith("weight")
                assert (p == float(is_scale)).all(), name
            else:  # five standard errors of a mean and of a spread; a rescaled attn.proj would be off by 30 % or more
                bound = 5 * 0.02 / math.sqrt(p.numel())
                assert abs(float(p.detach().mean())) < bound, name
                assert abs(float(p.detach().std()) - 0.02) < bound, name


def test_init_forgets_no_parameter_of_a_model_built_on_meta():
    with torch.device("meta"):
        encoder = build_encoder("vit_tiny", image_size=96, patch_size=16)
        predictor = build_predictor(encoder, depth=1, dim=48)
    for model in (encoder, predictor):
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        init_weights(model, torch.Generator().manual_seed(0))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(encoder.pos_embed[0], sincos_positions(6, 192))


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    encoder = small_encoder()
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    packed = ragged([5, 36, 0, 1, 17], [2, 0, 1, 1, 2])
    together = encoder(images, packed).tensor_split(packed.cu_seqlens[1:-1].tolist())
    patches = packed.indices.tensor_split(packed.cu_seqlens[1:-1].tolist())
    for tokens, chosen, image in zip(together, patches, packed.image.tolist(), strict=True):
        if len(chosen):
            alone = encoder(images[image : image + 1], Packed.from_masks([chosen[None]], 36))
            # Rows are the same sums, in another blocking of the matrix product: a few fp32 roundings of values near 1.
            torch.testing.assert_close(tokens, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dense_is_every_patch_in_raster_order():
    encoder = small_encoder()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    dense = encoder(images)
    assert dense.shape == (2, 36, 96)
    assert torch.equal(dense.view(72, 96), encoder(images, Packed.dense(2, 36)))


@torch.no_grad()
def test_an_encoder_asked_for_rows_returns_those_rows():
    encoder = small_encoder()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    finished = []
    encoder.blocks[-1].mlp.register_forward_hook(lambda _module, _args, out: finished.append(len(out.value)))
    rows, listed = torch.tensor([3, 35, 36, 71]), ragged([5, 20], [1, 0])
    for packed, wanted in ((None, rows), (listed, rows[:1])):
        whole, part = encoder(images, packed).view(-1, 96), encoder(images, packed, wanted)
        # Products over 4 rows are blocked otherwise than over 72: a few fp32 roundings of values near 1.
        torch.testing.assert_close(part, whole[wanted], rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert finished == [72, 4, 25, 1]


def test_a_block_asked_for_rows_returns_those_rows_and_their_gradients():
    block = small_encoder().blocks[0]
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    cu_seqlens, rows = torch.tensor([0, 7, 40], dtype=torch.int32), torch.tensor([1, 6, 30, 31])
    results = []
    for some in (None, rows):
        leaf = x.clone().requires_grad_()
        out, branch = block(leaf, Branch(leaf), cu_seqlens, 40, some)
        out = out + branch.value
        out = out if len(out) == len(rows) else out[rows]
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad, block.attn.qkv.weight.grad))
        block.zero_grad()
    for whole, part in zip(*results, strict=True):
        # Matrix products over 4 rows instead of 40 are blocked differently: fp32 rounding of the largest entry.
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("compute_dtype", "residual_dtype"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_products_and_stream_have_their_own_dtypes(compute_dtype, residual_dtype):
    encoder = small_encoder(compute_dtype=compute_dtype, residual_dtype=residual_dtype)
    predictor = build_predictor(encoder, depth=2, dim=48)
    seen: dict[type, set[torch.dtype]] = {Block: set(), LayerNorm: set(), Linear: set()}

    def record(module: nn.Module, _args: tuple, out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        stream, result = (None, out) if isinstance(out, torch.Tensor) else out
        seen[type(module)].add(result.value.dtype if isinstance(result, Branch) else result.dtype)
        assert stream is None or stream.dtype == residual_dtype

    for model in (encoder, predictor):
        for module in model.modules():
            if type(module) in seen:
                module.register_forward_hook(record)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    context, target = ragged([20, 9], [0, 1]), ragged([4, 5], [0, 1])
    predicted = predictor(encoder(images, context), context, target)
    last = {torch.float32}  # of the encoder, whose features are fp32
    assert seen == {Block: {compute_dtype}, LayerNorm: last | {compute_dtype}, Linear: {compute_dtype}}
    predicted.float().square().sum().backward()
    trained = [p for model in (encoder, predictor) for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


def test_selective_checkpointing_knows_attention_by_the_name_that_a_gpu_calls():
    from torch.nn.attention import varlen  # noqa: F401  (registers it)

    for op in (torch.ops.ijepa.varlen_attention_qkv, torch.ops.torch_attn._varlen_attn, torch.ops.aten.addmm):
        assert op.default._schema.name in COSTLY


@torch.no_grad()
def test_bfloat16_rounds_the_projection_and_not_the_positions():
    """As the released code under autocast, whose convolution is rounded and added to fp32 positions."""
    encoder = small_encoder(compute_dtype=torch.bfloat16)
    torch.nn.init.normal_(encoder.patch_embed.proj.bias)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    packed = Packed.dense(len(images), encoder.grid**2)
    x, branch = encoder.patch_embed(images, packed, encoder.pos_embed, torch.float32)
    assert torch.equal(x, encoder.pos_embed[0].repeat(len(images), 1))
    assert branch.value.dtype == torch.bfloat16
    wide = small_encoder()
    wide.patch_embed.proj.load_state_dict(encoder.patch_embed.proj.state_dict())
    whole, _ = wide.patch_embed(images, packed, torch.zeros_like(encoder.pos_embed), torch.float32)
    # 2^-9 for each rounding: of weights, patches and the result.
    assert (branch.value.float() + branch.bias - whole).abs().max() <= 3 * 2**-9 * (whole - branch.bias).abs().max()


def test_positions_that_are_trained_have_their_gradient_in_bfloat16():
    encoder = small_encoder(compute_dtype=torch.bfloat16)
    encoder.pos_embed.requires_grad_()
    images, packed = torch.randn(2, 3, 96, 96), ragged([3, 5], [0, 1])
    x, _ = encoder.patch_embed(images, packed, encoder.pos_embed, torch.float32)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x.backward(grad)
    want = torch.zeros(36, x.shape[1]).index_add(0, packed.indices, grad)
    torch.testing.assert_close(encoder.pos_embed.grad[0], want, rtol=0, atol=2**-22)  # sums of two


@torch.no_grad()
def test_bfloat16_stays_within_its_rounding_of_fp32():
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    exact = small_encoder()(images)
    rounded = small_encoder(compute_dtype=torch.bfloat16)(images)
    # bf16 keeps 8 bits: 2^-9 an operation, here some ten in a row, on normalised outputs of spread 1.
    assert (rounded - exact).square().mean().sqrt() < 10 * 2**-9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_encoder("vit_colossal", image_size=224, patch_size=16), "no encoder 'vit_colossal'.*vit_giant"),
        (lambda: build_encoder("vit_tiny", image_size=224, patch_size=15), "image_size 224.*patch_size 15"),
        (lambda: build_predictor(small_encoder(), depth=0, dim=48), "at least 1 block, got depth 0"),
        (lambda: build_predictor(small_encoder(), depth=1, dim=50), "dim 50.*multiple of 4.*3 heads"),
    ],
)
def test_impossible_models_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_patch_is_listed_once_for_batches_of_a_size(monkeypatch):
    """In inference mode first: what is kept from there must not be in the way of a backward."""
    made, dense = [], Packed.dense
    monkeypatch.setattr(Packed, "dense", lambda *sizes, device: made.append(sizes) or dense(*sizes, device=device))
    encoder = small_encoder()
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        first = encoder(images)
    assert torch.equal(first, encoder(images))
    encoder(images).sum().backward()
    assert made == [(3, 36)]
    with torch.no_grad():
        for batch in range(1, 12):
            encoder(images[:1].expand(batch, -1, -1, -1))
    assert len(encoder._dense) <= 8
