"""A released I-JEPA YAML is recognised, becomes exactly the recipe of its name, and the run says what it made of it."""
from pathlib import Path

import pytest
import yaml

from ijepa_fast.config import load_config
from ijepa_fast.errors import UserError
from ijepa_fast.released import is_released

CONFIGS = Path(__file__).parent.parent / "configs"


def released(
    *, model: str, patch: int, pixels: int, epochs: int, warmup: int, depth: int, gpu_batch: int
) -> dict[str, dict]:
    """The content of a released file: what differs among the four, and what they share."""
    return {
        "meta": {
            "model_name": model, "pred_depth": depth, "pred_emb_dim": 384, "use_bfloat16": True,
            "load_checkpoint": False, "read_checkpoint": None, "copy_data": False,
        },
        "data": {
            "root_path": "/datasets", "image_folder": "imagenet/", "batch_size": gpu_batch, "crop_size": pixels,
            "crop_scale": [0.3, 1.0], "num_workers": 10, "pin_mem": True, "use_horizontal_flip": False,
            "use_gaussian_blur": False, "use_color_distortion": False, "color_jitter_strength": 0.0,
        },
        "mask": {
            "patch_size": patch, "num_enc_masks": 1, "enc_mask_scale": [0.85, 1.0], "num_pred_masks": 4,
            "pred_mask_scale": [0.15, 0.2], "aspect_ratio": [0.75, 1.5], "min_keep": 10, "allow_overlap": False,
        },
        "optimization": {
            "epochs": epochs, "warmup": warmup, "start_lr": 2e-4, "lr": 1e-3, "final_lr": 1e-6, "weight_decay": 0.04,
            "final_weight_decay": 0.4, "ema": [0.996, 1.0], "ipe_scale": 1.0,
        },
        "logging": {"folder": "/logs/run/", "write_tag": "jepa"},
    }  # fmt: skip


HUGE = {"model": "vit_huge", "depth": 12}
RELEASED = {
    "vith14_in1k": released(**HUGE, patch=14, pixels=224, epochs=300, warmup=40, gpu_batch=128),
    "vith16_448_in1k": released(**HUGE, patch=16, pixels=448, epochs=300, warmup=40, gpu_batch=16),
    "vith14_in22k": released(**HUGE, patch=14, pixels=224, epochs=66, warmup=3, gpu_batch=32),
    "vitg16_in22k": released(
        model="vit_giant", depth=16, patch=16, pixels=224, epochs=44, warmup=3, gpu_batch=16
    ),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(content: dict) -> Path:
        path = tmp_path / "released.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize("recipe", RELEASED)
def test_becomes_the_recipe_of_its_name(recipe, write):
    config, _ = load_config(write(RELEASED[recipe]))
    ours, _ = load_config(CONFIGS / f"{recipe}.yaml")
    for section in ("model", "mask", "optim"):
        assert getattr(config, section).model_dump() == getattr(ours, section).model_dump()
    assert (config.data.image_size, config.data.crop_scale) == (ours.data.image_size, ours.data.crop_scale)
    assert config.data.threads == ours.data.threads
    assert config.data.root == Path("/datasets/imagenet/train")
    assert config.train.folder == Path("/logs/run")


def test_every_value_arrives(write):
    """Ours are other defaults than these, so a key that went elsewhere would show."""
    content = {
        "meta": {"model_name": "vit_small", "pred_depth": 3, "pred_emb_dim": 192},
        "data": {"root_path": "a", "image_folder": "b", "batch_size": 64, "crop_size": 240, "crop_scale": [0.4, 0.9],
                 "num_workers": 3},
        "mask": {"patch_size": 8, "num_enc_masks": 2, "enc_mask_scale": [0.7, 0.8], "num_pred_masks": 5,
                 "pred_mask_scale": [0.1, 0.3], "aspect_ratio": [0.5, 2.0], "min_keep": 7, "allow_overlap": True},
        "optimization": {"epochs": 9, "warmup": 2, "start_lr": 0.1, "lr": 0.2, "final_lr": 0.15, "weight_decay": 0.5,
                         "final_weight_decay": 0.6, "ema": [0.7, 0.8], "ipe_scale": 1.25},
        "logging": {"folder": "c"},
    }  # fmt: skip
    config = load_config(write(content))[0]
    expected = {
        "model": {"name": "vit_small", "patch_size": 8, "predictor_depth": 3, "predictor_dim": 192},
        "data": {"root": Path("a/b/train"), "image_size": 240, "crop_scale": (0.4, 0.9), "threads": 3},
        "mask": {"group": 64, "num_contexts": 2, "context_scale": (0.7, 0.8), "num_targets": 5, "min_keep": 7,
                 "target_scale": (0.1, 0.3), "target_aspect": (0.5, 2.0), "allow_overlap": True},
        "optim": {"micro_batch": 64, "epochs": 9, "warmup_epochs": 2, "start_lr": 0.1, "lr": 0.2, "final_lr": 0.15,
                  "weight_decay": 0.5, "final_weight_decay": 0.6, "momentum": (0.7, 0.8), "schedule_stretch": 1.25},
        "train": {"folder": Path("c")},
    }  # fmt: skip
    for section, values in expected.items():
        assert values == {key: getattr(getattr(config, section), key) for key in values}


def test_every_key_of_the_file_is_accounted_for(write):
    content = RELEASED["vitg16_in22k"]
    _, notes = load_config(write(content))
    for section, keys in content.items():
        for key in keys:
            name = "data.root_path, data.image_folder" if key in ("root_path", "image_folder") else f"{section}.{key}"
            assert any(note.startswith((f"{name}=", f"{name} ->")) for note in notes), name
    assert "mask.patch_size=16 -> model.patch_size=16" in notes
    assert "data.pin_mem=True -> nothing: batches are always pinned on CUDA" in notes
    assert "the published runs' batch -> optim.global_batch_size=2048" in notes


def test_an_address_stays_one(write):
    content = RELEASED["vitg16_in22k"] | {"data": RELEASED["vitg16_in22k"]["data"] | {"root_path": "s3://bucket"}}
    assert load_config(write(content))[0].data.root == "s3://bucket/imagenet/train"


def test_overrides_come_after_the_conversion(write):
    overrides = ("data.root=photos", "optim.global_batch_size=64", "mask.group=16", "model.name=vit_tiny")
    config, _ = load_config(write(RELEASED["vitg16_in22k"]), overrides)
    assert (config.data.root, config.optim.global_batch_size) == (Path("photos"), 64)
    assert (config.mask.group, config.model.name) == (16, "vit_tiny")


def test_without_bfloat16(write):
    content = released(**HUGE, patch=14, pixels=224, epochs=300, warmup=40, gpu_batch=128)
    content["meta"]["use_bfloat16"] = False
    assert load_config(write(content))[0].model.compute_dtype == "float32"


@pytest.mark.parametrize("key", ["use_horizontal_flip", "use_gaussian_blur", "use_color_distortion"])
def test_augmentation_that_is_on_is_refused(key, write):
    content = released(**HUGE, patch=14, pixels=224, epochs=300, warmup=40, gpu_batch=128)
    content["data"][key] = True
    with pytest.raises(UserError, match=rf"released\.yaml: data\.{key} is on.*set it to false$"):
        load_config(write(content))


@pytest.mark.parametrize(("section", "key"), [("optimization", "momentum"), ("data", "rotate"), ("meta", "seed")])
def test_unknown_key_is_refused(section, key, write):
    content = released(**HUGE, patch=14, pixels=224, epochs=300, warmup=40, gpu_batch=128)
    content[section][key] = 1
    with pytest.raises(UserError, match=rf"released\.yaml: {section}\.{key} is no key of a released I-JEPA config"):
        load_config(write(content))


def test_section_that_is_no_section(write):
    content = {**RELEASED["vith14_in1k"], "data": "imagenet"}
    with pytest.raises(UserError, match=r"section data of this released config is 'imagenet'"):
        load_config(write(content))


def test_values_are_checked_like_our_own(write):
    content = released(**HUGE, patch=15, pixels=224, epochs=300, warmup=40, gpu_batch=128)
    with pytest.raises(UserError, match=r"image_size 224 is not divisible by model\.patch_size 15"):
        load_config(write(content))


def test_ours_are_not_taken_for_released():
    for path in CONFIGS.glob("*.yaml"):
        assert not is_released(yaml.safe_load(path.read_text()))
    assert is_released(RELEASED["vith14_in1k"])


def test_the_run_says_what_it_made_of_the_file(write, train, photographs, tmp_path):
    small = (
        f"data.root={photographs}", f"train.folder={tmp_path / 'run'}", "model.name=vit_tiny", "model.patch_size=4",
        "model.predictor_depth=1", "data.image_size=24", "mask.group=4", "mask.min_keep=1", "data.threads=2",
        "optim.global_batch_size=8", "optim.micro_batch=8", "parallel.cpu_threads=1", "data.decoder=pillow",
    )  # fmt: skip
    path = write(RELEASED["vitg16_in22k"])
    outcome = train("--dry-run", *small, config=path)
    assert outcome.code == 0, outcome.err
    lines = " ".join(outcome.out.split())  # a narrow terminal wraps them
    assert "released config: data.use_gaussian_blur=False -> nothing" in lines
    assert lines.count("released config: ") == len(load_config(path)[1])
