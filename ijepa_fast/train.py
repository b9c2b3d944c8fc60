"""Pretrain I-JEPA: `python -m ijepa_fast.train --config configs/demo.yaml [section.key=value ...]`.

Reads top to bottom: the command line, the loop, one update, what is logged, what is shown at the end, the dry run.
"""
import argparse
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from ijepa_kernels import ema_update_
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ijepa_fast import distributed, parallel
from ijepa_fast.build import Run
from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.config import load_config
from ijepa_fast.data.loader import Batch
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.evaluate import Probe, crop_knn
from ijepa_fast.memory import memory_advice, peak_memory
from ijepa_fast.metrics import Bar, Meter, RunLog, TokenCounts, draw_curves
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import set_rates
from ijepa_fast.stop import StopSignal
from ijepa_fast.view import masks_sheet, masks_title


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.train",
        description="Pretrain I-JEPA from one config: on a CPU, on one GPU or, under torchrun, on several.",
        epilog="Example: python -m ijepa_fast.train --config configs/vits16_in1k.yaml data.root=/data/imagenet/train "
        "optim.micro_batch=64. What a run writes is in train.folder: config.yaml, log.csv, log.jsonl, tensorboard/, "
        "curves.png, masks.png and checkpoints/. Ctrl-C or SIGTERM finishes the step, saves and leaves.",
    )
    parser.add_argument("--config", required=True, help="a YAML file: of configs/, your own, or a released I-JEPA's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the config to replace")
    parser.add_argument("--resume", action="store_true", help="go on, exactly, from train.folder's latest checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print every key and its value, and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run two micro-batches and one update on the real data, print memory and time; "
        "writes nothing",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit code 0; 2 after one sentence on what the user can mend; 1 where another rank is lost."""
    args = parse(argv)
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    met = False  # until the ranks have met, what goes wrong goes wrong on all
    try:
        config, notes = load_config(args.config, args.overrides)
        if args.print_config:
            print(config.to_yaml(), end="")
            return 0
        with distributed.join(config) as world:
            met = True
            # soft_wrap: a path stays on one line where output is no terminal.
            console = Console(quiet=not world.is_main, highlight=False, soft_wrap=True)
            for note in notes:
                console.print(f"released config: {note}", markup=False)
            with contextlib.closing(Run(config, world, write_cache=not args.dry_run)) as run:
                if args.dry_run:
                    dry_run(run, console)
                else:
                    train(run, console, resume=args.resume)
    except UserError as error:
        own = met and not isinstance(error, SharedError)
        if own or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {rank if own else ''}{error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not (sentence := distributed.lost_contact(error)):
            raise
        time.sleep(1)  # the other rank's own error comes first; torchrun, having seen it, may end this one meanwhile
        print(f"error: {rank}{sentence}", file=sys.stderr)
        return 1
    except OSError as error:  # of log files and pictures: the disk is full, or the folder went away
        print(f"error: {rank}{error.filename or config.train.folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{rank}interrupted; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0


def train(run: Run, console: Console, *, resume: bool) -> None:
    """From step 0, or from the latest checkpoint, to the recipe's end or a signal."""
    config, world, loader = run.config, run.world, run.loader
    probe = run.build_probe()  # before a run folder is made, which a mistake in it would leave behind
    checkpoints = Checkpoints(config.train.folder, config.train.keep_last, world, run.index.fingerprint())
    first = done = checkpoints.open(run.state, config, resume=resume, say=console.print)
    total, save_every = run.total_steps, config.train.checkpoint_every or run.schedule.steps_per_epoch
    window: list[tuple[Tensor, dict[str, Any]]] = []  # updates whose loss is still on the device

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(StopSignal()) as stop,
        contextlib.closing(
            RunLog(config.train.folder, first, tensorboard=config.log.tensorboard, active=world.is_main)
        ) as log,
        contextlib.closing(Bar(console, first, total, config.optim.epochs, shown=config.log.progress)) as bar,
    ):
        batches = loader.batches(first, total)
        if probe is not None and first == 0:
            look(run, probe, 0, log, console)
        meter = Meter(loader.wait_s)
        for step in range(first, total):
            loss, numbers, tokens = update(run, step, batches)
            window.append((loss, numbers))
            meter.add(config.optim.global_batch_size, tokens)
            done = step + 1
            bar.advance(done)

            end = done == total
            leave = world.any(stop.requested or checkpoints.failed) or end
            save_now = leave or done % save_every == 0
            look_now = probe is not None and (end or done % config.log.probe_every == 0)
            if save_now or look_now or done % config.log.every == 0:
                write_rows(run, window, meter.rates(loader.wait_s), log, bar)
                if look_now or save_now:
                    check_weights(run, done)
                if look_now:
                    look(run, probe, done, log, console)
                if save_now:
                    checkpoints.begin(done, run.state, config)
                meter = Meter(loader.wait_s)
            if leave:
                break
        checkpoints.wait()

    if world.is_main:
        draw(run, checkpoints, console)
    if done < total:
        console.print(f"Stopped after step {done} of {total}. The same command with --resume goes on.")
    elif config.log.crop_knn and len(run.index) > 1:
        show_crop_knn(run, console)
    world.barrier()
    stop.pass_on()


def update(run: Run, step: int, batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Any], int]:
    """One update. Returns this rank's part of the loss (on the device), the rest of its log row, and its tokens."""
    state, world = run.state, run.world
    lr, weight_decay = set_rates(state.optimizer, run.schedule, step)
    momentum = run.schedule.momentum(step)
    denominator = run.loss_denominator(step)
    loss = torch.zeros((), device=world.device)
    counts = TokenCounts()
    with memory_advice(run.config.optim.micro_batch):
        for _ in range(run.loader.micro_batches_per_step):
            batch = next(batches)
            loss += backward(run, batch, denominator)
            counts.add(batch, run.config.grid**2)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        ema_update_(run.target_parameters, run.source_parameters, momentum)
    epoch, itr = divmod(step, run.schedule.steps_per_epoch)
    row = {
        "epoch": epoch + 1,
        "itr": itr,
        "mask-A": round(counts.context / counts.contexts, 2),
        "mask-B": round(counts.target / counts.targets, 2),
        "step": step + 1,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
    }
    return loss, row, counts.all * world.size


def backward(run: Run, batch: Batch, denominator: float) -> Tensor:
    """Add a micro-batch's gradients; the last of a step averages them over the ranks. Returns its part of the loss."""
    with contextlib.nullcontext() if batch.last else parallel.accumulate(run.encoder, run.predictor):
        loss = ijepa_loss(
            run.encoder,
            run.predictor,
            run.state.target_encoder,
            batch.images,
            batch.masks,
            denominator=denominator,
            kind=run.config.optim.loss,
        )
        loss.backward()
    return loss.detach()


def write_rows(
    run: Run, window: list[tuple[Tensor, dict[str, Any]]], rates: dict[str, float], log: RunLog, bar: Bar
) -> None:
    """Read the losses since the last time from the device, all at once, and write their rows."""
    losses = run.world.mean(torch.stack([loss for loss, _ in window])).tolist()
    rows = [{**row, "loss": loss, **rates} for loss, (_, row) in zip(losses, window, strict=True)]
    window.clear()
    finite = list(itertools.takewhile(lambda row: math.isfinite(row["loss"]), rows))
    log.steps(finite)
    if len(finite) < len(rows):
        bad = rows[len(finite)]
        raise diverged(f"the loss of step {bad['step']} is {bad['loss']}")
    bar.report(rows[-1])


def check_weights(run: Run, step: int) -> None:
    """A loss is that of the weights before its update, so a finite one does not speak for what would be saved."""
    parameters = run.state.trained().parameters()
    finite = torch.stack([parallel.local(parameter).isfinite().all() for parameter in parameters]).all()
    if run.world.any(not finite):
        raise diverged(f"the weights after step {step} are not finite")


def diverged(what: str) -> SharedError:
    return SharedError(
        f"{what}, so the run stopped and saved nothing of it; "
        f"go on from the last checkpoint with --resume, or start anew with a lower optim.lr"
    )


def look(run: Run, probe: Probe, step: int, log: RunLog, console: Console) -> None:
    """Probe the target features, which tell what the loss does not."""
    with memory_advice(run.config.optim.micro_batch):
        values = probe(run.state.target_encoder)
    log.probe(step, values)
    knn = f", k-NN {values['knn']:.1%}" if "knn" in values else ""
    console.print(f"step {step}: target features have RankMe {values['rankme']:.1f}{knn}")


def draw(run: Run, checkpoints: Checkpoints, console: Console) -> None:
    """Make the run's pictures, and name what it made."""
    folder, batch = run.config.train.folder, next(run.loader.batches(0, 1))
    title = masks_title(run.config.mask, 0)
    masks_sheet(batch.images, batch.masks, run.config.model.patch_size, folder / "masks.png", title)
    console.print(f"checkpoint  {checkpoints.path(checkpoints.steps()[-1])}")
    console.print(f"curves      {draw_curves(folder)}")
    console.print(f"mask sheet  {folder / 'masks.png'}")


def show_crop_knn(run: Run, console: Console) -> None:
    """What the features know of the photographs before and after pretraining, in a table."""
    accuracy, photographs = crop_knn(
        {"features before": run.random_models()[0].to(run.world.device), "features after": run.state.target_encoder},
        run.index,
        run.data.source.decoder,
        run.data.source.reader,
        most=run.config.log.crop_knn,
        image_size=run.config.data.image_size,
        device=run.world.device,
    )
    table = Table("Which photograph is a crop from?", "k-NN accuracy")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.1%}")
    console.print(table)
    console.print(
        f"{photographs} photographs; the crops that vote and those that ask come from different halves of each. "
        f"Minutes on a few images show that every part works; whether features get better takes more of both."
    )


def dry_run(run: Run, console: Console) -> None:
    """Two micro-batches and one update on the real data; prints what they took."""
    config, device = run.config, run.world.device
    run.build_probe()
    batches = run.loader.batches(0, 2)
    set_rates(run.state.optimizer, run.schedule, 0)
    times = [_now(device)]
    with memory_advice(config.optim.micro_batch):
        for last in (False, True):
            backward(run, next(batches)._replace(last=last), run.loss_denominator(0))
            times.append(_now(device))
        run.state.optimizer.step()
        ema_update_(run.target_parameters, run.source_parameters, run.schedule.momentum(0))
    first, second, rest = (b - a for a, b in itertools.pairwise([*times, _now(device)]))
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (run.state.encoder, run.state.predictor)]
    parts, ipe = run.loader.micro_batches_per_step, run.schedule.steps_per_epoch
    console.print(f"models       {config.model.name}, {millions[0]:.1f} M parameters; predictor, {millions[1]:.1f} M")
    console.print(f"data         {len(run.index)} images; {ipe} steps an epoch, {run.total_steps} in all")
    console.print(f"micro-batch  {config.optim.micro_batch} images: {second:.2f} s (the first one {first:.2f} s)")
    console.print(f"update       {rest:.2f} s; a step of {parts} micro-batches about {parts * second + rest:.2f} s")
    console.print(f"memory       {peak_memory(device) / 2**30:.2f} GiB at the peak")
    console.print("Dry run: nothing was written.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
