"""Real photographs for `make demo`: those that scikit-image and scikit-learn ship, as JPEG files in one folder."""
import sys
from importlib.resources import files
from pathlib import Path

from PIL import Image

# Colour photographs inside the installed packages; nothing is downloaded.
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "retina.jpg",
        "hubble_deep_field.jpg", "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip


def write_photographs(folder: Path) -> list[Path]:
    """Put the photographs into `folder`: JPEG files as they are, others written as JPEG once."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            source = files(package) / name
            if not source.is_file():
                continue  # not every version ships every picture
            target = folder / (Path(name).stem + ".jpg")
            if not target.exists():
                if name.endswith(".jpg"):
                    target.write_bytes(source.read_bytes())
                else:
                    with source.open("rb") as file:
                        Image.open(file).convert("RGB").save(target, quality=95)
            written.append(target)
    return written


if __name__ == "__main__":
    photographs = write_photographs(Path(sys.argv[1]))
    print(f"{len(photographs)} photographs in {sys.argv[1]}")
