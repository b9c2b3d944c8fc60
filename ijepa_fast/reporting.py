"""What a run says and writes: rows of its log, bad images, probes, and at its end the pictures."""
import math

import torch
from rich.console import Console

from ijepa_fast import parallel
from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.config import Config
from ijepa_fast.data import library_warnings
from ijepa_fast.data.bad import Account
from ijepa_fast.errors import SharedError
from ijepa_fast.evaluation.collapse import collapse_warning
from ijepa_fast.memory import memory_advice
from ijepa_fast.metrics import Bar, Rates, RunLog, StepRow
from ijepa_fast.optim import build_schedule
from ijepa_fast.run import Run
from ijepa_fast.step import Update
from ijepa_fast.summary import last_line, write_summary
from ijepa_fast.trackers import build_trackers
from ijepa_fast.view.curves import draw_curves
from ijepa_fast.view.masks import masks_sheet, masks_title

SHOWN = {"knn": "k-NN", "linear": "linear"}  # accuracies of a probe
MOST_LINES = 20  # on bad images or skipped updates, at a time
# Updates in a row. A bad batch spoils one or two; weights that give no finite loss for ten batches give none any more,
# since nothing changes them, and every further step is lost time.
MOST_SKIPPED = 10


def open_log(config: Config, first: int, active: bool) -> RunLog:
    trackers = build_trackers(config) if active else []
    return RunLog(
        config.train.folder, first, tensorboard=config.log.tensorboard, trackers=trackers, active=active
    )


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


def write_rows(run: Run, unread: list[Update], skipped: int, rates: Rates, log: RunLog, bar: Bar) -> int:
    """Read the losses since the last time from the device, all at once, write their rows, and name skipped updates.

    `skipped`: how many updates in a row were, up to the last one of the last time. Returns how many are, up to now.
    """
    losses = torch.stack([update.loss for update in unread]).tolist()
    rows, before, bad = list[StepRow](), log.skipped, list[tuple[int, float]]()
    for loss, update in zip(losses, unread, strict=True):
        finite = math.isfinite(loss)
        rows.append(update.row(loss if finite else None, rates, run.schedule.steps_per_epoch))
        skipped = 0 if finite else skipped + 1
        if not finite:
            bad.append((rows[-1].step, loss))
        if skipped == MOST_SKIPPED:  # what came after it is not looked at, whatever `log.every` is
            break
    unread.clear()
    log.steps(rows)
    for number, (step, loss) in enumerate(bad, before + 1):
        warning = f"the loss of step {step} is {loss}: its update was skipped ({number} so far)"
        log.note(step, warning)
        if number - before <= MOST_LINES:
            bar.console.print(f"warning: {warning}")
    if len(bad) > MOST_LINES:
        bar.console.print(f"and {len(bad) - MOST_LINES} more skipped updates: log.jsonl")
    if skipped == MOST_SKIPPED:
        step, loss = bad[-1]
        raise diverged(f"{skipped} updates in a row were skipped, up to step {step}, whose loss is {loss}")
    bar.report(rows[-1])
    return skipped


def report_bad(run: Run, unread: list[Update], account: Account, done: int, console: Console) -> None:
    """Account for the images that could not be used since the last time, or that libraries warned of, on all ranks."""
    bad, warned = [image for update in unread for image in update.bad], library_warnings.take()
    if not run.world.any(bool(bad or warned.raised)):
        return
    of_ranks = run.world.gather_objects((bad, warned))
    for line in account.warned.add([warned for _, warned in of_ranks]):
        console.print(line, markup=False)
    every = [image for images, _ in of_ranks for image in images]
    lines = account.add(sorted(every, key=lambda image: (image.step, image.position)), write=run.world.is_main)
    for line in lines[:MOST_LINES]:
        console.print(line, markup=False)
    if len(lines) > MOST_LINES:
        console.print(f"and {len(lines) - MOST_LINES} more bad images: {account.file}", markup=False)
    with run.world.raise_on_all_ranks():
        account.check(done * run.config.optim.global_batch_size)


def check_weights(run: Run, step: int) -> None:
    """The loss is computed before the gradients, so a finite one does not prove that what would be saved is finite."""
    parameters = run.state.trained().parameters()
    finite = torch.stack([parallel.local(parameter).isfinite().all() for parameter in parameters]).all()
    if run.world.any(not finite):
        raise diverged(f"the weights after step {step} are not finite")


def diverged(what: str) -> SharedError:
    return SharedError(
        f"{what}, so the run stopped and saved nothing of it; --resume would do the same again: "
        f"start anew with a lower optim.lr, from an earlier checkpoint by train.init_from if you like"
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
