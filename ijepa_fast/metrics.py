"""The progress of a run: a bar, log.csv, log.jsonl and TensorBoard.

log.csv begins with the released code's columns (epoch from 1, itr from 0 within it) and has a row an update. log.jsonl
has the same rows as objects of kind "step", the probes as objects of kind "probe", and sentences about the run as
objects of kind "note". An update that was skipped has a row without a loss, since JSON has no NaN: empty in the one,
null in the other. All files are cut back to a checkpoint's step on resume, so a run that was interrupted reads like one
that was not.
"""
import contextlib
import csv
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from ijepa_fast import compat
from ijepa_fast.data.loader import Batch
from ijepa_fast.errors import UserError
from ijepa_fast.flops import step_flops
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.trackers import Tracker


class StepRow(NamedTuple):
    """One update in the log. Times and speeds are means over the updates that were logged together.

    `COLUMNS` are the names in the files: those of the released code where it has the column.
    """

    epoch: int  # from 1
    itr: int  # from 0, within the epoch
    loss: float | None  # None where it is not finite, and the update was skipped
    context_tokens: float  # of a context sequence, the mean
    target_tokens: float  # of a target block, the mean
    time_ms: float  # of an update
    step: int  # from 1
    lr: float
    weight_decay: float
    momentum: float
    images_s: float
    tokens_s: float
    data_wait: float  # share of the time
    tflops: float  # model TFLOP/s of a device, see `flops`
    mfu: float | None  # the share of the device's peak that this is; None where the peak is not known


_COLUMN_NAMES = {
    "context_tokens": "mask-A",
    "target_tokens": "mask-B",
    "time_ms": "time (ms)",
    "images_s": "images/s",
    "tokens_s": "tokens/s",
    "tflops": "TFLOP/s",
}
COLUMNS = tuple(_COLUMN_NAMES.get(field, field) for field in StepRow._fields)


class RunLog:
    """Rows of one run, in three formats, under `folder`; on ranks that are not `active` it does nothing."""

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        *,
        tensorboard: bool,
        trackers: Sequence[Tracker] = (),
        active: bool = True,
    ):
        self.active, self._trackers = active, trackers
        self.probes: list[dict[str, Any]] = []  # of the run so far
        self.skipped = 0  # updates of the run so far
        if not active:
            return
        self.csv_path, self.jsonl_path = folder / "log.csv", folder / "log.jsonl"
        self._cut_back(resume_step)
        if self.jsonl_path.exists():
            steps, self.probes = read_log(folder)
            self.skipped = sum(row["loss"] is None for row in steps)
        self._csv = open(self.csv_path, "a", newline="")  # noqa: SIM115 (open as long as the run)
        self._jsonl = open(self.jsonl_path, "a")  # noqa: SIM115
        self._rows = csv.writer(self._csv, lineterminator="\n")
        if self._csv.tell() == 0:
            self._rows.writerow(COLUMNS)
        self._board = None
        if tensorboard:
            # Imported here: it takes over a second, and a dry run has no use for it.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote from that step on: after its checkpoint, or all.
            compat.silence_board_thread()
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step and resume_step + 1)

    def steps(self, rows: list[StepRow]) -> None:
        """Add one row an update; TensorBoard gets the last one."""
        if not self.active or not rows:
            return
        self.skipped += sum(row.loss is None for row in rows)
        with naming(self.csv_path):
            self._rows.writerows(rows)
            self._csv.flush()
        with naming(self.jsonl_path):
            for row in rows:
                self._jsonl.write(json.dumps({"kind": "step", **dict(zip(COLUMNS, row, strict=True))}) + "\n")
            self._jsonl.flush()
        values: dict[str, float | None] = dict(zip(COLUMNS, rows[-1], strict=True))
        for counter in ("epoch", "itr", "step"):
            del values[counter]
        self._scalars("train", values, rows[-1].step)

    def probe(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self.probes.append({"kind": "probe", "step": step, **values})
        self._json_line(self.probes[-1])
        self._scalars("probe", values, step)

    def note(self, step: int, text: str) -> None:
        """A sentence about the run, for whoever reads the log."""
        if self.active:
            self._json_line({"kind": "note", "step": step, "text": text})

    def _json_line(self, row: dict[str, Any]) -> None:
        with naming(self.jsonl_path):
            self._jsonl.write(json.dumps(row) + "\n")
            self._jsonl.flush()

    def _scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        known = {f"{group}/{name}": value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.scalars(known, step)
        if self._board is not None:
            with naming(self.csv_path.with_name("tensorboard")):
                for name, value in known.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()

    def close(self) -> None:
        if not self.active:
            return
        for tracker in self._trackers:
            tracker.close()
        self._csv.close()
        self._jsonl.close()
        if self._board is not None:
            self._board.close()

    def _cut_back(self, step: int) -> None:
        """Drop what lies after `step`, and a last line that a kill cut short; at step 0 all: its probe comes again."""
        for path, cut in ((self.jsonl_path, _cut_jsonl), (self.csv_path, _cut_csv)):
            if path.exists():
                try:
                    kept = cut(path.read_text().splitlines(keepends=True), step) if step else []
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UserError(
                        f"{path} holds lines that are no rows of a log: mend it, or move it away to begin another"
                    ) from None
                shortened = path.with_suffix(path.suffix + ".cut")
                shortened.write_text("".join(kept))
                os.replace(shortened, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the operating system, which names no file when one that is open cannot be written, this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _cut_jsonl(lines: list[str], step: int) -> list[str]:
    return [line for line in lines if line.endswith("\n") and int(json.loads(line)["step"]) <= step]


def _cut_csv(lines: list[str], step: int) -> list[str]:
    """Rows up to `step` under today's header: a column that an earlier version did not write stays empty."""
    header, *rows = (line.rstrip("\r\n").split(",") for line in lines if line.endswith("\n"))
    whole = (dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header))
    kept = [row for row in whole if int(row["step"]) <= step]
    return [",".join(columns) + "\n" for columns in (COLUMNS, *([row.get(c, "") for c in COLUMNS] for row in kept))]


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step rows and the probe rows of log.jsonl."""
    path = folder / "log.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no log.jsonl; name the folder of a run (train.folder)")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "probe"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} holds lines that are no rows of a run's log") from None


class Rates(NamedTuple):
    """Speed over some updates; the fields of `StepRow`."""

    time_ms: float
    images_s: float
    tokens_s: float
    data_wait: float
    tflops: float
    mfu: float | None


class Meter:
    """Speed of the updates since it was made.

    `waited`: the loader's count of seconds waited for data. `peak`: FLOP/s of the device, where known.
    """

    def __init__(self, waited: float, peak: float | None):
        self.started, self.waited, self.peak = time.perf_counter(), waited, peak
        self.images = self.tokens = self.updates = 0
        self.flops = 0.0

    def add(self, images: int, tokens: int, flops: float) -> None:
        """An update: `images` and `tokens` of all ranks, FLOPs of this one."""
        self.images += images
        self.tokens += tokens
        self.flops += flops
        self.updates += 1

    def rates(self, waited: float) -> Rates:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        flops = self.flops / seconds
        return Rates(
            time_ms=round(1000 * seconds / self.updates, 2),
            images_s=round(self.images / seconds, 2),
            tokens_s=round(self.tokens / seconds, 1),
            data_wait=round((waited - self.waited) / seconds, 4),
            tflops=round(flops / 1e12, 4),
            mfu=None if self.peak is None else round(flops / self.peak, 4),
        )


@dataclass
class TokenCounts:
    """Tokens of the micro-batches of one update: of context and target sequences, and through all transformers."""

    images: int = 0
    context: int = 0
    contexts: int = 0
    target: int = 0
    targets: int = 0
    covered: int = 0
    all: int = 0

    def add(self, batch: Batch, patches: int) -> None:
        (context, target, _, covered), images = batch.masks, len(batch.images)
        contexts, targets = len(context.image), len(target.image)
        self.images += images
        self.context += len(context.indices)
        self.contexts += contexts
        self.target += len(target.indices)
        self.targets += targets
        self.covered += images * patches if covered is None else len(covered.rows)
        # Target encoder, context encoder, and predictor: each target is predicted beside its own copy of a context.
        predictor = len(context.indices) * (targets // contexts) + len(target.indices)
        self.all += images * patches + len(context.indices) + predictor

    def flops(self, encoder: VisionTransformer, predictor: Predictor) -> float:
        """Of the update, from mean lengths, since the single ones lie on the device: attention, 3 %, is a bit off."""
        return step_flops(
            encoder.size,
            predictor.size,
            encoder.patch_size,
            images=self.images,
            patches=encoder.grid**2,
            context_lengths=np.full(self.contexts, self.context / self.contexts),
            target_lengths=np.full(self.targets, self.target / self.targets),
            context_of=np.repeat(np.arange(self.contexts), self.targets // self.contexts),
            covered=self.covered,
        ).total


class _TimeLeft(ProgressColumn):
    def render(self, task) -> Text:
        seconds = task.fields["seconds_left"]
        if seconds is None:
            return Text("-:--:--", style="cyan")
        hours, rest = divmod(int(seconds), 3600)
        days, hours = divmod(hours, 24)
        return Text((f"{days} d " if days else "") + f"{hours}:{rest // 60:02d}:{rest % 60:02d} left", style="cyan")


class _BarOverNumbers(Progress):
    """The numbers have lines of their own: as a column they would leave the bar and the time left no room."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["numbers"])


class Bar:
    """The progress bar, or, where output is no terminal or `shown` is off, a line at every report."""

    def __init__(self, console: Console, first_step: int, total_steps: int, epochs: int, *, shown: bool):
        self.console, self.total_steps, self.epochs = console, total_steps, epochs
        self._progress = None
        if shown and console.is_terminal:
            self._progress = _BarOverNumbers(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                _TimeLeft(),
                console=console,
                refresh_per_second=5,
            )
            self._task = self._progress.add_task(
                "epoch -", completed=first_step, total=total_steps, numbers="first step ...", seconds_left=None
            )
            self._progress.start()

    def say(self, text: str) -> None:
        """Show `text` in the place of the numbers, until the next report."""
        if self._progress is not None:
            self._progress.update(self._task, numbers=text)

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def report(self, row: StepRow) -> None:
        """Show the last row of those that were logged together."""
        left = (self.total_steps - row.step) * row.time_ms / 1000
        speed = f"{row.tflops:.3g} TFLOP/s" if row.mfu is None else f"MFU {row.mfu:.1%}"
        loss = "not finite" if row.loss is None else f"{row.loss:.4f}"
        numbers = (
            f"loss {loss}  lr {row.lr:.2e}  momentum {row.momentum:.5f}  {row.images_s:.1f} images/s  "
            f"{row.tokens_s:.0f} tokens/s  {speed}  data wait {row.data_wait:.0%}"
        )
        epoch = f"epoch {row.epoch}/{self.epochs}"
        if self._progress is not None:
            self._progress.update(self._task, description=epoch, numbers=numbers, seconds_left=left)
        else:
            minutes = f"{left / 60:.1f} min left"
            line = f"{epoch}  step {row.step}/{self.total_steps}  {numbers}  {minutes}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
