"""Our weights in timm: convert them once, and `timm.create_model` loads them like any other model.

    python examples/timm_features.py WEIGHTS FOLDER image.jpg

WEIGHTS is anything that ijepa_fast reads; FOLDER will hold what timm loads.
"""
import argparse
import sys

import numpy as np
import timm
import torch
from PIL import Image

import ijepa_fast
from ijepa_fast.convert import main as convert

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("weights")
parser.add_argument("folder")
parser.add_argument("image")
args = parser.parse_args()

if failed := convert([args.weights, args.folder, "--to", "timm"]):
    sys.exit(failed)
model = timm.create_model(f"local-dir:{args.folder}", pretrained=True).eval()  # a new head: num_classes=1000

# What `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does, by hand.
config = model.pretrained_cfg
_, height, width = config["input_size"]
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
image = Image.open(args.image).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
batch = ((pixels / 255 - mean) / std)[None]

with torch.no_grad():
    theirs = model(batch)  # [1, D], the mean over patches
ours = ijepa_fast.load(args.weights).features(batch)
print(f"{theirs.shape[1]} numbers an image, at most {(theirs - ours).abs().max():.1e} from ijepa_fast's")
