"""The config: recipes hold the published numbers, and every mistake is one sentence that says what would be right."""
from pathlib import Path

import pytest
import torch
import yaml

from ijepa_fast import yaml_core
from ijepa_fast.config import Config, check_same_run, load_config, validate
from ijepa_fast.errors import UserError
from ijepa_fast.remarks import remarks

CONFIGS = Path(__file__).parent.parent / "configs"

# recipe: model, patch, pixels, epochs, warm-up, predictor depth, batch of one GPU, number of GPUs. The released files
# and, for B/16 and L/16, the paper's table 8 (arXiv 2301.08243), which has neither of the last two.
PUBLISHED = {
    "vith14_in1k": ("vit_huge", 14, 224, 300, 40, 12, 128, 16),
    "vith16_448_in1k": ("vit_huge", 16, 448, 300, 40, 12, 16, 128),
    "vith14_in22k": ("vit_huge", 14, 224, 66, 3, 12, 32, 64),
    "vitg16_in22k": ("vit_giant", 16, 224, 44, 3, 16, 16, 128),
    "vitl16_in1k": ("vit_large", 16, 224, 600, 40, 12, None, None),
    "vitb16_in1k": ("vit_base", 16, 224, 600, 40, 6, None, None),
}
RECIPES = [*PUBLISHED, "vits16_in1k"]


def load(text: str, *overrides: str, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)[0]


def mistake(text: str, *overrides: str, folder: Path) -> str:
    """The sentence that `text` with `overrides` is refused with."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides, folder=folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_every_recipe_is_there():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RECIPES, "demo", "small"}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe_has_the_published_numbers(recipe):
    config, notes = load_config(CONFIGS / f"{recipe}.yaml")
    assert notes == []
    name, patch, pixels, epochs, warmup, depth, gpu_batch, gpus = PUBLISHED[recipe]
    model, mask, data, optim = config.model, config.mask, config.data, config.optim
    assert (model.name, model.patch_size, model.predictor_depth, model.predictor_dim) == (name, patch, depth, 384)
    assert (data.image_size, data.crop_scale) == (pixels, (0.3, 1.0))
    assert (optim.epochs, optim.warmup_epochs, optim.global_batch_size) == (epochs, warmup, 2048)
    if gpus is not None:
        assert gpu_batch * gpus == 2048
        assert mask.group == gpu_batch


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_what_all_published_runs_share(recipe):
    config, _ = load_config(CONFIGS / f"{recipe}.yaml")
    mask, optim = config.mask, config.optim
    assert (mask.sampler, mask.collate, mask.views, mask.max_keep) == ("reference", "truncate", 1, None)
    assert (mask.num_contexts, mask.context_scale) == (1, (0.85, 1.0))
    assert (mask.num_targets, mask.target_scale, mask.target_aspect) == (4, (0.15, 0.2), (0.75, 1.5))
    assert (mask.min_keep, mask.allow_overlap) == (10, False)
    assert (optim.start_lr, optim.lr, optim.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (optim.betas, optim.eps, optim.momentum) == ((0.9, 0.999), 1e-8, (0.996, 1.0))
    assert (optim.loss, optim.schedule_stretch, optim.epoch_length) == ("smooth_l1", 1.0, None)
    assert (config.model.compute_dtype, config.model.residual_dtype) == ("auto", "float32")
    assert config.train.folder == Path("runs") / recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_names_the_ragged_alternative(recipe):
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    assert any("ragged" in line.partition("#")[2] for line in text.splitlines())


@pytest.mark.parametrize("recipe", [*RECIPES, "demo"])
def test_recipe_spells_out_only_known_sections_and_loads_back(recipe, tmp_path):
    config, _ = load_config(CONFIGS / f"{recipe}.yaml")
    assert load(config.to_yaml(), folder=tmp_path) == config


def test_overrides_are_yaml_values(tmp_path):
    config = load(
        "data: {root: a}",
        "optim.lr=1e-4",  # no float in YAML 1.1, and still a number
        "optim.epochs=7",
        "mask.target_scale=[0.1, 0.3]",
        "mask.allow_overlap=true",
        "mask.group=64",
        "log.probe_every=null",
        "data.root=/b=c/ d",
        "train.init_from=x",
        folder=tmp_path,
    )
    assert (config.optim.lr, config.optim.epochs, config.mask.group) == (1e-4, 7, 64)
    assert config.mask.target_scale == (0.1, 0.3)
    assert config.mask.allow_overlap is True
    assert config.log.probe_every is None
    assert config.data.root == Path("/b=c/ d")
    assert config.train.init_from == Path("x")


@pytest.mark.parametrize("text", ["2026-11-25", "007", "no", "a #1", "[a]", "1e-3", "'quoted'", "0o10"])
def test_an_override_of_a_path_is_text_as_it_stands(text, tmp_path):
    config = load("data: {root: a}", f"train.folder={text}", f"train.init_from={text}", folder=tmp_path)
    assert (str(config.train.folder), str(config.train.init_from)) == (text, text)
    assert load(config.to_yaml(), folder=tmp_path) == config  # and survives being saved


def test_a_root_may_be_an_address(tmp_path):
    config = load("data: {root: s3://bucket/a}", "data.probe_root=hf://datasets/x/y#z: 1", folder=tmp_path)
    assert (config.data.root, config.data.probe_root) == ("s3://bucket/a", "hf://datasets/x/y#z: 1")
    assert load(config.to_yaml(), folder=tmp_path) == config
    assert load("data: {root: s3://a}", "data.root=s3:/b", folder=tmp_path).data.root == Path("s3:/b")


def test_an_optional_path_can_be_taken_back(tmp_path):
    text = "data: {root: a}\ntrain: {init_from: b}"
    assert load(text, "train.init_from=null", folder=tmp_path).train.init_from is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("0o10", 8), ("0x1F", 31), ("1:30", "1:30"), ("no", "no"), ("2026-11-25", "2026-11-25"),
     ("1e-3", 1e-3), ("-.inf", float("-inf")), ("null", None), ("~", None), ("True", True), ("1_000", "1_000")],
)  # fmt: skip
def test_values_are_read_as_yaml_1_2_has_them(text, value):
    """https://yaml.org/spec/1.2.2/#103-core-schema: 1.1 makes 8, 90, false, a date and 1000 of some."""
    assert yaml_core.parse(text) == value


def test_numbers_in_overrides_are_decimal(tmp_path):
    assert load("data: {root: a}", "train.seed=010", folder=tmp_path).train.seed == 10


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("vits16_in1k") == load_config(CONFIGS / "vits16_in1k.yaml")
    with pytest.raises(UserError, match=r"nor a recipe vits15_in1k; the recipes are demo, small, vitb16_in1k"):
        load_config("vits15_in1k")
    (tmp_path / "vits16_in1k").write_text("data: {root: mine}")  # a file of that name comes first
    assert load_config("vits16_in1k")[0].data.root == Path("mine")


def test_remarks_on_what_the_run_never_comes_to():
    base = {"data": {"root": "a"}}
    assert remarks(validate(base, "x"), 100) == []
    short = {"optim": {"epochs": 2}, "log": {"probe_every": 300}, "train": {"checkpoint_every": 201}}
    warmup, probes, checkpoints = remarks(validate(base | short, "x"), 100)
    # 2 of 40 epochs from 2e-4 up to 1e-3
    assert warmup.endswith("its learning rate ends at 0.00024 and never comes to optim.lr=0.001")
    assert probes == "log.probe_every=300 is past the end, step 200: probes at both ends"
    assert checkpoints == "train.checkpoint_every=201 is past the end, step 200: one at the end"
    (down,) = remarks(validate(base | {"optim": {"lr": 1e-4}}, "x"), 1000)
    assert down == "optim.start_lr=0.0002 is above optim.lr=0.0001: the warm-up goes down"


@pytest.mark.parametrize("capable", [True, False])
def test_remark_on_bfloat16_where_a_cpu_is_slow_at_it(capable, monkeypatch):
    config = validate({"data": {"root": "a"}, "model": {"compute_dtype": "bfloat16"}}, "x")
    found = {"avx2": True, "avx512_bf16": capable, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    slow = "this CPU has no instructions for model.compute_dtype=bfloat16: float32 is faster on it"
    assert remarks(config, 1000, "cpu") == ([] if capable else [slow])
    assert remarks(config, 1000, "cuda") == []


def test_the_last_override_of_a_key_counts(tmp_path):
    assert load("data: {root: a}", "optim.lr=1", "optim.lr=2", folder=tmp_path).optim.lr == 2


@pytest.mark.parametrize("override", ["optim.lr", "lr=1", "optim.=1", ".lr=1", "=", "", "--lr"])
def test_malformed_override(override, tmp_path):
    sentence = mistake("data: {root: a}", override, folder=tmp_path)
    assert repr(override) in sentence
    assert "section.key=value" in sentence


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.learning_rate", "optim has global_batch_size"),  # nothing near: all there are
        ("optim.epoch", "optim.epochs"),
        ("optim.warmup_epoch", "optim.warmup_epochs"),
        ("model.patchsize", "model.patch_size"),
        ("mask.num_target", "mask.num_targets"),
        ("data.crop_size", "data.crop_scale"),
        ("train.lr", "optim.lr"),  # the right key in the wrong section
        ("optim.seed", "train.seed"),
        ("optim.lr.x", "optim.lr"),  # a key is one word
        ("optimizer.lr", "optim"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(key, nearest, tmp_path):
    sentence = mistake("data: {root: a}", f"{key}=1", folder=tmp_path)
    assert f"unknown key {key if not key.startswith('optimizer') else 'optimizer'};" in sentence
    assert nearest in sentence


def test_every_unknown_key_is_named_at_once(tmp_path):
    sentence = mistake("data: {root: a, foo: 1}\noptim: {bar: 2}", folder=tmp_path)
    assert "data.foo" in sentence
    assert "optim.bar" in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.epochs=many", ["optim.epochs='many'", "integer"]),
        ("optim.epochs=1.5", ["optim.epochs=1.5", "integer"]),
        ("optim.epochs=0", ["optim.epochs=0", "greater than or equal to 1"]),
        ("optim.epochs=true", ["optim.epochs: takes neither true nor false"]),  # and to Python 1
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.lr=.nan", ["optim.lr=nan", "finite"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.eps=0", ["optim.eps=0", "greater than 0"]),
        ("optim.weight_decay=-0.1", ["optim.weight_decay=-0.1", "greater than or equal to 0"]),
        ("optim.betas=[0.9, 1.0]", ["optim: betas must both be at least 0 and below 1"]),
        ("optim.momentum=[0.9, 1.5]", ["optim: momentum must be [first, last], both from 0 to 1"]),
        ("train.seed=9223372036854775808", ["train.seed=9223372036854775808", "less than"]),
        ("train.folder=$put_a_path_here", ["train.folder: $put_a_path_here is a placeholder"]),
        ("optim.lr=false", ["optim.lr: takes neither true nor false"]),
        ("optim.momentum=0.9", ["optim.momentum=0.9", "list of two numbers"]),
        ("optim.momentum=[0.9]", ["optim.momentum"]),
        ("optim.betas=[0.9, high]", ["optim.betas.1='high'", "number"]),
        ("model.name=vit_enormous", ["model.name='vit_enormous'", "'vit_giant'"]),
        ("mask.allow_overlap=maybe", ["mask.allow_overlap='maybe'", "boolean"]),
        ("mask.views=[1]", ["mask.views=[1]", "integer"]),
        ("parallel.compile=maybe", ["parallel.compile='maybe'", "True, False or 'auto'"]),
        ("data.root=null", ["data.root=None", "path"]),
        ("data.root=", ["data.root: is empty", "current folder"]),
        ("train.folder=~nosuchuser/x", ["train.folder: ~nosuchuser/x names the home of a user who does not exist"]),
        ("train.init_from=a\0b", ["train.init_from: 'a\\x00b' cannot be the name of a file"]),
        ("data.probe_root=a\udc80", ["data.probe_root: 'a\\udc80' cannot be the name of a file"]),
        ("model.predictor_depth=1e12", ["model.predictor_depth=1000000000000.0", "less than or equal to 256"]),
        ("model.predictor_dim=1180591620717411303424", ["model.predictor_dim", "less than or equal to 16384"]),
        ("parallel.cpu_threads=1e12", ["parallel.cpu_threads", "less than or equal to 1024"]),
        ("data.threads=2000", ["data.threads=2000", "less than or equal to 1024"]),
        ("data.threads=1:30", ["data.threads='1:30'", "integer"]),
        ("data.threads=" + "9" * 5000, ["data.threads='99999", "(5002 characters) Unable to parse"]),
        ("data.image_size=1e12", ["data.image_size", "less than or equal to 4096"]),
        ("model.patch_size=1", ["model.patch_size 1 makes 224 x 224 patches", "at most 128 x 128"]),
        ("optim.micro_batch=1e12", ["optim.micro_batch", "less than or equal to 1048576"]),
        ("optim.epochs=1e12", ["optim.epochs", "less than or equal to 1000000"]),
        ("optim.lr=1e308", ["optim.lr=1e+308", "less than or equal to 1000"]),
        ("optim.weight_decay=1e308", ["optim.weight_decay", "less than or equal to 1000"]),
        ("optim.eps=1e300", ["optim.eps=1e+300", "less than or equal to 1"]),
        ("optim.schedule_stretch=1e300", ["optim.schedule_stretch", "less than or equal to 1000"]),
        ("mask.num_targets=1e12", ["mask.num_targets", "less than or equal to 64"]),
        ("mask.num_contexts=1e12", ["mask.num_contexts", "less than or equal to 64"]),
        ("mask.views=1e12", ["mask.views", "less than or equal to 64"]),
        ("mask.target_aspect=[1, 1e300]", ["target_aspect", "<= 1000"]),
        ("optim.momentum=[1, 1]", ["optim: momentum [1, 1] would leave the target encoder at its random weights"]),
        ("optim.final_lr=0.01", ["optim: final_lr 0.01 is above lr 0.001"]),
        ("log.every=1e12", ["log.every", "less than or equal to 1000000000"]),
        ("train.seed=-1", ["train.seed=-1", "greater than or equal to 0"]),
        ("mask.target_scale=[0.2, 0.1]", ["target_scale", "0 < low <= high <= 1"]),
        ("mask.context_scale=[0.5, 1.5]", ["context_scale", "<= 1"]),
        ("mask.target_aspect=[0, 1]", ["target_aspect", "0 < low <= high"]),
        ("mask.max_keep=50", ["max_keep", "ragged"]),
        ("data.crop_scale=[0, 1]", ["data", "crop_scale", "0 < low"]),
        ("optim.schedule_stretch=0.5", ["optim.schedule_stretch=0.5", "greater than or equal to 1"]),
        ("data.image_size=225", ["data.image_size 225", "not divisible", "model.patch_size 16"]),
        ("mask.group=100", ["mask.group 100", "optim.global_batch_size 2048", "mask.group=4"]),
    ],
)
def test_wrong_value(override, words, tmp_path):
    sentence = mistake("data: {root: a}", override, folder=tmp_path)
    for word in words:
        assert word in sentence


def test_ragged_contexts_need_no_group_that_divides(tmp_path):
    load("data: {root: a}", "mask.group=100", "mask.collate=ragged", folder=tmp_path)


def test_suggested_group_is_accepted(tmp_path):
    load("data: {root: a}", "mask.group=4", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["must hold sections", "data"]),
        ("- a\n- b", ["must hold sections"]),
        ("just words", ["must hold sections", "'just words'"]),
        ("data: {root: [}", ["not YAML"]),
        ("data: {root: a}\n\tx: 1", ["not YAML"]),
        ("\x00", ["not YAML"]),
        ("{}", ["data is missing"]),
        ("data: {image_size: 224}", ["data.root is missing"]),
        ("data: 5", ["data=5"]),
        ("data: {root: a}\noptim:", ["optim"]),
        ("data: {root: a}\n5: 6", ["Keys should be strings"]),
        ("data: {root: a}\noptim:\n  lr: 1\n  lr: 2", ["not YAML: line 4: lr is given twice, first in line 3"]),
        ("data: {root: a}\nmodel: {}\ndata: {root: b}", ["line 3: data is given twice, first in line 1"]),
        ("data: {root: 007}", ["data.root: 7 is a number to YAML: put it in quotes"]),
        ("data: {root: ''}", ["data.root: is empty"]),
        ("a: &a [x]\ndata: {root: *a}", ["line 2: *a stands for more than one value"]),
        ("a: &a {b: c}\ndata: *a", ["line 2: *a stands for more than one value"]),
        ("[" * 5000, ["nested too deep"]),
        ("data: {root: a, threads: " + "9" * 5000 + "}", ["a number of 5000 digits"]),
        ("data: {root: a}\noptim: [" + "1, " * 5000 + "2]", ["optim=[1, 1, 1, 1, 1, 1, ...]"]),
    ],
)
def test_file_that_is_no_config(text, words, tmp_path):
    sentence = mistake(text, folder=tmp_path)
    assert str(tmp_path / "config.yaml") in sentence
    for word in words:
        assert word in sentence


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"config .*/none\.yaml cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_override_of_what_is_no_section(tmp_path):
    assert "section data" in mistake("data: 5", "data.root=a", folder=tmp_path)


# For every key, a value that is not the default.
OTHER = {
    "model": {
        "name": "vit_base", "patch_size": 8, "predictor_depth": 5, "predictor_dim": 192, "compute_dtype": "bfloat16",
        "residual_dtype": "bfloat16",
        "target_dtype": "fp8",
        "fp8_blocks": "all",
    },
    "mask": {
        "sampler": "corrected", "collate": "ragged", "group": 64, "views": 2, "max_keep": 99, "min_keep": 9,
        "num_contexts": 2, "num_targets": 3, "context_scale": [0.8, 1.0], "target_scale": [0.1, 0.2],
        "target_aspect": [1.0, 1.5], "allow_overlap": True,
    },
    "data": {
        "root": "b", "probe_root": "c", "image_size": 448, "crop_scale": [0.4, 1.0], "decoder": "dali", "threads": 3,
        "shuffle": "shards", "limit": 5, "classes": ["d"], "list": "e", "max_pixels": 1000, "max_bad_fraction": 0.1,
    },
    "optim": {
        "global_batch_size": 1024, "micro_batch": 64, "epochs": 100, "epoch_length": 10, "warmup_epochs": 5,
        "start_lr": 1e-4, "lr": 2e-3, "final_lr": 1e-5, "weight_decay": 0.05, "final_weight_decay": 0.3,
        "betas": [0.9, 0.95], "eps": 1e-6, "momentum": [0.99, 1.0], "schedule_stretch": 1.25, "loss": "l2",
    },
    "train": {"folder": "elsewhere", "seed": 1, "init_from": "x", "checkpoint_every": 5, "keep_last": 1, "profile": 2,
              "cuda_graph": False},
    "parallel": {"strategy": "ddp", "shard_size": 2, "checkpointing": "full", "compile": True, "cpu_threads": 2},
    "log": {
        "every": 1, "probe_every": 5, "probe_images": 10, "progress": False, "tensorboard": False, "wandb": True,
        "mlflow": True,
    },
}  # fmt: skip
# What a run may be resumed with; every key that is not named here decides what is computed.
FREE = {
    *(("parallel", key) for key in OTHER["parallel"]),
    *(("log", key) for key in OTHER["log"]),
    *(("data", key) for key in ("probe_root", "decoder", "threads", "max_bad_fraction")),
    *(("train", key) for key in ("folder", "init_from", "checkpoint_every", "keep_last", "cuda_graph", "profile")),
    ("optim", "micro_batch"),
}
KEYS = [(section, key) for section, keys in OTHER.items() for key in keys]


def test_a_run_is_not_resumed_with_another_precision_of_pixels():
    old, new = validate({"data": {"root": "a"}}, "old"), validate({"data": {"root": "a", "decoder": "scaled"}}, "new")
    for one, other in ((old, new), (new, old)):
        with pytest.raises(UserError, match=r"data\.decoder="):
            check_same_run(one, other, Path("x"))


def test_the_table_above_has_every_key():
    fields = Config.model_fields
    assert {s: set(keys) for s, keys in OTHER.items()} == {s: set(f.annotation.model_fields) for s, f in fields.items()}


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_resumed_run_may_change_only_what_does_not_count(section, key):
    base = {"data": {"root": "a"}, "mask": {"collate": "ragged" if key == "max_keep" else "truncate"}}
    changed = {**base, section: {**base.get(section, {}), key: OTHER[section][key]}}
    old, new = validate(base, "old"), validate(changed, "new")
    assert old != new
    if (section, key) in FREE:
        check_same_run(old, new, Path("runs/x/config.yaml"))
        return
    with pytest.raises(UserError) as caught:
        check_same_run(old, new, Path("runs/x/config.yaml"))
    sentence = str(caught.value)
    assert sentence.startswith("runs/x/config.yaml was written with ")
    assert f"{section}.{key}=" in sentence
    assert "\n" not in sentence


def test_the_first_key_that_differs_is_named_the_same_each_time():
    old = validate({"data": {"root": "a"}}, "old")
    new = validate({"data": {"root": "b"}, "optim": {"epochs": 5, "lr": 1.0}}, "new")
    with pytest.raises(UserError, match=r"optim\.epochs=300, not 5"):
        check_same_run(old, new, Path("x"))


def test_values_survive_yaml(tmp_path):
    config = validate({"data": {"root": "a"}, **{s: OTHER[s] for s in OTHER if s != "data"}}, "other")
    assert yaml.safe_load(config.to_yaml())["optim"]["momentum"] == [0.99, 1.0]
    assert load(config.to_yaml(), folder=tmp_path) == config


def test_paths_expand_the_home_folder_and_one_folder_has_many_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load("data: {root: ~/images}", "train.folder=~/run", folder=tmp_path)
    assert (config.data.root, config.train.folder) == (tmp_path / "images", tmp_path / "run")
    (tmp_path / "images").mkdir()
    (tmp_path / "same").symlink_to(tmp_path / "images")
    other = load(f"data: {{root: {tmp_path}/same}}", "train.folder=~/run", folder=tmp_path)
    check_same_run(config, other, tmp_path)
