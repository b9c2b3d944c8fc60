"""The typed config: a YAML file and `section.key=value` overrides become a checked, frozen `Config`.

`load_config` reads our own YAML files, and released I-JEPA ones (`ijepa_fast.released`) as they are. Every mistake is a
`UserError` of one sentence. Keys and defaults are documented where they stand, below; `--print-config` shows all.
"""
import contextlib
import difflib
import math
import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from ijepa_fast import yaml_core
from ijepa_fast.data.storage import is_remote
from ijepa_fast.errors import UserError

Range = tuple[float, float]


def _text(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError(f"{value} is a number to YAML: put it in quotes")
    if value == "":
        raise ValueError("is empty: put a path there, or . for the current folder")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ValueError(f"{value!a} cannot be the name of a file: it is no UTF-8 text, or holds a NUL")
    return value


def _path(path: Path) -> Path:
    if str(path).startswith("$"):
        raise ValueError(f"{path} is a placeholder: put a path there")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} names the home of a user who does not exist here") from None


def _root(value: Any) -> Any:
    if not isinstance(value, str | Path):
        value = _text(value)
        raise PydanticCustomError("path_type", "Input is not a valid path")
    return _text(value) if is_remote(value) else _path(Path(_text(value)))


UserPath = Annotated[Path, BeforeValidator(_text), AfterValidator(_path)]
Root = Annotated[Path | str, BeforeValidator(_root)]  # a string where it is an address, as s3://bucket/folder
# Upper bounds are far above what anyone means: they catch a slip of the keyboard before it becomes an allocation.
Rate = Annotated[float, Field(ge=0, le=1000)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=64)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
MOST_PATCHES = 128  # along a side: beyond, attention over the whole image takes minutes a step on any device


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        annotation: Any = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and True not in get_args(annotation):
            raise ValueError("takes neither true nor false")
        return value


class ModelConfig(Section):
    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"] = "vit_small"
    patch_size: Pixels = 16
    predictor_depth: Annotated[int, Field(ge=1, le=256)] = 6
    predictor_dim: Annotated[int, Field(ge=1, le=16384)] = 384
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on a CPU
    residual_dtype: Literal["float32", "bfloat16"] = "float32"  # float32 as in the released code
    target_dtype: Literal["compute", "fp8"] = "compute"  # fp8: the target encoder multiplies in e4m3
    fp8_blocks: Literal["inner", "all"] = "inner"  # inner: not the target encoder's first and last block


class MaskConfig(Section):
    sampler: Literal["reference", "corrected"] = "reference"  # reference: the released sampler's distribution
    collate: Literal["truncate", "ragged"] = "truncate"  # truncate: contexts cut to their group's minimum, as released
    group: Count = 128  # truncate cuts within this many consecutive positions: the released run's per-GPU batch
    views: Few = 1  # (context, targets) sets an image, for one target forward
    max_keep: Count | None = None  # ragged: the most tokens of a context, to bound memory
    min_keep: Annotated[int, Field(ge=0)] = 10  # a block must keep more tokens than this
    num_contexts: Few = 1
    num_targets: Few = 4
    context_scale: Range = (0.85, 1.0)  # share of the image's patches
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    allow_overlap: bool = False  # whether a context may hold target tokens

    @model_validator(mode="after")
    def _ranges(self) -> "MaskConfig":
        for name in ("context_scale", "target_scale", "target_aspect"):
            low, high = getattr(self, name)
            top = 1 if name.endswith("scale") else 1000
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high <= {top}")
        if self.max_keep is not None and self.collate != "ragged":
            raise ValueError("max_keep bounds ragged contexts only; set collate to ragged or leave max_keep out")
        return self


class DataConfig(Section):
    root: Root  # a folder of images, at any depth, or its address; its sub-folders, if any, are the classes
    probe_root: Root | None = None  # a labelled folder for the probes; left out: `root`, where it has classes
    image_size: Pixels = 224
    crop_scale: Range = (0.3, 1.0)  # area of the random resized crop
    decoder: Literal["auto", "dali", "pillow", "scaled", "turbo"] = "auto"  # see data.decoder; tune measures them
    threads: Threads = 8  # that read and decode; has no influence on what a run computes
    # full: a permutation of all images. shards: of blocks of neighbours, shuffled within windows, for slow storage
    shuffle: Literal["full", "shards"] = "full"
    limit: Count | None = None  # train on this many images, taken evenly
    classes: tuple[str, ...] | None = None  # train on these classes only
    max_pixels: Count = 178_956_970  # of an image, which is bad beyond it: it would take the memory of a whole batch
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the images read, beyond which a run stops

    list: UserPath | None = None  # train on the images that this file names, a path or `path,label` a line

    @model_validator(mode="after")
    def _crop(self) -> "DataConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("crop_scale must be [low, high] with 0 < low <= high <= 1")
        return self


class OptimConfig(Section):
    global_batch_size: Batch = 2048
    micro_batch: Batch = 128  # images a rank holds at once; gradients accumulate up to the global batch
    epochs: Annotated[int, Field(ge=1, le=10**6)] = 300
    epoch_length: Count | None = None  # updates that count as an epoch; left out: one pass over the images
    warmup_epochs: Annotated[float, Field(ge=0)] = 40
    start_lr: Rate = 2e-4
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    final_lr: Rate = 1e-6
    weight_decay: Rate = 0.04
    final_weight_decay: Rate = 0.4
    betas: Range = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    momentum: Range = (0.996, 1.0)  # of the EMA, first and last step
    schedule_stretch: Annotated[float, Field(ge=1, le=1000)] = 1.0  # the schedules end so many times later than the run
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"

    @model_validator(mode="after")
    def _bounds(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must both be at least 0 and below 1")
        if not all(0 <= momentum <= 1 for momentum in self.momentum):
            raise ValueError("momentum must be [first, last], both from 0 to 1")
        if self.momentum == (1, 1):
            raise ValueError("momentum [1, 1] would leave the target encoder at its random weights for ever")
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr {self.final_lr:g} is above lr {self.lr:g}: the learning rate has to fall")
        return self


class TrainConfig(Section):
    folder: UserPath = Path("runs/ijepa")  # everything a run writes
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: UserPath | None = None  # weights of any format (ijepa_fast.load) to start from
    checkpoint_every: Count | None = None  # steps; left out: once an epoch
    keep_last: Count = 3  # checkpoints
    cuda_graph: Literal[True, False, "auto"] = "auto"  # true: a step's kernels in one launch; auto: no
    profile: Count | None = None  # updates, after the first few, of which a trace and a table are written


class ParallelConfig(Section):
    # auto: single for one process; for several, ddp, or fsdp for the huge and the giant on GPUs
    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: Count | None = None  # hsdp: ranks that share one copy of the model; left out: those of a node
    checkpointing: Literal["none", "selective", "full"] = "none"  # selective keeps matrix products and attention
    compile: Literal[True, False, "auto"] = "auto"  # all blocks, by torch.compile; auto: no
    cpu_threads: Threads | None = None  # torch's own; left out: the machine's cores. Part of bit-exactness on a CPU


class LogConfig(Section):
    every: Count = 10  # steps between two reads of the loss from the device
    probe_every: Count | None = 1000  # steps between two probes (RankMe, k-NN, linear); null: none
    probe_images: Count = 2000  # the most images a probe looks at
    progress: bool = True  # the bar; without it, or where output is no terminal, a line every `every` steps
    tensorboard: bool = True
    wandb: bool = False  # Weights & Biases, the extra `wandb`; where to: its own environment variables
    mlflow: bool = False  # the extra `mlflow`; into train.folder/mlruns, or where MLFLOW_TRACKING_URI says


class Config(Section):
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not divisible by model.patch_size {self.model.patch_size}"
            )
        if self.grid > MOST_PATCHES:
            raise ValueError(
                f"model.patch_size {self.model.patch_size} makes {self.grid} x {self.grid} patches of an image of "
                f"data.image_size {self.data.image_size}: at most {MOST_PATCHES} x {MOST_PATCHES}"
            )
        batch, group = self.optim.global_batch_size, self.mask.group
        if self.mask.collate == "truncate" and batch % group:
            raise ValueError(
                f"mask.group {group} does not divide optim.global_batch_size {batch}: truncation needs whole groups, "
                f"for instance mask.group={math.gcd(batch, group)}"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.data.image_size // self.model.patch_size

    def to_yaml(self) -> str:
        return yaml_core.dump(self.model_dump(mode="json"))


# Keys that may change when a run is resumed, because its results do not depend on them, or hardly: micro_batch changes
# the order of a sum, decoder at most a grey level. All other keys of these sections must stay the same.
_EXACT = {
    "model": set(),
    "mask": set(),
    "optim": {"micro_batch"},
    "data": {"probe_root", "decoder", "threads", "max_bad_fraction"},
    "train": {"folder", "init_from", "checkpoint_every", "keep_last", "cuda_graph", "profile"},
}


_RETIRED = {"log.crop_knn"}  # earlier versions wrote them into config.yaml and checkpoint.json


def check_same_run(old: Config, new: Config, where: Path, *, extend: bool = False) -> None:
    """Raise a `UserError` naming the first key in which `new` would not continue the run that wrote `old`.

    `extend`: more epochs are no such key.
    """
    longer = new.optim.epochs > old.optim.epochs
    for section, free in _EXACT.items():
        before, after = getattr(old, section).model_dump(mode="json"), getattr(new, section).model_dump(mode="json")
        for key in before:
            if (section, key) == ("data", "root") and os.path.realpath(before[key]) == os.path.realpath(after[key]):
                continue  # another name of the same folder
            if (section, key) == ("optim", "epochs") and longer:
                if extend:
                    continue
                raise UserError(
                    f"{where} was written with optim.epochs={before[key]}, not {after[key]}: --resume --extend goes on "
                    f"to the longer run's end, on its schedules; or start anew with its weights, by "
                    f"train.init_from={where.parent} in another train.folder"
                )
            # The decoders agree within a grey level, but for this one.
            scaled = (section, key) == ("data", "decoder") and "scaled" in (before[key], after[key])
            if (key not in free or scaled) and before[key] != after[key]:
                raise UserError(
                    f"{where} was written with {section}.{key}={before[key]}, not {after[key]}: "
                    f"resume with the old value, or start anew in another train.folder"
                )


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> tuple[Config, list[str]]:
    """Read `path` (ours, a released I-JEPA YAML, or a shipped recipe's name) and apply `section.key=value` overrides.

    Returns the config and, for a released file, a line on each of its keys (else an empty list).
    """
    from ijepa_fast.released import convert_released, is_released

    path = find_config(path)
    raw, notes = _read_yaml(path), list[str]()
    if is_released(raw):
        raw, notes = convert_released(raw, path)
    for override in overrides:
        _apply(raw, override)
    return validate(raw, str(path)), notes


def find_config(name: str | Path) -> Path:
    """A path as it is; the name of a shipped recipe, where no file has that name, is the recipe's file."""
    path = Path(name)
    if path.name != str(name) or path.suffix or path.exists():
        return path
    folder = Path(__file__).parent / "configs"  # of an installed package; in a checkout they lie beside the package
    folder = folder if folder.is_dir() else Path(__file__).parents[1] / "configs"
    if not (shipped := folder / f"{name}.yaml").exists():
        names = ", ".join(sorted(recipe.stem for recipe in folder.glob("*.yaml")))
        raise UserError(f"there is neither a file nor a recipe {name}; the recipes are {names}")
    return shipped


def load_saved_config(path: Path) -> Config:
    """The config.yaml of a run folder, an earlier version's included."""
    return validate(drop_retired(_read_yaml(path)), str(path))


def drop_retired(raw: dict[str, Any]) -> dict[str, Any]:
    """A config that a run has saved, without the keys that this version no longer has."""
    return {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in _RETIRED}
        for section, keys in raw.items()
    }


def validate(raw: dict[str, Any], source: str) -> Config:
    """A `Config` from nested plain values; `source` names their origin in the error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_sentence(e) for e in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml_core.parse(path.read_text())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"config {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must hold sections ({', '.join(Config.model_fields)}), not {brief(raw)}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"override {override!r} is not of the form section.key=value, for instance optim.lr=1e-3")
    value: Any = text
    if not _takes_text(section, key) or text == "null":
        with contextlib.suppress(ValueError):  # what is no YAML is text, of which the schema says what it thinks
            value = yaml_core.parse(text)
    target = raw.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(
            f"override {override!r}: section {section} of the config is {brief(target)}, not a set of keys"
        )
    target[key] = value


def _takes_text(section: str, key: str) -> bool:
    """Whether a key is a path: then an override of it is no YAML, but text as it stands (null alone is none)."""
    if section not in Config.model_fields or key not in _keys(section):
        return False
    section_type: Any = Config.model_fields[section].annotation
    return _holds_path(section_type.model_fields[key].annotation)


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(part) for part in get_args(annotation))


def brief(value: Any) -> str:
    """`repr` of a value that a user wrote, cut where it is long."""
    text = reprlib.repr(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _sentence(error: ErrorDetails) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(error["loc"])
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return f"{place}: {message}" if place else message
    if error["type"] == "tuple_type":
        message = "should be a list of two numbers"
    return f"{place}={brief(error['input'])} {message}"


def _keys(section: str) -> list[str]:
    """The keys of a section of the config."""
    section_type: Any = Config.model_fields[section].annotation
    return list(section_type.model_fields)


def _unknown(loc: tuple[int | str, ...]) -> str:
    """A sentence on an unknown key that names the nearest known one, or all there are."""
    *parents, key = map(str, loc)
    keys = _keys(parents[0]) if parents else list(Config.model_fields)
    place = ".".join([*parents, key])
    if near := difflib.get_close_matches(key, keys, n=1, cutoff=0.6):
        return f"unknown key {place}; did you mean {'.'.join([*parents, near[0]])}?"
    for section in Config.model_fields:  # the right key in the wrong section
        if key in _keys(section):
            return f"unknown key {place}; did you mean {section}.{key}?"
    return f"unknown key {place}; {'.'.join(parents) or 'the config'} has {', '.join(keys)}"
