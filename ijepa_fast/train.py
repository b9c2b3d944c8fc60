"""Pretrain I-JEPA: `python -m ijepa_fast.train --config configs/demo.yaml [section.key=value ...]`.

Reads top to bottom: the command line, the run, the loop. An update is in `step`, what a run says and writes in
`reporting`.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["train", *sys.argv[1:]]))

import contextlib
import functools
import os
from typing import NoReturn

from rich.console import Console

from ijepa_fast import arguments, distributed
from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.cli import command, console
from ijepa_fast.config import load_config
from ijepa_fast.data.bad import Account
from ijepa_fast.dry_run import dry_run
from ijepa_fast.flops import peak_flops
from ijepa_fast.metrics import Bar, Meter
from ijepa_fast.preemption import NoDataError, StopSignal, Vote
from ijepa_fast.profiling import profiled
from ijepa_fast.remarks import remarks
from ijepa_fast.reporting import check_weights, draw, open_log, report_bad, report_extension, run_probe, write_rows
from ijepa_fast.run import Run, build_run
from ijepa_fast.step import Update, update
from ijepa_fast.summary import environment
from ijepa_fast.trackers import check_installed
from ijepa_fast.weights.init_from import init_from


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
        for remark in remarks(config, run.schedule.steps_per_epoch, world.device.type):
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
    skipped, save_due = 0, False  # updates skipped in a row, up to the last one that was read
    vote = Vote(world, first, most=config.log.every)

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
                    write_rows(run, unread, skipped, meter.rates(loader.wait_s), log, bar)
                leave_without_data(run, checkpoints, account, done, saved, stop, error)
            count_step()
            counts = unread[-1].counts
            flops = counts.flops(run.state.encoder, run.state.predictor)
            meter.add(config.optim.global_batch_size, counts.all * world.size, flops)
            done = step + 1
            bar.advance(done)

            end = done == total
            leave = vote(done, stop.requested or checkpoints.failed) or end
            save_due = save_due or leave or done % save_every == 0
            probe_now = run.probe is not None and (end or done % probe_every == 0)
            if save_due or probe_now or done % config.log.every == 0:
                report_bad(run, unread, account, done, console)
                skipped = write_rows(run, unread, skipped, meter.rates(loader.wait_s), log, bar)
                if probe_now or save_due:
                    check_weights(run, done)
                if probe_now:
                    run_probe(run, done, log, console)
                # Not among skipped updates: each checkpoint there would, by `keep_last`, take the place of a good one.
                if save_due and (leave or not skipped):
                    checkpoints.begin(done, run.state, config, account.state())
                    saved, save_due = done, False
                meter = Meter(loader.wait_s, peak)
            if leave:
                break
        checkpoints.wait()

    if account.warned.raised:
        console.print(f"warnings    {account.warned.raised:,} of libraries on images")
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
