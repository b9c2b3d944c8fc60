"""The decoder: pairs of pixels and features fit, it learns what features say, and its file is read back or refused."""
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_model import tiny_model

import ijepa_fast
from ijepa_fast.decode.__main__ import main
from ijepa_fast.decode.blocks import predicted_blocks
from ijepa_fast.decode.model import Decoder, DecoderSettings, load, save, to_float
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.view.open import MASKS

SMALL = DecoderSettings(feature_dim=3, image_size=24, patch_size=4, widths=(16, 16, 16))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def _weights(model, monkeypatch, tmp_path):
    monkeypatch.setattr(ijepa_fast, "load", lambda path, which: model)
    monkeypatch.chdir(tmp_path)


def test_blocks_are_the_pixels_and_predictions_of_the_same_place(model):
    """Every patch has one colour that says where it lies, so that a block's pixels give its patches back."""
    place = torch.arange(36, dtype=torch.uint8).view(6, 6) * 7
    images = place.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, :, :, None].repeat(3, 1, 1, 3)
    images[..., 1] = torch.arange(3, dtype=torch.uint8).view(3, 1, 1) * 80  # the image
    masks = MultiBlockMasks(MASKS, 6, 0, 3).sample(0, 0, 3)
    blocks = predicted_blocks(model, images, masks, torch.device("cpu"))
    predicted, ends = model.predict(images, masks.context, masks.target), masks.target.cu_seqlens.tolist()
    assert blocks.pixels.shape == (12, 64, 64, 3)
    assert blocks.features.shape == (12, 192, 8, 8)
    for s, image in enumerate(masks.target.image.tolist()):
        tokens = slice(ends[s], ends[s + 1])
        patches = masks.target.indices[tokens].tolist()
        assert (blocks.pixels[s, 0, 0].tolist()[:2]) == [7 * patches[0], 80 * image]
        assert (blocks.pixels[s, -1, -1].tolist()[:2]) == [7 * patches[-1], 80 * image]
        # Corners of a bilinear enlargement are the corners themselves.
        torch.testing.assert_close(blocks.features[s, :, 0, 0], predicted[tokens][0])
        torch.testing.assert_close(blocks.features[s, :, -1, -1], predicted[tokens][-1])


@pytest.fixture(scope="module")
def trained():
    """A small decoder of blocks of one colour, of which the features tell red and green, and leave blue open."""
    torch.manual_seed(0)
    decoder = Decoder(SMALL)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        colour = torch.rand(8, 3) * 2 - 1
        told = colour * torch.tensor([1.0, 1.0, 0.0])
        pixels, features = colour[:, :, None, None].expand(-1, -1, 64, 64), told[:, :, None, None].expand(-1, -1, 8, 8)
        decoder.loss(pixels, features).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder.eval()


@pytest.mark.long
def test_samples_agree_where_the_features_tell_and_differ_where_they_do_not(trained):
    told = torch.tensor([[0.6, -0.6, 0.0]])[:, :, None, None].expand(12, -1, 8, 8)
    samples = to_float(trained.sample(told, torch.Generator().manual_seed(0))).mean((2, 3))  # [12, 3]
    # 150 steps leave an error of 0.04 to 0.24 by the seed; one colour for all would be off by 0.6.
    assert samples[:, :2].mean(0).tolist() == pytest.approx([0.6, -0.6], abs=0.3)
    assert samples[:, 2].std() > 2 * samples[:, :2].std(0).max()


@pytest.mark.long
def test_one_seed_gives_one_sample(trained):
    told = torch.zeros(2, 3, 8, 8)
    first, again, other = (trained.sample(told, torch.Generator().manual_seed(s), steps=2) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.long
def test_a_file_gives_the_same_decoder_back(trained, tmp_path):
    path = tmp_path / "new" / "d.safetensors"
    save(trained, path, {"weights": "w"})
    back = load(path)
    assert back.settings == SMALL
    x, t, told = torch.randn(1, 3, 64, 64), torch.tensor([0.3]), torch.randn(1, 3, 8, 8)
    assert torch.equal(back(x, t, told), trained(x, t, told))


@pytest.mark.long
def test_other_files_are_refused(trained, tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "d.safetensors"
    save(trained, whole, {})
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is no decoder of ours"):
        load(path)
    path.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as a decoder"):
        load(path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none")


@pytest.mark.long
def test_the_commands_train_and_show(photographs, capfd):
    assert main(["train", "weights", str(photographs), "--steps", "2", "--batch", "2"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("decoder.safetensors: 2 steps, loss ")
    assert np.isfinite(float(out.split("loss ")[1].split()[0]))
    words = ["show", "weights", "decoder.safetensors", str(photographs), "--rows", "1", "--samples", "2"]
    assert main([*words, "--out", "new/d.png"]) == 0
    assert capfd.readouterr().out == "new/d.png\n"
    with Image.open("new/d.png") as sheet:
        assert sheet.width == 2 * 36 + 4 * (222 + 14) - 14  # context, block, two samples


@pytest.mark.long
def test_mistakes_are_one_sentence(photographs, capfd, trained, tmp_path):
    save(trained, tmp_path / "other.safetensors", {})
    for words, sentence in (
        (["train", "weights", str(photographs), "--steps", "0"], "--steps and --batch must be at least 1"),
        (["train", "weights", "nowhere"], "nowhere does not exist"),
        (["train", "weights", str(photographs), "--batch", "99"], "40 images are fewer than one global batch of 99"),
        (["show", "weights", "none", str(photographs)], "none does not exist"),
        (["show", "weights", "other.safetensors", str(photographs)], "was trained for features of 3 channels"),
        (["show", "weights", "other.safetensors", str(photographs), "--samples", "0"], "--samples must be"),
    ):
        assert main(words) == 2
        captured = capfd.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert sentence in captured.err
        assert captured.out == ""
