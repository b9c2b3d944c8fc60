"""Packed sequences for tests."""
import itertools

import torch
from ijepa_kernels import Packed


def random_packed(lengths, num_patches, num_images, seed=0, device="cpu", image=None):
    """Sequences of the given lengths, each of sorted distinct patches of the given images, random ones without."""
    g = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(num_patches, generator=g)[:n].sort().values for n in lengths]
    if image is None:
        image = torch.randint(num_images, (len(lengths),), generator=g)
    return Packed(
        torch.cat([torch.empty(0, dtype=torch.int64), *picks]).int(),
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.as_tensor(image).int(),
        num_patches,
    ).to(device)
