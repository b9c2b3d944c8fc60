"""What folders for transformers and for timm have in common: which encoder they hold, and the model card."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ijepa_fast.errors import UserError
from ijepa_fast.model import SIZES
from ijepa_fast.weights.contents import Architecture

WHICH = "ijepa_encoder"  # a key of config.json that is ours: transformers and timm pass over it

_LETTERS = {"vit_tiny": "Ti", "vit_small": "S", "vit_base": "B", "vit_large": "L", "vit_huge": "H", "vit_giant": "g"}
# What of a config goes into a card. The rest names files and folders of a machine, or changes nothing of a result.
_RECIPE = {"model": None, "mask": None, "data": ("image_size", "crop_scale"), "optim": None}

_ENCODER = {
    "target": (
        "This is the **target encoder**, the moving average of the weights, which the I-JEPA paper evaluates. (The "
        "I-JEPA weights that Meta published through transformers and timm are context encoders.)"
    ),
    "context": (
        "This is the **context encoder**, the one that was trained by gradients. The I-JEPA paper evaluates the target "
        "encoder, its moving average."
    ),
}

_USE = {
    "transformers": '''```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = AutoModel.from_pretrained("{folder}").eval()
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    feature = model(**inputs).last_hidden_state.mean(dim=1)  # [1, {dim}]
```

`IJepaForImageClassification.from_pretrained` loads it too, with a new head.
''',
    "timm": '''```python
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    feature = model(transform(Image.open("image.jpg").convert("RGB"))[None])  # [1, {dim}]
```

The model is timm's `VisionTransformer` with `class_token=False, global_pool="avg", fc_norm=False`. The last matters:
left out, timm normalises the mean over patches, where I-JEPA takes the mean over normalised patches.
''',
}


def stated_encoder(config: Mapping[str, Any], where: Path) -> str:
    """Which encoder a folder holds: what our config.json says, else "context", the one that others publish."""
    which = config.get(WHICH, "context")
    if which not in ("context", "target"):
        raise UserError(f"{where}: config.json says {WHICH} {which!r}, which is neither context nor target")
    return which


def model_card(library: str, folder: str, architecture: Architecture, which: str, about: Mapping[str, Any]) -> str:
    """Markdown with the hub's header, for `library`, "transformers" or "timm". `about` is that of `Contents`."""
    height, width = (patches * architecture.patch_size for patches in architecture.grid)
    size = architecture.size
    header = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["i-jepa", "self-supervised-learning"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# I-JEPA {name(architecture)}, {height} x {width} px: {which} encoder",
        _ENCODER[which],
        f"A Vision Transformer of {size.depth} blocks, width {size.dim}, {size.num_heads} heads, MLP width "
        f"{size.mlp_dim}, on patches of {architecture.patch_size} x {architecture.patch_size} pixels, without a class "
        f"token; layer norm eps 1e-6. Images are normalised with ImageNet's mean and standard deviation.",
        f"## Training\n\n{_training(about)}",
        "## Use\n\n" + _USE[library].format(folder=folder, dim=size.dim)
        + f'\nIn ijepa_fast it is `ijepa_fast.load("{folder}", which="{which}")`.',
        "## Method\n\nAssran et al., *Self-Supervised Learning from Images with a Joint-Embedding Predictive "
        "Architecture*, CVPR 2023, [arXiv 2301.08243](https://arxiv.org/abs/2301.08243).",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def name(architecture: Architecture) -> str:
    """ "ViT-H/14", or the width where the size has no name."""
    for known, size in SIZES.items():
        if size == architecture.size:
            return f"ViT-{_LETTERS[known]}/{architecture.patch_size}"
    return f"ViT/{architecture.patch_size} of width {architecture.size.dim} and {architecture.size.depth} blocks"


def _training(about: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in about.items() if key not in ("config", "notes")}
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()] or ["Nothing is known of it."]
    text = "\n".join(lines)
    if config := about.get("config"):
        recipe = yaml.safe_dump(_recipe(config), sort_keys=False)
        return f"{text}\n\nThe recipe, as `ijepa_fast.train` takes it:\n\n```yaml\n{recipe}```"
    return f"{text}\n\nThis is no run of ijepa_fast. The I-JEPA weights that Meta released are licensed CC BY-NC 4.0."


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {section: keys or config[section].keys() for section, keys in _RECIPE.items() if section in config}
    return {
        section: {key: config[section][key] for key in keys if key in config[section]} for section, keys in kept.items()
    }
