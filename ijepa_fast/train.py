"""Pretrain I-JEPA: `python -m ijepa_fast.train --config configs/demo.yaml [section.key=value ...]`.

Reads top to bottom: the command line, the loop, what is logged, what is made at the end. An update is in `step`.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["train", *sys.argv[1:]]))

import contextlib
import functools
import itertools
import math
import os
from typing import NoReturn

import torch
from rich.console import Console

from ijepa_fast import arguments, distributed, parallel
from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.cli import command, console
from ijepa_fast.config import Config, load_config
from ijepa_fast.data.bad import Account
from ijepa_fast.dry_run import dry_run
from ijepa_fast.errors import SharedError
from ijepa_fast.evaluation.collapse import collapse_warning
from ijepa_fast.flops import peak_flops
from ijepa_fast.memory import memory_advice
from ijepa_fast.metrics import Bar, Meter, Rates, RunLog
from ijepa_fast.optim import build_schedule
from ijepa_fast.preemption import NoDataError, StopSignal
from ijepa_fast.profiling import profiled
from ijepa_fast.remarks import remarks
from ijepa_fast.run import Run, build_run
from ijepa_fast.step import Update, update
from ijepa_fast.summary import environment, last_line, write_summary
from ijepa_fast.trackers import build_trackers, check_installed
from ijepa_fast.view import draw_curves, masks_sheet, masks_title
from ijepa_fast.weights.init_from import init_from

SHOWN = {"knn": "k-NN", "linear": "linear"}  # accuracies of a probe

MOST_LINES = 20  # on bad images, at a time


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments.train(argv)
    config, notes = load_config(args.config, args.overrides)
    if args.print_config:
        print(config.to_yaml(), end="")
        return
    check_installed(config)
    try:
        with distributed.join(config) as world:
            out = console(quiet=not world.is_main)
            for note in notes:
                out.print(f"released config: {note}")
            with build_run(config, world, write_cache=not args.dry_run, report=out.print) as run:
                if args.dry_run:
                    dry_run(run, out, resume=args.resume, extend=args.extend)
                else:
                    train(run, out, resume=args.resume, extend=args.extend)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume goes on from the last checkpoint, if there is one") from None


def train(run: Run, console: Console, *, resume: bool, extend: bool = False) -> bool:
    """From step 0, or from the latest checkpoint, to the recipe's end or a signal. Returns whether it came to the end.

    `extend`: a run that is resumed may have more epochs than it was begun with.
    """
    config, world = run.config, run.world
    index = run.data.source.index
    checkpoints = Checkpoints(config.train.folder, config.train.keep_last, world, index.fingerprint())
    with contextlib.closing(checkpoints):
        init = functools.partial(init_weights, run)
        first = checkpoints.open(
            run.state, config, resume=resume, extend=extend, init=init, report=console.print
        )
        account = Account(config.train.folder, len(index), config.data.max_bad_fraction)
        account.restore(checkpoints.bad_images, first, write=world.is_main)
        console.print(environment(config, world))
        for remark in remarks(config, run.schedule.steps_per_epoch):
            console.print(f"note: {remark}")
        if run.probe is not None and run.probe.unlabelled:
            console.print(f"note: probes measure no accuracy: {run.probe.unlabelled}")
        if checkpoints.extended is not None:
            report_extension(checkpoints.extended, run, first, console)
        return loop(run, checkpoints, account, first, console)


def loop(run: Run, checkpoints: Checkpoints, account: Account, first: int, console: Console) -> bool:
    """The updates from `first` on, with all that comes once in a while."""
    config, world, loader = run.config, run.world, run.data.loader
    done = saved = first
    total, save_every = run.total_steps, config.train.checkpoint_every or run.schedule.steps_per_epoch
    probe_every, peak = config.log.probe_every or total, peak_flops(world.device)
    unread: list[Update] = []  # updates whose loss is still on the device

    with (
        contextlib.closing(StopSignal(checkpoints.last)) as stop,
        contextlib.closing(open_log(config, first, world.is_main)) as log,
        contextlib.closing(Bar(console, first, total, config.optim.epochs, shown=config.log.progress)) as bar,
        profiled(config.train.profile if world.is_main else None, config.train.folder, console.print) as count_step,
    ):
        batches = stop.patient(loader.batches(first, total))
        if run.probe is not None and first == 0:
            bar.say("first probe, of the features before training ...")
            run_probe(run, 0, log, console)
            bar.say("first step ...")
        meter = Meter(loader.wait_s, peak)
        for step in range(first, total):
            try:
                unread.append(update(run, step, batches))
            except NoDataError as error:  # update `step` has changed nothing yet
                if unread and world.size == 1:
                    write_rows(run, unread, meter.rates(loader.wait_s), log, bar)
                leave_without_data(run, checkpoints, account, done, saved, stop, error)
            count_step()
            counts = unread[-1].counts
            flops = counts.flops(run.state.encoder, run.state.predictor)
            meter.add(config.optim.global_batch_size, counts.all * world.size, flops)
            done = step + 1
            bar.advance(done)

            end = done == total
            leave = world.any(stop.requested or checkpoints.failed) or end
            save_now = leave or done % save_every == 0
            probe_now = run.probe is not None and (end or done % probe_every == 0)
            if save_now or probe_now or done % config.log.every == 0:
                report_bad(run, unread, account, done, console)
                write_rows(run, unread, meter.rates(loader.wait_s), log, bar)
                if probe_now or save_now:
                    check_weights(run, done)
                if probe_now:
                    run_probe(run, done, log, console)
                if save_now:
                    checkpoints.begin(done, run.state, config, account.state())
                    saved = done
                meter = Meter(loader.wait_s, peak)
            if leave:
                break
        checkpoints.wait()

    if world.is_main:
        draw(run, checkpoints, console, stopped=done < total)
    if done < total:
        console.print(f"Stopped after step {done} of {total}. The same command with --resume goes on.")
    world.barrier()
    stop.requeue()
    return done == total


def init_weights(run: Run) -> str | None:
    """Those of train.init_from, where the config names something."""
    path = run.config.train.init_from
    return init_from(path, run.state, run.world) if path is not None else None


def open_log(config: Config, first: int, active: bool) -> RunLog:
    trackers = build_trackers(config) if active else []
    return RunLog(
        config.train.folder, first, tensorboard=config.log.tensorboard, trackers=trackers, active=active
    )


def leave_without_data(
    run: Run, checkpoints: Checkpoints, account: Account, done: int, saved: int, stop: StopSignal, error: NoDataError
) -> NoReturn:
    """Save, where a process can do so alone, and end without waiting for threads that hang in a read."""
    if done > saved and run.world.size == 1:
        check_weights(run, done)
        checkpoints.begin(done, run.state, run.config, account.state())
    checkpoints.wait()
    sys.stdout.flush()
    print(f"error: {error}, so step {done + 1} was not made; {checkpoints.last()}", file=sys.stderr, flush=True)
    stop.requeue()
    os._exit(2)


def report_extension(before: Config, run: Run, step: int, console: Console) -> None:
    """Say how the schedules go on from `step` in a run that was made longer."""
    steps = run.schedule.steps_per_epoch
    old, new = build_schedule(before.optim, steps), run.schedule
    console.print(
        f"extended from {before.optim.epochs} to {run.config.optim.epochs} epochs, {run.total_steps} steps: from step "
        f"{step} on all schedules are those of the longer run, at this place: learning rate {old.lr(step):.3g} -> "
        f"{new.lr(step):.3g}, weight decay {old.weight_decay(step):.3g} -> {new.weight_decay(step):.3g}, momentum "
        f"{old.momentum(step):.6g} -> {new.momentum(step):.6g}"
    )


def write_rows(run: Run, unread: list[Update], rates: Rates, log: RunLog, bar: Bar) -> None:
    """Read the losses since the last time from the device, all at once, and write their rows."""
    losses = run.world.mean(torch.stack([update.loss for update in unread])).tolist()
    rows = [u.row(loss, rates, run.schedule.steps_per_epoch) for loss, u in zip(losses, unread, strict=True)]
    unread.clear()
    finite = list(itertools.takewhile(lambda row: math.isfinite(row.loss), rows))
    log.steps(finite)
    if len(finite) < len(rows):
        bad = rows[len(finite)]
        raise diverged(f"the loss of step {bad.step} is {bad.loss}")
    bar.report(rows[-1])


def report_bad(run: Run, unread: list[Update], account: Account, done: int, console: Console) -> None:
    """Account for the images that could not be used since the last time, on all ranks."""
    bad = [image for update in unread for image in update.bad]
    if not run.world.any(bool(bad)):
        return
    every = [image for images in run.world.gather_objects(bad) for image in images]
    lines = account.add(sorted(every, key=lambda image: (image.step, image.position)), write=run.world.is_main)
    for line in lines[:MOST_LINES]:
        console.print(line, markup=False)
    if len(lines) > MOST_LINES:
        console.print(f"and {len(lines) - MOST_LINES} more bad images: {account.file}", markup=False)
    with run.world.raise_on_all_ranks():
        account.check(done * run.config.optim.global_batch_size)


def check_weights(run: Run, step: int) -> None:
    """The loss is computed before the update, so a finite one does not prove that what would be saved is finite."""
    parameters = run.state.trained().parameters()
    finite = torch.stack([parallel.local(parameter).isfinite().all() for parameter in parameters]).all()
    if run.world.any(not finite):
        raise diverged(f"the weights after step {step} are not finite")


def diverged(what: str) -> SharedError:
    return SharedError(
        f"{what}, so the run stopped and saved nothing of it; "
        f"go on from the last checkpoint with --resume, or start anew with a lower optim.lr"
    )


def run_probe(run: Run, step: int, log: RunLog, console: Console) -> None:
    """Measure the target features: the loss alone does not show a collapse."""
    assert run.probe is not None
    with memory_advice(run.config.optim.micro_batch):
        values = run.probe(run.state.target_encoder)
    log.probe(step, values)
    accuracies = "".join(f", {shown} {values[name]:.1%}" for name, shown in SHOWN.items() if name in values)
    console.print(f"step {step}: target features have RankMe {values['rankme']:.1f}{accuracies}")
    if warning := collapse_warning(log.probes, run.total_steps):
        log.note(step, warning)
        console.print(f"warning: {warning}")


def draw(run: Run, checkpoints: Checkpoints, console: Console, *, stopped: bool) -> None:
    """Draw the run's pictures, and print where they and the last checkpoint are.

    A run that a signal has stopped draws no masks: time may be short, and the images may hang on a dead mount.
    """
    folder = run.config.train.folder
    checkpoint = checkpoints.path(checkpoints.steps()[-1])
    summary = write_summary(folder, run.total_steps, checkpoint)
    console.print(f"checkpoint  {checkpoint}")
    console.print(f"curves      {draw_curves(folder)}")
    if not stopped:
        batch, title = next(run.data.loader.batches(0, 1)), masks_title(run.config.mask, 0)
        masks_sheet(batch.images, batch.masks, run.config.model.patch_size, folder / "masks.png", title)
        console.print(f"mask sheet  {folder / 'masks.png'}")
    if summary is not None:
        console.print(f"summary     {folder / 'summary.json'}")
        console.print(last_line(summary))
