"""Evaluate an encoder on labelled images: `python -m ijepa_fast.evaluate WEIGHTS --data ROOT`.

What each probe does and where its protocol comes from stands in the files of `evaluation/`.
"""
import argparse
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ijepa_fast.cli import command
from ijepa_fast.data.decoder import Decoder, build_decoder
from ijepa_fast.distributed import World, join_replicas
from ijepa_fast.evaluation import suite
from ijepa_fast.evaluation.attentive import attentive_rows
from ijepa_fast.evaluation.dataset import DataSet, open_dataset
from ijepa_fast.evaluation.features import Extractor, progress, shared_images
from ijepa_fast.evaluation.finetune import finetune_rows
from ijepa_fast.evaluation.frozen import Encoder, is_baseline, open_weights, prepare
from ijepa_fast.evaluation.linear import EPOCHS
from ijepa_fast.evaluation.lowshot import SPLITS, listed, listed_rows, lowshot_rows
from ijepa_fast.evaluation.picture import draw
from ijepa_fast.evaluation.regress import regress_rows
from ijepa_fast.evaluation.results import Row, table, write_json
from ijepa_fast.evaluation.supervised import Images

DEFAULT = ("knn", "logistic", "linear")
PROBES = (*DEFAULT, "lowshot", "attentive", "finetune", "regress")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.evaluate",
        description="Evaluate an encoder: RankMe and the spread of its features, and the probes asked for.",
        epilog="Example: python -m ijepa_fast.evaluate runs/mine --data /data/imagenet --json mine.json. Under "
        "torchrun all ranks compute features and train, and the numbers of frozen features are the same.",
    )
    add = parser.add_argument
    add(
        "weights",
        metavar="WEIGHTS",
        help="what ijepa_fast.load takes; or a baseline: random:vit_small/16@224 (random weights; #1 after it for seed "
        "1), or pixels (the 16 x 16 pixels of an image)",
    )
    add("--which", choices=("target", "context"), default="target", help="encoder (default: target)")
    add("--probe", type=_probes, default=DEFAULT, metavar="NAME[,NAME]",
        help=f"of {', '.join(PROBES)} (default: {','.join(DEFAULT)})")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all rows there")
    add("--out", type=Path, metavar="FOLDER",
        help="draw evaluation.png there: accuracy against labels used, confusion matrix, worst-classified images "
        "(adds logistic and lowshot)")  # fmt: skip

    data = parser.add_argument_group("images and labels")
    data.add_argument(
        "--data", type=Path, required=True, metavar="ROOT",
        help="ROOT/train and ROOT/val with a folder a class, or one folder a class, of which a fifth is held out",
    )  # fmt: skip
    data.add_argument("--labels", type=Path, metavar="FILE", help="a CSV file of labels, with a path a row")
    data.add_argument("--column", default="label", metavar="NAME", help="its column of classes (default: label)")
    data.add_argument("--columns", type=lambda text: text.split(","), default=[], metavar="NAME[,NAME]",
                      help="its columns of numbers, for regress")  # fmt: skip
    data.add_argument("--list", type=Path, metavar="FILE",
                      help="images to learn from in lowshot and finetune, such as ImageNet's 1 %%")  # fmt: skip

    how = parser.add_argument_group("how")
    how.add_argument("--k", type=_numbers, metavar="K[,K]", help="neighbours (default: 10,20,100,200)")
    how.add_argument("--optimizer", choices=("lars", "sgd"), default="lars", help="of linear (default: lars)")
    how.add_argument("--shots", type=_numbers, metavar="N[,N]", help="images a class in lowshot (default: 1,5,10)")
    how.add_argument("--splits", type=int, default=SPLITS, help=f"of lowshot (default: {SPLITS})")
    how.add_argument("--regress-as", choices=("auto", "classes", "values"), default="auto",
                     help="auto: whole numbers of at most 20 kinds are classes")  # fmt: skip
    how.add_argument("--epochs", type=int, help="of attentive (default: 20) and finetune (default: 50)")
    how.add_argument("--lr", type=float, help="of attentive and finetune (default: 1e-3)")
    how.add_argument("--views", type=int, default=0, metavar="N",
                     help="random crops of each training image, for linear and LiDAR")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of what is held out, and of orders (default: 0)")
    how.add_argument("--batch", type=int, default=64, help="images an encoder sees at once (default: 64)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process (default: all cores)")
    how.add_argument("--decoder", choices=("auto", "pillow", "dali"), default="auto")
    how.add_argument("--cache", type=Path, metavar="FOLDER",
                     help="of features (default: $XDG_CACHE_HOME/ijepa_fast/features)")  # fmt: skip
    how.add_argument("--no-cache", action="store_true", help="keep no features")
    args = parser.parse_args(argv)
    if args.out is not None:
        args.probe = tuple(dict.fromkeys((*args.probe, "logistic", "lowshot")))
    for name, least in (("views", 0), ("splits", 1), ("batch", 1), ("epochs", 1), ("threads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if "regress" in args.probe and not args.columns:
        parser.error("regress needs the columns to predict: --columns NAME[,NAME], of the CSV file that --labels names")
    return args


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
        for folder in (args.json and args.json.parent, args.out):  # before the work, not after it
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        with world.raise_on_all_ranks():
            model = prepare(open_weights(args.weights, args.which), world.device)
        data = _open_data(args, world)
        with world.raise_on_all_ranks():
            chosen = None if args.list is None else listed(data.train, args.list)
        threads = args.threads or len(os.sched_getaffinity(0))
        with _decoder(args.decoder, threads, world) as decoder:
            task = _features(args, model, data, decoder, world, threads, console)
            rows: list[Row] = []
            probabilities = torch.empty(0)
            with world.raise_on_all_ranks(world.long_timeout_group()):
                if task is not None:
                    _warn_of_shared(task, data)
                    rows, probabilities = _frozen_rows(args, task, data, chosen, console)
            images = Images(decoder, world, model.encoder.image_size, threads, args.seed, console)
            if "attentive" in args.probe:
                rows += attentive_rows(model, data, images, epochs=args.epochs, lr=args.lr)
            if "finetune" in args.probe:
                rows += finetune_rows(model, data, images, chosen=chosen, epochs=args.epochs, lr=args.lr)
            if world.is_main:
                about = _about(args, data, model, world, time.perf_counter() - started)
                _report(args, rows, about, console)
                if args.out is not None:
                    file = args.out / "evaluation.png"
                    draw(file, rows, data, probabilities, decoder, title=_title(about))
                    console.print(f"picture     {file}", markup=False)


def _open_data(args: argparse.Namespace, world: World) -> DataSet:
    """Rank 0 reads the headers of all images, or what it cached of them; then the others do."""
    group = world.long_timeout_group()
    column = None if set(args.probe) == {"regress"} else args.column
    for turn in (True, False):
        with world.raise_on_all_ranks(group):
            if world.is_main == turn:
                report = None if world.is_main else (lambda line: None)
                data = open_dataset(args.data, args.labels, column, threads=args.threads or 8, report=report)
    return data


@contextlib.contextmanager
def _decoder(name: Any, threads: int, world: World) -> Iterator[Decoder]:
    with world.raise_on_all_ranks():
        decoder = build_decoder(name, threads, world.device)
    with contextlib.closing(decoder):
        yield decoder


def _features(
    args: argparse.Namespace,
    model: Encoder,
    data: DataSet,
    decoder: Decoder,
    world: World,
    threads: int,
    console: Console,
) -> suite.Task | None:
    """What the probes of frozen features need; on rank 0, None on the others."""
    cache = args.cache
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ijepa_fast" / "features"
    extractor = Extractor(
        model, decoder, world, cache=None if args.no_cache else cache, batch=args.batch, threads=threads,
        console=console,
    )  # fmt: skip
    train, val = extractor.features(data.train, "train"), extractor.features(data.val, "val")
    views = [extractor.features(data.train, f"view {number + 1}", number) for number in range(args.views)]
    if train is None or val is None:
        return None
    return suite.Task(
        train=train,
        val=val,
        train_labels=torch.from_numpy(data.train.labels),
        val_labels=torch.from_numpy(data.val.labels),
        classes=len(data.class_names),
        device=world.device,
        views=tuple(view for view in views if view is not None),
        seed=args.seed,
    )


def _warn_of_shared(task: suite.Task, data: DataSet) -> None:
    shared = shared_images(task.train, task.val)
    if shared:
        print(
            f"warning: {shared} of the {len(data.val.ids)} evaluated images are, byte for byte, among the training "
            f"images too; their labels are known, so the results are too good",
            file=sys.stderr,
        )


def _frozen_rows(
    args: argparse.Namespace, task: suite.Task, data: DataSet, chosen: Tensor | None, console: Console
) -> tuple[list[Row], Tensor]:
    """All rows of probes of features; and the classes' probabilities by logistic, `[m, classes]`, if it was asked."""
    rows, probabilities = suite.rank_rows(task), torch.empty(0)
    if "knn" in args.probe:
        rows += suite.knn_rows(task, args.k)
    if "logistic" in args.probe:
        found, probabilities = suite.logistic_rows(task)
        rows += found
    if "linear" in args.probe:
        with progress(console, "linear probe", 4 * EPOCHS) as advance:
            rows += suite.linear_rows(task, args.optimizer, advance)
    if "lowshot" in args.probe:
        if chosen is not None:
            rows += listed_rows(task, chosen, args.list)
        rows += lowshot_rows(task, args.shots, args.splits)
    if "regress" in args.probe:
        rows += regress_rows(task, data, args.columns, args.regress_as)
    return rows, probabilities


def _about(args: argparse.Namespace, data: DataSet, model: Encoder, world: World, seconds: float) -> dict[str, Any]:
    """What the numbers are of, as plain values."""
    encoder = model.encoder
    return {
        "weights": args.weights,
        "which": None if is_baseline(args.weights) else getattr(model, "which", None),
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


def _title(about: dict[str, Any]) -> str:
    encoder = "" if is_baseline(about["weights"]) else f"{about['which']} encoder of "
    return f"{encoder}{about['weights']} on {about['data']}"


def _report(args: argparse.Namespace, rows: list[Row], about: dict[str, Any], console: Console) -> None:
    console.print(table(rows, _title(about)))
    images = f"{about['train_images']} images to train on, {about['val_images']} evaluated"
    classes = f"{len(about['classes'])} classes"
    console.print(f"{images}, {classes}; {about['split']}. {about['seconds']:.0f} s.", markup=False)
    if args.json is not None:
        write_json(args.json, rows, about)
        console.print(f"results     {args.json}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
