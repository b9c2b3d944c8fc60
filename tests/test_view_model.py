"""Pictures of a model: the numbers behind them against straight formulas, and the commands that draw them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import tiny_model

import ijepa_fast
from ijepa_fast.view import sheet as sheets
from ijepa_fast.view.__main__ import main
from ijepa_fast.view.attention import attention_maps
from ijepa_fast.view.features import principal_colours
from ijepa_fast.view.predictions import bank_features, retrieve


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def _weights(model, monkeypatch, tmp_path):
    monkeypatch.setattr(ijepa_fast, "load", lambda path, which: model)
    monkeypatch.chdir(tmp_path)


def images(count):
    return torch.randint(0, 256, (count, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_colours_are_the_first_three_components():
    """Features made of three directions of known strengths, with a shift that must not count."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:3]
    # Skewed, since the sign of a component is taken from its skew.
    strength = torch.rand(2, 36, 3, generator=generator) ** 3 * torch.tensor([9.0, 3.0, 1.0])
    colours = principal_colours(strength @ directions + 5)
    for component in range(3):
        wanted, got = strength[..., component].flatten().numpy(), colours[..., component].ravel()
        assert np.corrcoef(wanted, got)[0, 1] > 0.9  # the ends are cut, and 72 draws correlate the three a little


def test_attention_is_what_the_block_computes(model):
    """The maps of all patches, applied to the values and projected, are the block's own attention."""
    encoder, x = model.encoder, images(2)
    maps = torch.stack([attention_maps(encoder, x, -1, patch) for patch in range(36)], dim=2)  # [B, heads, N, N]
    assert maps.sum(-1) == pytest.approx(1, abs=1e-5)
    caught = []
    handle = encoder.blocks[-1].attn.register_forward_hook(lambda _, given, out: caught.append((given[0], out[0])))
    encoder(x)
    handle.remove()
    tokens, expected = caught[0]
    block = encoder.blocks[-1].attn
    v = block.qkv(tokens).view(2, 36, 3, 3, 64)[:, :, 2]
    out = block.proj(torch.einsum("bhnm,bmhd->bnhd", maps, v).reshape(72, 192))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_nearest_patch_is_retrieved_whole(model):
    """A query that is a patch's own feature finds that patch, in whichever batch it lies."""
    bank = images(5)
    dense = model.features(bank, pool=None)
    queries = bank_features(dense)[[0, 77, 179]]
    found = retrieve(queries, iter([(bank[:3], dense[:3]), (bank[3:], dense[3:])]), 4)
    assert found.similarity == pytest.approx(1, abs=1e-5)
    for pixels, (image, patch) in zip(found.pixels, ((0, 0), (2, 5), (4, 35)), strict=True):
        y, x = divmod(patch, 6)
        assert (pixels == bank[image, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].numpy()).all()


def test_patches_are_compared_as_the_loss_sees_them():
    """Scale and shift of a token are not predicted: the targets are layer-normalised."""
    tokens = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bank_features(tokens), bank_features(7 * tokens + 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(bank_features(tokens)[0], F.normalize(F.layer_norm(tokens[0, 0], (32,)), dim=0))


@pytest.mark.parametrize(
    ("picture", "words", "columns", "rows"),
    [
        ("features", ["--rows", "3"], 3, 3),
        ("predictions", ["--rows", "2", "--blocks", "2", "--most", "9"], 5, 4),
        ("attention", ["--rows", "2", "--layer", "1", "--patch", "0", "5"], 4, 2),
    ],
)
def test_commands_draw_sheets(picture, words, columns, rows, photographs, capsys):
    assert main([picture, "weights", str(photographs), *words, "--out", "new/p.png"]) == 0
    assert capsys.readouterr().out == "new/p.png\n"
    panel = sheets.whole_cells(6, 160 if picture == "attention" else sheets.PANEL)
    with Image.open("new/p.png") as sheet:
        assert sheet.width == 2 * sheets.MARGIN + columns * (panel + sheets.GAP) - sheets.GAP
        assert (sheet.height - sheets.HEADER) // (panel + sheets.CAPTION + sheets.GAP // 2) == rows


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["features", "--rows", "0"], "--rows must be at least 1"),
        (["predictions", "--blocks", "5"], "--blocks must be 1 to 4"),
        (["attention", "--layer", "3"], "--layer must be 1 to 2, the blocks of this encoder, not 3"),
        (["attention", "--patch", "0", "6"], "--patch must be two numbers of 0 to 5, not 0 6"),
        (["features", "nowhere.jpg"], "nowhere.jpg cannot be read as an image"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, photographs, capsys):
    picture, *options = words
    assert main([picture, "weights", str(photographs), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert captured.out == ""


def test_weights_without_a_predictor_and_a_bank_of_nothing_else_are_told(model, photographs, monkeypatch, capsys):
    one = str(photographs / "class_0" / "0.jpg")
    assert main(["predictions", "weights", one]) == 2
    assert "there is no other image to take patches from" in capsys.readouterr().err
    monkeypatch.setattr(model, "predictor", None)
    assert main(["predictions", "weights", one]) == 2
    assert "weights holds no predictor" in capsys.readouterr().err
