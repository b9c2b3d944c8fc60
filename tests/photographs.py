"""A folder of photographs, made up: what tests train on where a class must be told from another."""
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, IMAGES_PER_CLASS = 4, 10


def write_photographs(root: Path, classes: int = CLASSES, images: int = IMAGES_PER_CLASS) -> None:
    """`root`/class_<i>/<n>.jpg, in sizes from 40 to 80 pixels; a class shares its large shapes and its colours."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        shapes = rng.integers(0, 256, (5, 5, 3))
        for number in range(images):
            pixels = np.clip(shapes + rng.normal(0, 30, shapes.shape), 0, 255).astype(np.uint8)
            size = tuple(int(side) for side in rng.integers(40, 81, 2))
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
