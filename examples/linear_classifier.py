"""A linear classifier on frozen features, from a folder of images with one sub-folder a class.

    python examples/linear_classifier.py WEIGHTS train/ val/

WEIGHTS is anything that ijepa_fast reads: a run folder, a released .pth.tar, a Hugging Face or timm folder. This is the
idea on one page; `python -m ijepa_fast.evaluate` has the paper's protocol.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import ijepa_fast

BATCH = 64
STEPS = 300

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("weights")
parser.add_argument("train", type=Path)
parser.add_argument("val", type=Path)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = ijepa_fast.load(args.weights).to(device)
classes = sorted(folder.name for folder in args.train.iterdir() if folder.is_dir())


def features_and_labels(root: Path) -> tuple[Tensor, Tensor]:
    labelled = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())]
    paths, labels = zip(*labelled, strict=True)
    features = [model.features(paths[i : i + BATCH]) for i in range(0, len(paths), BATCH)]
    return torch.cat(features), torch.tensor(labels, device=device)


x, y = features_and_labels(args.train)
# The batch norm without weights is the paper's: features differ by far in scale, and the classifier should not care.
head = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), nn.Linear(x.shape[1], len(classes))).to(device)
optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
for _ in range(STEPS):  # every step sees all images: features are small
    optimizer.zero_grad()
    nn.functional.cross_entropy(head(x), y).backward()
    optimizer.step()

head.eval()
x, y = features_and_labels(args.val)
correct = (head(x).argmax(dim=1) == y).sum().item()
print(f"{correct} of {len(y)} images of {len(classes)} classes: {correct / len(y):.1%}")
