"""Released I-JEPA YAML files (sections data, logging, mask, meta, optimization), converted as they are."""
import os
from pathlib import Path
from typing import Any

from ijepa_fast.data.storage import is_remote
from ijepa_fast.errors import UserError

SECTIONS = {"data", "logging", "mask", "meta", "optimization"}

# released section.key -> ours. `data.batch_size` is the batch of one GPU there: our mask.group and micro_batch.
_KEYS = {
    "meta.model_name": "model.name",
    "meta.pred_depth": "model.predictor_depth",
    "meta.pred_emb_dim": "model.predictor_dim",
    "mask.patch_size": "model.patch_size",
    "mask.allow_overlap": "mask.allow_overlap",
    "mask.aspect_ratio": "mask.target_aspect",
    "mask.enc_mask_scale": "mask.context_scale",
    "mask.pred_mask_scale": "mask.target_scale",
    "mask.min_keep": "mask.min_keep",
    "mask.num_enc_masks": "mask.num_contexts",
    "mask.num_pred_masks": "mask.num_targets",
    "data.batch_size": "mask.group",
    "data.crop_scale": "data.crop_scale",
    "data.crop_size": "data.image_size",
    "data.num_workers": "data.threads",
    "logging.folder": "train.folder",
    "optimization.ema": "optim.momentum",
    "optimization.epochs": "optim.epochs",
    "optimization.warmup": "optim.warmup_epochs",
    "optimization.start_lr": "optim.start_lr",
    "optimization.lr": "optim.lr",
    "optimization.final_lr": "optim.final_lr",
    "optimization.weight_decay": "optim.weight_decay",
    "optimization.final_weight_decay": "optim.final_weight_decay",
    "optimization.ipe_scale": "optim.schedule_stretch",
}
_AUGMENTATIONS = ("data.use_color_distortion", "data.use_gaussian_blur", "data.use_horizontal_flip")
# Keys without an effect here, and why.
_DROPPED = {
    "data.color_jitter_strength": "color distortion is off",
    "data.pin_mem": "batches are always pinned on CUDA",
    "logging.write_tag": "files carry plain names",
    "meta.copy_data": "data is read where it lies",
    "meta.load_checkpoint": "use --resume",
    "meta.read_checkpoint": "use --resume or train.init_from",
}
PUBLISHED_BATCH = 2048


def is_released(raw: dict[str, Any]) -> bool:
    """Whether a YAML's top level is the released code's and not ours."""
    return "optimization" in raw and "meta" in raw and set(raw) <= SECTIONS


def convert_released(raw: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Our nested values for a released config, and a line on what became of each of its keys.

    A released file gives the batch of one GPU and leaves the number of GPUs to the launcher. All published runs have a
    global batch of 2048, so that is what `optim.global_batch_size` becomes unless it is overridden.
    """
    flat: dict[str, Any] = {}
    for section, keys in raw.items():
        if not isinstance(keys, dict):
            raise UserError(f"{path}: section {section} of this released config is {keys!r}, not a set of keys")
        flat |= {f"{section}.{key}": value for key, value in keys.items()}

    ours: dict[str, Any] = {}
    notes: list[str] = []

    def put(name: str, value: Any, origin: str) -> None:
        section, key = name.split(".")
        ours.setdefault(section, {})[key] = value
        notes.append(f"{origin} -> {name}={value}")

    for name, value in flat.items():
        if name in _KEYS:
            put(_KEYS[name], value, f"{name}={value}")
        elif name in _AUGMENTATIONS:
            if value:
                raise UserError(
                    f"{path}: {name} is on, which no published I-JEPA run has and this code does not do; "
                    f"set it to false"
                )
            notes.append(f"{name}={value} -> nothing: the random resized crop is the only augmentation")
        elif name in _DROPPED:
            notes.append(f"{name}={value} -> nothing: {_DROPPED[name]}")
        elif name not in ("data.root_path", "data.image_folder", "meta.use_bfloat16"):
            raise UserError(f"{path}: {name} is no key of a released I-JEPA config")

    if "data.root_path" in flat:
        # The released ImageNet loader reads <root_path>/<image_folder>/train.
        above, folder = str(flat["data.root_path"]), str(flat.get("data.image_folder", ""))
        root = os.path.join(above, folder, "train") if is_remote(above) else str(Path(above) / folder / "train")
        put("data.root", root, "data.root_path, data.image_folder")
    if "meta.use_bfloat16" in flat:
        # "auto", not bfloat16: the released autocast is a CUDA one and does nothing on a CPU either.
        dtype = "auto" if flat["meta.use_bfloat16"] else "float32"
        put("model.compute_dtype", dtype, f"meta.use_bfloat16={flat['meta.use_bfloat16']}")
    if "data.batch_size" in flat:
        put("optim.micro_batch", flat["data.batch_size"], f"data.batch_size={flat['data.batch_size']} (of one GPU)")
    put("optim.global_batch_size", PUBLISHED_BATCH, "the published runs' batch")
    put("mask.sampler", "reference", "the released sampler")
    put("mask.collate", "truncate", "the released collator")
    return ours, notes
