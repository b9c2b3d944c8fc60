"""Evaluate an encoder on labelled images: `python -m ijepa_fast.evaluate WEIGHTS --data ROOT`.

What each probe does and where its protocol comes from stands in the files of `evaluation/`.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["evaluate", *sys.argv[1:]]))

import argparse
import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ijepa_fast import arguments_weights
from ijepa_fast.cli import command, console
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


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_weights.evaluate(argv)
    started = time.perf_counter()
    with join_replicas(args.threads) as world:
        # Where output is no terminal: a table as wide as it needs to be, and paths on one line.
        out = console(quiet=not world.is_main, width=None if sys.stdout.isatty() else 140)
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
            task = _features(args, model, data, decoder, world, threads, out)
            rows: list[Row] = []
            probabilities = torch.empty(0)
            with world.raise_on_all_ranks(world.long_timeout_group()):
                if task is not None:
                    _warn_of_shared(task, data)
                    rows, probabilities = _frozen_rows(args, task, data, chosen, out)
            images = Images(decoder, world, model.encoder.image_size, threads, args.seed, out)
            if "attentive" in args.probe:
                rows += attentive_rows(model, data, images, epochs=args.epochs, lr=args.lr)
            if "finetune" in args.probe:
                rows += finetune_rows(model, data, images, chosen=chosen, epochs=args.epochs, lr=args.lr)
            if world.is_main:
                about = _about(args, data, model, world, time.perf_counter() - started)
                _report(args, rows, about, out)
                if args.out is not None:
                    file = args.out / "evaluation.png"
                    draw(file, rows, data, probabilities, decoder, title=_title(about))
                    out.print(f"picture     {file}")


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
        rows += lowshot_rows(task, args.shots, args.splits or SPLITS)
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
    console.print(f"{images}, {classes}; {about['split']}. {about['seconds']:.0f} s.")
    if args.json is not None:
        write_json(args.json, rows, about)
        console.print(f"results     {args.json}")
