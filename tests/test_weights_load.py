"""`ijepa_fast.load`: what comes in, features in any size and precision, and the package's names."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from released_file import SMALL, new_training, write_released

import ijepa_fast
import ijepa_fast.weights.huggingface as huggingface
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.sampler import center_boxes
from ijepa_fast.errors import UserError
from ijepa_fast.model import Size, VisionTransformer, init_weights
from ijepa_fast.weights.load import read
from ijepa_fast.weights.model import Model, positions
from ijepa_fast.weights.ours import write


@pytest.fixture(scope="module")
def training():
    return new_training()


@pytest.fixture(scope="module")
def path(training, tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released") / "weights.pth.tar", training)


@pytest.fixture(scope="module")
def model(path) -> Model:
    return ijepa_fast.load(path)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_layers_are_side_by_side_the_last_one_last(model, training, pixels):
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    twin = training.target_encoder
    with torch.no_grad():
        first = twin.blocks[0](twin.patch_embed(x) + twin.pos_embed)
        expected = torch.cat([twin.norm(first), twin.norm(twin.blocks[1](first))], dim=-1)
    torch.testing.assert_close(model.features(x, layers=2, pool=None), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.features(x, layers=2), expected.mean(1), rtol=0, atol=1e-5)
    assert torch.equal(model.features(pixels, pool=None), model.encoder(pixels))


def test_one_image_in_every_form(model, tmp_path):
    """From PIL and path as the data pipeline crops and decodes it; from tensors as they are."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    boxes = center_boxes(np.array([56]), np.array([40]))
    crop = PillowDecoder(1).decode([(tmp_path / "image.png").read_bytes()], boxes, 24)
    expected = model.features(crop)
    assert expected.shape == (1, SMALL.dim)
    with Image.open(tmp_path / "image.png") as image:
        every = [image, [image], tmp_path / "image.png", str(tmp_path / "image.png"), crop.permute(0, 3, 1, 2)]
        for form in every:
            assert torch.equal(model.features(form), expected)
        both = model.features([image, tmp_path / "image.png"], image_size=32, pool=None)
    assert both.shape == (2, 64, SMALL.dim)
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("grid", [(12, 12), (4, 10), (9, 4)])
def test_positions_of_another_grid(model, grid):
    """Bicubic with a = -0.75 at pixel centres, clamped at the borders, written out."""
    square = model.encoder.pos_embed.detach().double().view(6, 6, -1)

    def rows(x: torch.Tensor, size: int) -> torch.Tensor:
        source = (torch.arange(size, dtype=torch.float64) + 0.5) * len(x) / size - 0.5
        low = source.floor()
        out = torch.zeros(size, *x.shape[1:], dtype=torch.float64)
        for tap in range(-1, 3):
            d, a = (source - low - tap).abs(), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weight = torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
            out += weight.view(-1, 1, 1) * x[(low + tap).long().clamp(0, len(x) - 1)]
        return out

    expected = rows(rows(square, grid[0]).transpose(0, 1), grid[1]).transpose(0, 1).flatten(0, 1)
    found = positions(model.encoder, grid)[0].detach()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def transformers_model(path, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("folder") / "hub"
    huggingface.write(folder, read(path), "target")
    return transformers.IJepaModel.from_pretrained(folder).eval()


@pytest.mark.long  # it takes seconds to import transformers
@pytest.mark.parametrize("sides", [(24, 24), (48, 48), (32, 20)])
def test_other_sizes_as_in_transformers(model, transformers_model, sides):
    x = torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers_model(x, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model.features(x, pool=None), expected, rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("sides", [(448, 448), (224, 448), (350, 154)])
def test_published_positions_in_other_sizes_as_in_transformers(sides):
    """ViT-H/14, trained at 224."""
    ijepa = pytest.importorskip("transformers.models.ijepa.modeling_ijepa")
    theirs = ijepa.IJepaEmbeddings(ijepa.IJepaConfig(hidden_size=1280, image_size=224, patch_size=14))
    ours = VisionTransformer(Size(1280, 0, 16, 5120), 224, 14, torch.float32, torch.float32)
    init_weights(ours)
    theirs.position_embeddings.data.copy_(ours.pos_embed)
    grid = sides[0] // 14, sides[1] // 14
    expected = theirs.interpolate_pos_encoding(torch.zeros(1, grid[0] * grid[1], 1280), *sides)
    torch.testing.assert_close(positions(ours, grid), expected, rtol=0, atol=1e-5)


def test_bf16_keeps_positions_and_norms(path, pixels):
    model = ijepa_fast.load(path)
    exact = model.features(pixels, pool=None)
    assert model.to(torch.bfloat16) is model
    features = model.to("cpu", torch.bfloat16).features(pixels, pool=None)
    assert features.dtype == torch.float32
    # Norms and residuals in fp32: what is left is the rounding of products, 2^-9 of values of about 1 each.
    assert 0 < (features - exact).abs().max() < 0.05
    for name, parameter in model.named_parameters():
        kept = "norm" in name or "pos_embed" in name or "mask_token" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert model.encoder.blocks[0].attn.qkv.compute_dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: want float32, bfloat16 or float16, got torch\.float64"):
        model.to(torch.float64)


def test_a_file_may_hold_some_of_it(path, model, pixels, tmp_path):
    contents = read(path)
    for which in (None, "target", "context"):
        write(tmp_path / f"{which}.safetensors", contents, which)
        assert (tmp_path / f"{which}.safetensors").stat().st_mode == path.stat().st_mode  # as open() makes them
    every = ijepa_fast.load(tmp_path / "None.safetensors")
    assert torch.equal(every.features(pixels), model.features(pixels))
    masks = ijepa_fast.Packed.dense(2, 36), ijepa_fast.Packed.dense(2, 36)
    assert torch.equal(every.predict(pixels, *masks), model.predict(pixels, *masks))

    alone = ijepa_fast.load(tmp_path / "context.safetensors")
    assert alone.which == "context"
    with pytest.raises(UserError, match=r"weights\.pth\.tar holds no predictor: load a run's weights"):
        alone.predict(pixels, *masks)
    with pytest.raises(UserError, match="holds the target encoder alone, not the context encoder"):
        ijepa_fast.load(tmp_path / "target.safetensors", "context")
    with pytest.raises(UserError, match="which must be 'target' or 'context', not 'both'"):
        ijepa_fast.load(path, "both")


def test_the_model_does_not_change_with_its_file(path, pixels, tmp_path):
    copy = tmp_path / "weights.pth.tar"
    copy.write_bytes(path.read_bytes())
    model = ijepa_fast.load(copy)
    before = model.features(pixels)
    with open(copy, "r+b") as file:
        file.write(bytes(copy.stat().st_size))
    assert torch.equal(model.features(pixels), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 0}, "layers: want 1 to 2"),
        ({"layers": 3}, "layers: want 1 to 2"),
        ({"pool": "max"}, "pool: want 'mean' or None"),
        ({"image_size": 48}, "image_size: tensors are taken in the size they have"),
        ({"images": []}, "images: want at least one"),
        ({"images": torch.zeros(1, 3, 24, 26)}, "images: want sides divisible by patch_size = 4, got 24 x 26"),
    ],
)
def test_arguments_that_do_not_fit(model, pixels, change, said):
    with pytest.raises(ValueError, match=said):
        model.features(**{"images": pixels, **change})


def test_a_file_that_is_no_image(model, tmp_path):
    (tmp_path / "x.png").write_text("x")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image: it is not a JPEG, PNG"):
        model.features(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read as an image: No such file"):
        model.features([tmp_path / "nowhere.png"])


def test_every_public_name_is_there_and_explained():
    for name in ijepa_fast.__all__:
        assert getattr(ijepa_fast, name).__doc__, name
    assert set(ijepa_fast.__all__) <= set(dir(ijepa_fast))
    with pytest.raises(AttributeError, match="module 'ijepa_fast' has no attribute 'nothing'"):
        _ = ijepa_fast.nothing


def test_the_package_imports_nothing():
    code = "import sys; before = set(sys.modules); import ijepa_fast; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "PIL", "pydantic"} & set(out.split())
