"""Evaluate an encoder on labelled images: `python -m ijepa_fast.evaluate WEIGHTS --data ROOT`.

What each probe does and where its protocol comes from stands in the files of `evaluation/`.
"""
import argparse
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ijepa_fast.cli import command
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.distributed import World, join_replicas
from ijepa_fast.evaluation import suite
from ijepa_fast.evaluation.dataset import DataSet, open_dataset
from ijepa_fast.evaluation.features import Extractor, progress, shared_images
from ijepa_fast.evaluation.frozen import Encoder, open_weights, prepare
from ijepa_fast.evaluation.linear import EPOCHS
from ijepa_fast.evaluation.results import Row, table, write_json

PROBES = ("knn", "logistic", "linear")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.evaluate",
        description="Evaluate a frozen encoder: RankMe and the spread of its features, and the probes asked for.",
        epilog="Example: python -m ijepa_fast.evaluate runs/mine --data /data/imagenet --json mine.json. Under "
        "torchrun all ranks compute features, and the numbers are the same.",
    )
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="what ijepa_fast.load takes; or a baseline: random:vit_small/16@224 (random weights; #1 after it for seed "
        "1), or pixels (the 16 x 16 pixels of an image)",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT",
        help="ROOT/train and ROOT/val with a folder a class, or one folder a class, of which a fifth is held out",
    )  # fmt: skip
    parser.add_argument("--labels", type=Path, metavar="FILE", help="a CSV file of labels, with a path a row")
    parser.add_argument("--column", default="label", metavar="NAME", help="its column of classes (default: label)")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder (default: target)")
    parser.add_argument(
        "--probe", type=_probes, default=PROBES, metavar="NAME[,NAME]", help=f"of {', '.join(PROBES)} (default: all)"
    )
    parser.add_argument("--k", type=_numbers, metavar="K[,K]", help="neighbours (default: 10,20,100,200)")
    parser.add_argument("--optimizer", choices=("lars", "sgd"), default="lars", help="of linear (default: lars)")
    parser.add_argument(
        "--views", type=int, default=0, metavar="N", help="random crops of each training image, for linear and LiDAR"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out, and of orders (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of features (default: $XDG_CACHE_HOME/ijepa_fast/features)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--batch", type=int, default=64, help="images an encoder sees at once (default: 64)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process (default: all cores)")
    parser.add_argument("--decoder", choices=("auto", "pillow", "dali"), default="auto")
    return parser.parse_args(argv)


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PROBES:
            raise argparse.ArgumentTypeError(f"there is no probe {name!r}; the probes are {', '.join(PROBES)}")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 10,20") from None


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()
    with join_replicas(args.threads) as world:
        # Where output is no terminal: a table as wide as it needs to be, and paths on one line.
        width = None if sys.stdout.isatty() else 140
        console = Console(quiet=not world.is_main, highlight=False, soft_wrap=True, width=width)
        if args.json is not None:  # before the work, not after it
            args.json.parent.mkdir(parents=True, exist_ok=True)
        with world.raise_on_all_ranks():
            model = prepare(open_weights(args.weights, args.which), world.device)
        data = _open_data(args, world)
        extractor = _extractor(args, model, world, console)
        train, val = extractor.features(data.train, "train"), extractor.features(data.val, "val")
        views = [extractor.features(data.train, f"view {number + 1}", number) for number in range(args.views)]
        with world.raise_on_all_ranks(world.long_timeout_group()):
            if world.is_main:
                task = suite.Task(
                    train, val, *(torch.from_numpy(part.labels) for part in (data.train, data.val)),
                    len(data.class_names), world.device, tuple(views), args.seed,
                )  # fmt: skip
                _warn(task, data)
                rows = _run_probes(args, task, console)
                _report(rows, _about(args, data, model, world, time.perf_counter() - started), args.json, console)


def _open_data(args: argparse.Namespace, world: World) -> DataSet:
    """Rank 0 reads the headers of all images, or what it cached of them; then the others do."""
    group = world.long_timeout_group()
    for turn in (True, False):
        with world.raise_on_all_ranks(group):
            if world.is_main == turn:
                data = open_dataset(args.data, args.labels, args.column, threads=args.threads or 8)
    return data


def _extractor(args: argparse.Namespace, model: Encoder, world: World, console: Console) -> Extractor:
    cache = args.cache
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ijepa_fast" / "features"
    threads = args.threads or len(os.sched_getaffinity(0))
    decoder = build_decoder(args.decoder, threads, world.device)
    return Extractor(
        model, decoder, world, cache=None if args.no_cache else cache, batch=args.batch, threads=threads,
        console=console,
    )  # fmt: skip


def _warn(task: suite.Task, data: DataSet) -> None:
    shared = shared_images(task.train, task.val)
    if shared:
        print(
            f"warning: {shared} of the {len(data.val.ids)} evaluated images are, byte for byte, among the training "
            f"images too; their labels are known, so the results are too good",
            file=sys.stderr,
        )


def _run_probes(args: argparse.Namespace, task: suite.Task, console: Console) -> list[Row]:
    rows = suite.rank_rows(task)
    if "knn" in args.probe:
        rows += suite.knn_rows(task, args.k)
    if "logistic" in args.probe:
        rows += suite.logistic_rows(task)[0]
    if "linear" in args.probe:
        with progress(console, "linear probe", 4 * EPOCHS) as advance:
            rows += suite.linear_rows(task, args.optimizer, advance)
    return rows


def _about(args: argparse.Namespace, data: DataSet, model: Encoder, world: World, seconds: float) -> dict[str, Any]:
    """What the numbers are of, as plain values."""
    encoder = model.encoder
    return {
        "weights": args.weights,
        "which": getattr(model, "which", None),
        "encoder": {**encoder.size._asdict(), "image_size": encoder.image_size, "patch_size": encoder.patch_size},
        "data": str(args.data),
        "split": data.how,
        "train_images": len(data.train.ids),
        "val_images": len(data.val.ids),
        "classes": list(data.class_names),
        "seed": args.seed,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU",
        "ranks": world.size,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _report(rows: list[Row], about: dict[str, Any], file: Path | None, console: Console) -> None:
    encoder = f"{about['which']} encoder of {about['weights']}" if about["which"] else about["weights"]
    console.print(table(rows, f"{encoder} on {about['data']}"))
    images = f"{about['train_images']} images to train on, {about['val_images']} evaluated"
    classes = f"{len(about['classes'])} classes"
    console.print(f"{images}, {classes}; {about['split']}. {about['seconds']:.0f} s.", markup=False)
    if file is not None:
        write_json(file, rows, about)
        console.print(f"results     {file}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
