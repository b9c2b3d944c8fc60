"""Hugging Face folders, against transformers itself and through real files."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from weights_models import PUBLISHED, TINY, contents, encoder, image

from ijepa_fast.errors import UserError
from ijepa_fast.model import Size
from ijepa_fast.weights import huggingface

pytestmark = pytest.mark.long  # importing transformers takes longer than most of these tests
transformers = pytest.importorskip("transformers")

# Two fp32 implementations of one formula: features are of the order 1 (at most 5), sums of 1,408 products.
TOLERANCE = 1e-5


def patch_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images).last_hidden_state


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tiny():
    return encoder(*TINY)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> Path:
    """A folder of ours in one file; not to be changed."""
    path = tmp_path_factory.mktemp("export") / "tiny"
    huggingface.write(path, contents(tiny), "target")
    return path


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of `exported` to damage."""
    return shutil.copytree(exported, tmp_path / "tiny")


@pytest.fixture
def shards(tiny, tmp_path) -> Path:
    path = tmp_path / "shards"
    huggingface.write(path, contents(tiny), "target", shard_bytes=100_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_both_directions(size: Size, image_size: int, patch_size: int, tmp_path: Path, shard_bytes: int) -> None:
    """Features of our folder in transformers, and of transformers' folder in ours, in one file and in several."""
    ours = encoder(size, image_size, patch_size)
    images = image(image_size)
    expected = ours(images)
    huggingface.write(tmp_path / "ours", contents(ours), "target", shard_bytes)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(theirs) is transformers.IJepaModel
    assert theirs.config.layer_norm_eps == 1e-6
    assert (patch_features(theirs, images) - expected).abs().max() < TOLERANCE
    shutil.rmtree(tmp_path / "ours")

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    back = huggingface.read(tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs")
    assert back.num_heads == size.num_heads
    assert back.image_size == (image_size, image_size)
    ours.load_state_dict(back.encoders["target"], assign=True)
    assert torch.equal(ours(images), expected)


@pytest.mark.parametrize(
    ("published", "shard_bytes"), [("vith14_1k", 10**10), ("vith16_1k", 100_000_000), ("vitg16_22k", 50_000_000)]
)
def test_published_shapes(published, shard_bytes, tmp_path):
    size, image_size, patch_size = PUBLISHED[published]
    check_both_directions(size._replace(depth=2), image_size, patch_size, tmp_path, shard_bytes)


@pytest.mark.slow
def test_full_depth(tmp_path):
    check_both_directions(*PUBLISHED["vith14_1k"], tmp_path, 10**9)


def test_weights_of_theirs(tmp_path):
    """A model that transformers made: the same features in ours, under all names that its files have had."""
    config = transformers.IJepaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=24, patch_size=4,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.IJepaModel(config)
    images = image(24)
    expected = patch_features(theirs, images)
    for number, original in enumerate((True, False)):
        theirs.save_pretrained(tmp_path / str(number), save_original_format=original)
        back = huggingface.read(tmp_path / str(number))
        assert list(back.encoders) == ["context"]  # which is what others publish
        ours = encoder(Size(48, 2, back.num_heads, 96), 24, 4)
        ours.load_state_dict(back.encoders["context"])
        assert (ours(images) - expected).abs().max() < TOLERANCE
    assert "layers.0.attention.q_proj.weight" in load_file(tmp_path / "1" / "model.safetensors")


def test_classifier(exported, tiny, tmp_path):
    """Our folder takes a new head in transformers; theirs is read without it, which is said."""
    theirs = transformers.IJepaForImageClassification.from_pretrained(exported, num_labels=7)
    with torch.no_grad():
        logits = theirs(image(24)).logits
        assert torch.allclose(logits, theirs.classifier(tiny(image(24)).mean(1)), atol=TOLERANCE)
    theirs.save_pretrained(tmp_path / "classifier")
    back = huggingface.read(tmp_path / "classifier")
    assert back.about["notes"] == [f"{tmp_path}/classifier: its classifier is no part of the encoder and was left out"]
    for name, value in tiny.state_dict().items():
        assert torch.equal(back.encoders["target"][name], value)


def test_image_processor(exported):
    """ImageNet's statistics, not the 0.5 that transformers' own conversion leaves; the same pixels as ours."""
    # transformers 5.17 wants torchvision before it lends out the name; the class itself does without.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    values = AutoImageProcessor.from_pretrained(exported)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)
    assert torch.allclose(values[0], expected, atol=1e-5)
    wide = AutoImageProcessor.from_pretrained(exported)(Image.new("RGB", (70, 50)), return_tensors="pt")
    assert wide["pixel_values"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize("which", ["target", "context"])
def test_card_says_which_encoder_and_how_it_was_trained(which, tiny, tmp_path):
    huggingface.write(tmp_path / "folder", contents(tiny, which), which)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"24 x 24 px: {which} encoder\n" in card
    assert "step: 500" in card
    assert "lr: 0.001" in card
    assert "crop_scale:" in card
    assert "/home/me" not in card  # a recipe, not the names of someone's folders
    assert "CC BY-NC" not in card
    assert list(huggingface.read(tmp_path / "folder").encoders) == [which]


def test_card_of_weights_that_are_not_ours(tiny, tmp_path):
    """A released checkpoint, say: what is known of it, and the licence that such weights have."""
    about = {"source": "the released checkpoint IN1K-vit.h.14-300e.pth.tar", "epoch": 300}
    huggingface.write(tmp_path / "folder", contents(tiny)._replace(about=about), "target")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "- source: the released checkpoint IN1K-vit.h.14-300e.pth.tar\n- epoch: 300\n" in card
    assert "CC BY-NC 4.0" in card


def test_dtype_and_oblong_images(tiny, tmp_path):
    half = {name: value.bfloat16() for name, value in tiny.state_dict().items()}
    oblong = contents(tiny)._replace(encoders={"target": half}, image_size=(16, 36))
    huggingface.write(tmp_path / "folder", oblong, "target")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "folder")
    assert theirs.dtype == torch.bfloat16
    assert patch_features(theirs, torch.randn(1, 3, 16, 36)).shape == (1, 36, 48)
    back = huggingface.read(tmp_path / "folder")
    assert back.image_size == (16, 36)
    assert all(torch.equal(back.encoders["target"][name], value) for name, value in half.items())


def test_bin_files(folder, tiny):
    """What transformers wrote before safetensors: one file, or shards with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    assert torch.equal(huggingface.read(folder).encoders["target"]["pos_embed"], tiny.pos_embed)
    (folder / "pytorch_model.bin").unlink()
    shard_of = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(held)}
    for shard in set(shard_of.values()):
        torch.save({name: value for name, value in held.items() if shard_of[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    back = huggingface.read(folder).encoders["target"]
    assert all(torch.equal(back[name], value) for name, value in tiny.state_dict().items())


def test_defaults_that_the_config_leaves_out(folder):
    """transformers 4 wrote no key that has its default; the default eps is not I-JEPA's."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer_norm_eps", "qkv_bias", "hidden_act", "num_channels"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    (note,) = huggingface.read(folder).about["notes"]
    assert "layer_norm_eps 1e-12" in note


def test_recognise(exported, tmp_path):
    assert huggingface.recognise(exported)
    assert not huggingface.recognise(tmp_path)
    assert not huggingface.recognise(exported / "model.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        huggingface.read(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "dinov2", "architectures": ["Dinov2Model"]}, "Dinov2Model"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.layernorm_before.weight"),
        ({"num_hidden_layers": 1}, "encoder.layer.1"),
        ({"hidden_size": 64}, "width is 48, by its config 64"),
        ({"intermediate_size": 97}, "MLP width is 96, by its config 97"),
        ({"num_attention_heads": 5}, "not a multiple of 5 heads"),
        ({"image_size": 28}, "36 positions"),
        ({"image_size": [24, 24, 24]}, "image_size"),
        ({"patch_size": 6, "image_size": 36}, "(4, 4) pixels"),
        ({"hidden_act": "gelu_new"}, "'gelu_new'"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"ijepa_encoder": "student"}, "'student'"),
    ],
)
def test_config_that_does_not_fit_is_refused(changes, words, folder):
    edit(folder / "config.json", **changes)
    assert words in refusal(folder)


def test_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "ijepa"')
    assert "config.json is not JSON" in refusal(folder)


def test_class_token_is_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=24, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert "holds embeddings.cls_token" in refusal(tmp_path)


def test_extra_and_missing_tensors_are_refused(folder):
    held = load_file(folder / "model.safetensors")
    save_file(held | {"encoder.layer.0.gamma": torch.ones(48)}, folder / "model.safetensors")
    assert "encoder.layer.0.gamma" in refusal(folder)
    del held["encoder.layer.1.attention.attention.key.bias"]
    save_file(held, folder / "model.safetensors")
    assert "encoder.layer.1.attention.attention.key.bias" in refusal(folder)
    held["encoder.layer.1.attention.attention.key.bias"] = torch.ones(47)
    save_file(held, folder / "model.safetensors")
    assert "encoder.layer.1" in refusal(folder)


def test_missing_shard_is_refused(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(shards)


def test_truncated_shard_is_refused(shards):
    path = shards / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    assert "model-00002-of-00002.safetensors is no whole safetensors file" in refusal(shards)


def test_index_that_lies_is_refused(shards):
    index = shards / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    first, last = min(shard_of.values()), max(shard_of.values())
    lies = {
        f"{last} does not hold layernorm.nowhere": shard_of | {"layernorm.nowhere": last},
        f"{first} does not hold layernorm.weight": shard_of | {"layernorm.weight": first},
        "'../elsewhere.safetensors'": shard_of | {"layernorm.weight": "../elsewhere.safetensors"},
        "holds encoder.layer.1": {k: v for k, v in shard_of.items() if not k.startswith("encoder.layer.1.")},
        "no weight_map": ["model.safetensors"],
    }
    for words, lie in lies.items():
        edit(index, weight_map=lie)
        assert words in refusal(shards)


def test_header_that_lies_about_sizes_is_refused(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    assert raw.count(b'"shape":[48,48]') > 1
    path.write_bytes(raw.replace(b'"shape":[48,48]', b'"shape":[48,49]', 1))
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_bin_that_runs_code_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.position_embeddings": RunsCode()}, folder / "pytorch_model.bin")
    assert "could run code" in refusal(folder)
    assert not (folder.parent / "ran").exists()


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(folder)


def test_nothing_is_written_over_or_left_half(tiny, exported, tmp_path, monkeypatch):
    before = sorted(exported.iterdir())
    with pytest.raises(UserError, match="is there already"):
        huggingface.write(exported, contents(tiny), "target")
    assert sorted(exported.iterdir()) == before
    monkeypatch.setattr(huggingface, "model_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        huggingface.write(tmp_path / "folder", contents(tiny), "target")
    assert list(tmp_path.iterdir()) == []
