"""What `ijepa index` and `ijepa tune` take."""
import argparse
import os
from pathlib import Path

from ijepa_fast.config import DataConfig
from ijepa_fast.errors import UserError


def index(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa index",
        description="Index images in folders, uncompressed tars and parquet files, and show what there is. Training "
        "with data.root=ROOT then begins at once. A builder or verification that was stopped goes on where it was.",
    )
    parser.add_argument("roots", nargs="+", metavar="ROOT", help="what data.root will be: a folder, a tar, a parquet, "
                        "or the address of one (s3://..., with ijepa_fast[remote])")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="decode every image strictly, and list what is bad")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 8, metavar="N", help="threads (all cores)")
    parser.add_argument("--bad", type=Path, default=Path("bad.jsonl"), help="where --verify lists them (bad.jsonl)")
    most = DataConfig.model_fields["max_pixels"].default
    parser.add_argument("--max-pixels", type=int, default=most, help="as data.max_pixels")
    parser.add_argument("--picture", type=Path, help="draw the images' sizes into this PNG file")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    return args


def tune(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa tune", description="How fast each decoder reads and decodes your own images, by number of threads."
    )
    parser.add_argument("config", help="a YAML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the config to replace")
    parser.add_argument("--images", type=int, default=256, help="images of a round (256)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, interleaved; the median counts (3)")
    parser.add_argument("--step-ms", type=float, help="time of a step of this rank: shows the images/s that it needs")
    args = parser.parse_intermixed_args(argv)
    if args.images < 1 or args.rounds < 1:
        raise UserError("--images and --rounds must be at least 1")
    return args
