"""What a run tells: a progress bar, log.csv, log.jsonl, TensorBoard and curves.png.

log.csv begins with the released code's columns (epoch from 1, itr from 0 within it) and has a row an update. log.jsonl
has the same rows as objects of kind "step", and the probes as objects of kind "probe". All files are cut back to a
checkpoint's step on resume, so a run that was interrupted reads like one that was not.
"""
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from ijepa_fast.data.loader import Batch
from ijepa_fast.errors import UserError

COLUMNS = (
    "epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)",
    "step", "lr", "weight_decay", "momentum", "images/s", "tokens/s", "data_wait",
)  # fmt: skip


class RunLog:
    """Rows of one run, in three formats, under `folder`; on ranks that are not `active` it does nothing.

    `time (ms)`, `images/s`, `tokens/s` and `data_wait` are those of the window of updates that were logged together.
    """

    def __init__(self, folder: Path, resume_step: int, *, tensorboard: bool, active: bool = True):
        self.active = active
        if not active:
            return
        self.csv_path, self.jsonl_path = folder / "log.csv", folder / "log.jsonl"
        self._cut_back(resume_step)
        self._csv = open(self.csv_path, "a", newline="")  # noqa: SIM115 (open as long as the run)
        self._jsonl = open(self.jsonl_path, "a")  # noqa: SIM115
        self._rows = csv.DictWriter(self._csv, COLUMNS, lineterminator="\n")
        if self._csv.tell() == 0:
            self._rows.writeheader()
        self._board = None
        if tensorboard:
            # Imported here: it takes over a second, and a dry run has no use for it.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote from that step on: after its checkpoint, or all.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step and resume_step + 1)

    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Add one row an update, each with all of COLUMNS; TensorBoard gets the last one."""
        if not self.active or not rows:
            return
        for row in rows:
            self._rows.writerow(row)
            self._jsonl.write(json.dumps({"kind": "step", **row}) + "\n")
        self._csv.flush()
        self._jsonl.flush()
        self._scalars("train", {name: rows[-1][name] for name in COLUMNS[2:] if name != "step"}, rows[-1]["step"])

    def probe(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self._jsonl.write(json.dumps({"kind": "probe", "step": step, **values}) + "\n")
        self._jsonl.flush()
        self._scalars("probe", values, step)

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        if not self.active:
            return
        self._csv.close()
        self._jsonl.close()
        if self._board is not None:
            self._board.close()

    def _cut_back(self, step: int) -> None:
        """Drop what lies after `step`, and a last line that a kill cut short; at step 0 all: its probe comes again."""
        for path, step_of in ((self.jsonl_path, _jsonl_step), (self.csv_path, _csv_step)):
            if path.exists():
                kept = [line for line in path.read_text().splitlines(keepends=True) if step and step_of(line) <= step]
                shortened = path.with_suffix(path.suffix + ".cut")
                shortened.write_text("".join(kept))
                os.replace(shortened, path)


def _jsonl_step(line: str) -> float:
    return json.loads(line)["step"] if line.endswith("\n") else float("inf")


def _csv_step(line: str) -> float:
    fields = line.rstrip("\r\n").split(",")
    if fields == list(COLUMNS):
        return 0
    complete = line.endswith("\n") and len(fields) == len(COLUMNS)
    return int(fields[COLUMNS.index("step")]) if complete else float("inf")


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step rows and the probe rows of log.jsonl."""
    path = folder / "log.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no log.jsonl; name the folder of a run (train.folder)")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "probe"]


def draw_curves(folder: Path) -> Path:
    """Write curves.png: loss, RankMe and k-NN, the schedules, and speed, against the step."""
    # Imported here: matplotlib takes a second that the first step of a run need not wait for.
    from matplotlib.figure import Figure

    steps, probes = read_log(folder)
    x = [row["step"] for row in steps]
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=120)
    loss, quality, rates, speed = figure.subplots(2, 2).flat

    values = [row["loss"] for row in steps]
    loss.plot(x, values, color="#9db7d5", linewidth=0.8, label="each update")
    loss.plot(x, _smoothed(values), color="#1f4e8c", linewidth=1.6, label="smoothed")
    loss.set_title("loss (says little by itself: the targets move)")
    loss.legend(frameon=False)

    if probes:
        at = [row["step"] for row in probes]
        quality.plot(at, [row["rankme"] for row in probes], "o-", color="#1f4e8c", markersize=3)
        quality.set_ylabel("RankMe", color="#1f4e8c")
        if "knn" in probes[0]:
            accuracy = quality.twinx()
            accuracy.plot(at, [100 * row["knn"] for row in probes], "s-", color="#c2571a", markersize=3)
            accuracy.set_ylabel("k-NN accuracy, %", color="#c2571a")
    else:
        quality.text(0.5, 0.5, "no probe was made", ha="center", transform=quality.transAxes)
    quality.set_title("target features")

    rates.plot(x, [row["lr"] for row in steps], color="#1f4e8c")
    rates.set_ylabel("learning rate", color="#1f4e8c")
    momentum = rates.twinx()
    momentum.plot(x, [row["momentum"] for row in steps], color="#c2571a")
    momentum.set_ylabel("EMA momentum", color="#c2571a")
    momentum.ticklabel_format(useOffset=False)
    rates.set_title("schedules")

    speed.plot(x, [row["images/s"] for row in steps], color="#1f4e8c", linewidth=0.8)
    speed.set_ylim(bottom=0)
    speed.set_title("images/s")
    for axis in (loss, quality, rates, speed):
        axis.set_xlabel("step")
        axis.spines[["top"]].set_visible(False)
        axis.grid(alpha=0.25)
    path = folder / "curves.png"
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)
    return path


def _smoothed(values: list[float], span: int = 25) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        before = smoothed[-1] if smoothed else value
        smoothed.append(before + (value - before) * 2 / (span + 1))
    return smoothed


class Meter:
    """Speed of the updates since it was made; `waited` is the loader's count of seconds waited for data."""

    def __init__(self, waited: float):
        self.started, self.waited = time.perf_counter(), waited
        self.images = self.tokens = self.updates = 0

    def add(self, images: int, tokens: int) -> None:
        self.images += images
        self.tokens += tokens
        self.updates += 1

    def rates(self, waited: float) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "time (ms)": round(1000 * seconds / self.updates, 2),
            "images/s": round(self.images / seconds, 2),
            "tokens/s": round(self.tokens / seconds, 1),
            "data_wait": round((waited - self.waited) / seconds, 4),
        }


@dataclass
class TokenCounts:
    """Tokens of the micro-batches of one update: of context and target sequences, and through all transformers."""

    context: int = 0
    contexts: int = 0
    target: int = 0
    targets: int = 0
    all: int = 0

    def add(self, batch: Batch, patches: int) -> None:
        (context, target, _), images = batch.masks, len(batch.images)
        contexts, targets = len(context.image), len(target.image)
        self.context += len(context.indices)
        self.contexts += contexts
        self.target += len(target.indices)
        self.targets += targets
        # Target encoder, context encoder, and predictor: each target is predicted beside its own copy of a context.
        predictor = len(context.indices) * (targets // contexts) + len(target.indices)
        self.all += images * patches + len(context.indices) + predictor


class _TimeLeft(ProgressColumn):
    def render(self, task) -> Text:
        seconds = task.fields["seconds_left"]
        if seconds is None:
            return Text("-:--:--", style="cyan")
        hours, rest = divmod(int(seconds), 3600)
        days, hours = divmod(hours, 24)
        return Text((f"{days} d " if days else "") + f"{hours}:{rest // 60:02d}:{rest % 60:02d} left", style="cyan")


class Bar:
    """The progress bar, or, where output is no terminal or `shown` is off, a line at every report."""

    def __init__(self, console: Console, first_step: int, total_steps: int, epochs: int, *, shown: bool):
        self.console, self.total_steps, self.epochs = console, total_steps, epochs
        self._progress = None
        if shown and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), _TimeLeft(),
                TextColumn("\n{task.fields[numbers]}"), console=console, refresh_per_second=5,
            )  # fmt: skip
            self._task = self._progress.add_task(
                "epoch -", completed=first_step, total=total_steps, numbers="first step ...", seconds_left=None
            )
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def report(self, row: dict[str, Any]) -> None:
        """Show a row of the log: the last update of a window, with the window's speed."""
        left = (self.total_steps - row["step"]) * row["time (ms)"] / 1000
        numbers = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  momentum {row['momentum']:.5f}  "
            f"{row['images/s']:.1f} images/s  {row['tokens/s']:.0f} tokens/s  data wait {row['data_wait']:.0%}"
        )
        epoch = f"epoch {row['epoch']}/{self.epochs}"
        if self._progress is not None:
            self._progress.update(self._task, description=epoch, numbers=numbers, seconds_left=left)
        else:
            minutes = f"{left / 60:.1f} min left"
            line = f"{epoch}  step {row['step']}/{self.total_steps}  {numbers}  {minutes}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
