"""Weights for timm and from timm, against timm's own Vision Transformer and through real files."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision_stand_in import import_timm
from weights_models import PUBLISHED, TINY, contents, encoder, image

import ijepa_fast
import ijepa_fast.weights.timm as timm_format
from ijepa_fast.errors import UserError
from ijepa_fast.model import Size

pytestmark = pytest.mark.long  # importing timm takes longer than most of these tests
timm = import_timm()

# Two fp32 implementations of one formula: features are of the order 1 (at most 5), sums of 1,408 products.
TOLERANCE = 1e-5
QUICKLY = {"weight_init": "skip"}  # timm would draw weights first, which takes longer than all else


@pytest.fixture(scope="module")
def tiny():
    return encoder(*TINY)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> Path:
    """A folder of ours; not to be changed."""
    path = tmp_path_factory.mktemp("export") / "tiny"
    timm_format.write(path, contents(tiny), "target")
    return path


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of `exported` to damage."""
    return shutil.copytree(exported, tmp_path / "tiny")


def vit(**changes) -> torch.nn.Module:
    """A small model of timm's, of a width that tells its heads, no bias zero and no norm one."""
    arguments = {
        "img_size": 24, "patch_size": 4, "embed_dim": 192, "depth": 1, "num_heads": 3, "mlp_ratio": 2,
        "class_token": False, "global_pool": "avg", "num_classes": 0,
    }  # fmt: skip
    model = timm.models.VisionTransformer(**arguments | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for value in model.parameters():
        value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return model


def check_both_directions(size: Size, image_size: int, patch_size: int, tmp_path: Path) -> None:
    """Features of our folder in timm, of every patch and pooled; and back."""
    ours = encoder(size, image_size, patch_size)
    images = image(image_size)
    expected = ours(images)
    timm_format.write(tmp_path / "ours", contents(ours), "target")
    theirs = timm.create_model(f"local-dir:{tmp_path}/ours", pretrained=True, **QUICKLY).eval()
    shutil.rmtree(tmp_path / "ours")
    with torch.no_grad():
        patches = theirs.forward_features(images)
        assert (patches - expected).abs().max() < TOLERANCE
        assert (theirs.forward_head(patches) - expected.mean(1)).abs().max() < TOLERANCE
    assert theirs.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    assert theirs.pretrained_cfg["std"] == [0.229, 0.224, 0.225]

    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    back = ijepa_fast.load(tmp_path / "theirs.safetensors")
    assert back.encoder.size == size
    assert all(torch.equal(back.encoder.state_dict()[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_shapes(published, tmp_path):
    size, image_size, patch_size = PUBLISHED[published]
    check_both_directions(size._replace(depth=2), image_size, patch_size, tmp_path)


@pytest.mark.slow
def test_full_depth(tmp_path):
    check_both_directions(*PUBLISHED["vith14_1k"], tmp_path)


@pytest.mark.parametrize("name", ["vit_huge_patch14_gap_224", "vit_huge_patch16_gap_448", "vit_giant_patch16_gap_224"])
def test_names_of_the_published_models(name, tmp_path):
    """The state dict of timm's own I-JEPA models is ours by name and shape."""
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0, depth=2, **QUICKLY)
    size, image_size, patch_size = next(
        values for values in PUBLISHED.values() if (values[0].dim, values[1]) == (theirs.embed_dim, int(name[-3:]))
    )
    with torch.device("meta"):
        ours = ijepa_fast.VisionTransformer(
            size._replace(depth=2), image_size, patch_size, torch.float32, torch.float32
        ).state_dict()
    assert {name: value.shape for name, value in theirs.state_dict().items()} == {
        name: value.shape for name, value in ours.items()
    }


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("fc_norm", [False, None])
def test_state_dict_of_theirs(fc_norm, suffix, tmp_path):
    """By default and with this pooling, timm's final norm is `fc_norm`, which normalises the mean over patches."""
    theirs = vit(fc_norm=fc_norm)
    assert ("fc_norm.weight" in theirs.state_dict()) == (fc_norm is None)
    path = tmp_path / f"weights.{suffix}"
    save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(theirs.state_dict(), path)
    model = ijepa_fast.load(path)
    images = image(24)
    expected = theirs.fc_norm(theirs.forward_features(images))  # one of the two norms does nothing
    assert (model.features(images, pool=None) - expected).abs().max() < TOLERANCE
    assert model.which == "context"


def test_our_folder_takes_a_new_head(exported, tiny):
    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(image(24)), theirs.head(tiny(image(24)).mean(1)), atol=TOLERANCE)


def test_head_is_left_out_and_said(tmp_path):
    theirs = vit(num_classes=7, fc_norm=False)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth")
    back = timm_format.read(tmp_path / "weights.pth")
    assert timm_format.recognise(tmp_path / "weights.pth")
    assert back.about["notes"] == [f"{tmp_path}/weights.pth: its head is no part of the encoder and was left out"]
    assert "head.weight" not in back.encoders["context"]


def test_folder_of_theirs(tmp_path):
    """As timm pushes it to the hub, with its base model's own number of heads."""
    theirs = vit(embed_dim=768, num_heads=16)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"architecture": "vit_base_patch16_gap_224", "model_args": {"img_size": 24}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ijepa_fast.load(tmp_path)
    assert model.encoder.size.num_heads == 16
    expected = theirs.fc_norm(theirs.forward_features(image(24)))
    assert (model.features(image(24), pool=None) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("which", ["target", "context"])
def test_card_and_config_say_which_encoder(which, tiny, tmp_path):
    timm_format.write(tmp_path / "folder", contents(tiny, which), which)
    assert f": {which} encoder\n" in (tmp_path / "folder" / "README.md").read_text()
    assert list(timm_format.read(tmp_path / "folder").encoders) == [which]
    assert timm_format.read(tmp_path / "folder").num_heads == 3


def test_oblong_images(tiny, tmp_path):
    timm_format.write(tmp_path / "folder", contents(tiny)._replace(image_size=(16, 36)), "target")
    theirs = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    with torch.no_grad():
        assert theirs.forward_features(torch.randn(1, 3, 16, 36)).shape == (1, 36, 48)
    assert timm_format.read(tmp_path / "folder").image_size == (16, 36)


def test_recognise(exported, tmp_path):
    assert timm_format.recognise(exported)
    assert not timm_format.recognise(tmp_path)
    assert not timm_format.recognise(exported / "model.safetensors")  # nothing of it is timm's alone
    (tmp_path / "cut.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:100])
    assert not timm_format.recognise(tmp_path / "cut.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        timm_format.read(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_token": True}, "holds cls_token"),
        ({"init_values": 0.1}, "blocks.0.ls1.gamma"),
        ({"qkv_bias": False}, "blocks.0.attn.qkv.bias"),
        ({"reg_tokens": 2}, "holds reg_token"),
        ({"in_chans": 1}, "patch_embed.proj.weight has shape [192, 1, 4, 4]"),
    ],
)
def test_other_vision_transformers_are_refused(changes, words, tmp_path):
    save_file(vit(**changes).state_dict(), tmp_path / "weights.safetensors")
    assert words in refusal(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "resnet50"}, "resnet50"),
        ({"model_args": {"num_heads": "many"}}, "num_heads 'many'"),
        ({"model_args": {"num_heads": 3, "img_size": [24]}}, "img_size [24]"),
        ({"model_args": {"num_heads": 3, "img_size": 28}}, "36 positions"),
        ({"model_args": {"num_heads": 5}}, "5 heads"),
        ({"model_args": {}}, "width 48"),
    ],
)
def test_config_that_does_not_fit_is_refused(changes, words, folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert words in refusal(folder)


def test_damaged_files_are_refused(folder):
    weights = folder / "model.safetensors"
    held = load_file(weights)
    save_file({name: value for name, value in held.items() if not name.startswith("blocks.0.")}, weights)
    assert "blocks.0" in refusal(folder)
    save_file(held | {"fc_norm.weight": torch.ones(48)}, weights)
    assert "both norm and fc_norm" in refusal(folder)
    save_file(held, weights)
    os.truncate(weights, weights.stat().st_size - 4)
    assert "model.safetensors is no whole safetensors file" in refusal(folder)
    weights.unlink()
    assert "neither model.safetensors nor" in refusal(folder)


def test_nothing_is_written_over(tiny, exported):
    before = sorted(exported.iterdir())
    with pytest.raises(UserError, match="is there already"):
        timm_format.write(exported, contents(tiny), "target")
    assert sorted(exported.iterdir()) == before
