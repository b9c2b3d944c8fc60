"""How alike are two images? The example of I-JEPA's model card, with transformers and with ijepa_fast.

    python examples/similarity.py FOLDER cat.jpg another_cat.jpg

FOLDER is a Hugging Face folder of I-JEPA, a published one or ours:
    python -m ijepa_fast.convert runs/vith14 FOLDER --to hf
"""
import argparse

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, ViTImageProcessorPil

import ijepa_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("images", nargs=2, metavar="IMAGE")
args = parser.parse_args()
images = [Image.open(path).convert("RGB") for path in args.images]

# With transformers, as on the model card. (`AutoImageProcessor` finds the processor too, if torchvision is installed.)
processor = ViTImageProcessorPil.from_pretrained(args.folder)
theirs = AutoModel.from_pretrained(args.folder).eval()
pixels = processor(images, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    a, b = theirs(pixels).last_hidden_state.mean(dim=1)
print(f"transformers                  {cosine_similarity(a, b, dim=0):.4f}")

# With ijepa_fast, which reads every other format as well.
ours = ijepa_fast.load(args.folder)
a, b = ours.features(pixels)
print(f"ijepa_fast, the same pixels   {cosine_similarity(a, b, dim=0):.4f}")

# The processor squeezes the whole image into a square. I-JEPA is evaluated on the central square.
a, b = ours.features(images)
print(f"ijepa_fast, central squares   {cosine_similarity(a, b, dim=0):.4f}")
