"""What most training code does for its batches: `torch.utils.data.DataLoader`, worker processes, Pillow.

`Files` crops one image at a time to boxes given, as torchvision's transforms do it (`RandomResizedCrop` after the whole
image is decoded and converted). As `uint8` it stops there; as `float32` it goes on with `ToTensor` and `Normalize`, as
the transforms of the released I-JEPA code do. Boxes are drawn before, which takes nothing of a worker's time.
"""
from pathlib import Path

import numpy as np
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Files(Dataset):
    def __init__(self, paths: list[str], boxes: np.ndarray, size: int, dtype: torch.dtype):
        self.paths, self.boxes, self.size, self.dtype = paths, boxes, size, dtype
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        left, top, width, height = self.boxes[i].tolist()
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR)))
        if self.dtype == torch.uint8:
            return pixels
        floats = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return floats.clone().sub_(self.mean).div_(self.std)


def build_workers(paths: list[Path], boxes: np.ndarray, size: int, dtype: torch.dtype, batch: int, workers: int):
    """A loader of all images in order, whose workers live on between passes."""
    files = Files([str(path) for path in paths], boxes, size, dtype)
    return DataLoader(files, batch, num_workers=workers, persistent_workers=True)
