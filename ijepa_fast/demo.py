"""The whole of I-JEPA in minutes: `python -m ijepa_fast.demo --config configs/demo.yaml [section.key=value ...]`.

Pretrains on the real photographs that scikit-image and scikit-learn ship, or on your own, and ends with a table of what
the features know of them before and after. Nothing is downloaded.
"""
import argparse
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ijepa_fast import distributed
from ijepa_fast.cli import command
from ijepa_fast.config import load_config
from ijepa_fast.data.pipeline import ImageSource
from ijepa_fast.data.sampler import crop_boxes
from ijepa_fast.errors import DecodeError, UserError
from ijepa_fast.evaluate import evenly, knn_accuracy, pooled
from ijepa_fast.run import Run, build_run, initial_models
from ijepa_fast.train import train

# Colour photographs inside the installed packages.
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "hubble_deep_field.jpg",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
IN_TABLE = 10  # photographs at most
CROPS = 20  # of each half of a photograph


def write_photographs(folder: Path) -> list[Path]:
    """Put the photographs into `folder`: JPEG files as they are, others converted to JPEG; none is written twice."""
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


def crop_knn(
    encoders: Mapping[str, nn.Module], source: ImageSource, *, most: int, device: torch.device
) -> tuple[dict[str, float], int]:
    """k-NN accuracy at telling which photograph a crop comes from; needs no labels.

    Bank crops lie in one half of a photograph (cut across its longer side), query crops in the other, so they share no
    pixel. Beside each encoder stand "chance" and "mean colour" (the crop's mean RGB as its feature). Also returns
    the number of photographs: at most `most`, spread evenly over `source`.
    """
    ids = evenly(len(source.index), most)
    bank, queries = _half_crops(source, ids, 0), _half_crops(source, ids, 1)
    labels = torch.arange(len(ids), device=device).repeat_interleave(CROPS)
    accuracy = {"chance": 1 / len(ids)}
    colour = [(half.float().mean(dim=(1, 2)) - 127.5).to(device) for half in (bank, queries)]
    accuracy["mean colour"] = knn_accuracy(colour[0], labels, colour[1], labels)
    for name, encoder in encoders.items():
        features = [
            torch.cat([pooled(encoder, some.to(device)) for some in half.split(CROPS)]) for half in (bank, queries)
        ]
        accuracy[name] = knn_accuracy(features[0], labels, features[1], labels)
    return accuracy, len(ids)


def _half_crops(source: ImageSource, ids: np.ndarray, half: int) -> Tensor:
    """CROPS random crops of one half of each photograph, uint8 `[len(ids) * CROPS, S, S, 3]`."""
    crops = []
    for encoded, record, i in zip(source.reader.read(ids), source.index.records[ids], ids, strict=True):
        width, height = int(record["width"]), int(record["height"])
        wide = width >= height
        half_width, half_height = (width // 2, height) if wide else (width, height // 2)
        sizes = np.full(CROPS, half_width), np.full(CROPS, half_height)
        numbers = i * 2 * CROPS + half * CROPS + np.arange(CROPS)  # each crop has its own, in both halves
        boxes = crop_boxes(0, 0, numbers, *sizes, (0.3, 1.0))
        if half == 1:
            boxes[:, 0 if wide else 1] += half_width if wide else half_height
        try:
            crops.append(source.decoder.decode([encoded] * CROPS, boxes, source.image_size))
        except DecodeError as error:
            path = source.index.path(i)
            raise UserError(f"{path} cannot be decoded: {error.reason}; remove or replace it") from None
    return torch.cat(crops)


def show_crop_knn(run: Run, console: Console) -> None:
    """What the features know of the photographs before and after pretraining, in a table."""
    device, before = run.world.device, initial_models(run.config, run.world.device)[0]
    encoders = {"features before": before.to(device), "features after": run.state.target_encoder}
    accuracy, photographs = crop_knn(encoders, run.data.source, most=IN_TABLE, device=device)
    table = Table("Which photograph is a crop from?", "k-NN accuracy")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.1%}")
    console.print(table)
    console.print(
        f"{photographs} photographs; the crops that vote and those that ask come from different halves of each. "
        f"Minutes on a few images show that every part works; whether features get better takes more of both."
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.demo",
        description="Pretrain on a few photographs, and show what the features know of them before and after.",
        epilog="Photographs are put into data.root where there is no such folder; another one is used as it is.",
    )
    parser.add_argument("--config", required=True, help="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the config to replace")
    return parser.parse_intermixed_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config, _ = load_config(args.config, args.overrides)
    if not config.data.root.exists():
        write_photographs(config.data.root)
    console = Console(highlight=False, soft_wrap=True)
    with distributed.join(config) as world, build_run(config, world) as run:
        train(run, console, resume=False)
        show_crop_knn(run, console)


if __name__ == "__main__":
    sys.exit(main())
