"""The run's log: released columns first, three formats that agree, cut back exactly, pictures and rates."""
import csv
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from ijepa_fast import metrics
from ijepa_fast.config import MaskConfig
from ijepa_fast.data.loader import Batch
from ijepa_fast.errors import UserError
from ijepa_fast.flops import peak_flops, step_flops
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.metrics import COLUMNS, Bar, Meter, Rates, RunLog, StepRow, TokenCounts, read_log
from ijepa_fast.model import build_encoder, build_predictor
from ijepa_fast.view.curves import draw_curves, smoothed
from ijepa_fast.view.runs import draw_runs


def row(step: int) -> StepRow:
    values = StepRow(*map(float, range(len(COLUMNS))))
    return values._replace(epoch=(step - 1) // 5 + 1, itr=(step - 1) % 5, step=step, loss=1 / 3 / step)


def write(folder, steps, *, resume_step=0, probe_every=None, tensorboard=False) -> None:
    log = RunLog(folder, resume_step, tensorboard=tensorboard)
    if probe_every and resume_step == 0:
        log.probe(0, {"rankme": 1.0, "knn": 0.0, "linear": 0.1})
    for step in steps:
        log.steps([row(step)])
        if probe_every and step % probe_every == 0:
            log.probe(step, {"rankme": float(step), "knn": step / 100, "linear": step / 50})
    log.close()


def steps_in(folder) -> tuple[list[int], list[int], list[int]]:
    """Steps in the CSV, and of the rows and the probes in the JSON lines."""
    with open(folder / "log.csv", newline="") as file:
        table = [int(line["step"]) for line in csv.DictReader(file)]
    steps, probes = read_log(folder)
    return table, [r["step"] for r in steps], [r["step"] for r in probes]


def test_csv_begins_with_the_released_columns(tmp_path):
    write(tmp_path, [1, 2])
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith("epoch,itr,loss,mask-A,mask-B,time (ms),")
    assert len(lines) == 2
    assert lines[1].startswith(f"1,1,{1 / 6!r},")


def test_json_lines_and_csv_agree(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.steps([row(1), row(2), row(3)])
    log.close()
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    steps, probes = read_log(tmp_path)
    assert probes == []
    assert len(table) == len(steps) == 3
    for text, values in zip(table, steps, strict=True):
        assert values.pop("kind") == "step"
        assert {name: float(value) for name, value in text.items()} == values


def test_rows_are_on_the_disk_at_once(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.steps([row(1)])
    log.probe(1, {"rankme": 2.0})
    assert steps_in(tmp_path) == ([1], [1], [1])
    log.close()


def test_no_row_at_all(tmp_path):
    write(tmp_path, [])
    assert steps_in(tmp_path) == ([], [], [])


@pytest.mark.parametrize("resume_step", [0, 1, 6, 9, 10])
def test_cut_back(resume_step, tmp_path):
    write(tmp_path / "a", range(1, 11), probe_every=3)
    write(tmp_path / "a", range(resume_step + 1, 13), resume_step=resume_step, probe_every=3)
    write(tmp_path / "b", range(1, 13), probe_every=3)
    for name in ("log.csv", "log.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"log.csv", "log.jsonl"}


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, range(1, 5))
    write(b, range(1, 7))
    whole = {name: (a / name).read_bytes() for name in ("log.csv", "log.jsonl")}
    for cut in (1, 2, 3, 10, 60):
        for name, data in whole.items():
            (a / name).write_bytes(data[:-cut])
        # The checkpoint is of step 4, so row 4 was written before it: what is cut short here is the row after that.
        write(a, [4, 5, 6], resume_step=3)
        for name in whole:
            assert (a / name).read_bytes() == (b / name).read_bytes(), (cut, name)


def test_what_follows_a_line_without_its_end_is_readable(tmp_path):
    write(tmp_path, range(1, 5))
    for name in ("log.csv", "log.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    write(tmp_path, [5, 6], resume_step=4)
    assert steps_in(tmp_path) == ([1, 2, 3, 5, 6], [1, 2, 3, 5, 6], [])


@pytest.mark.parametrize("kept", [0, 3])
def test_a_header_cut_short_is_written_anew(kept, tmp_path):
    (tmp_path / "log.csv").write_text("epoch,itr,loss"[:kept])
    write(tmp_path, [1])
    assert steps_in(tmp_path)[0] == [1]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "a", 0, tensorboard=True, active=False)
    log.steps([row(1)])
    log.probe(1, {"rankme": 1.0})
    log.close()
    assert list((tmp_path / "a").iterdir()) == []


def events(folder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.mark.parametrize("resume_step", [0, 4])
def test_tensorboard_is_purged_after_a_resumption(resume_step, tmp_path):
    write(tmp_path, range(1, 8), probe_every=2, tensorboard=True)
    write(tmp_path, range(resume_step + 1, 10), resume_step=resume_step, probe_every=2, tensorboard=True)
    expected = [(step, np.float32(1 / 3 / step)) for step in range(1, 10)]
    assert events(tmp_path, "train/loss") == expected
    assert [step for step, _ in events(tmp_path, "probe/rankme")] == [0, 2, 4, 6, 8]


def test_tensorboard_has_every_number_but_the_counters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1], probe_every=1, tensorboard=True)
    tags = set(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"])
    # TensorBoard writes "time (ms)" as "time__ms_".
    expected = {f"train/{name}" for name in COLUMNS if name not in ("epoch", "itr", "step")}
    probes = {"probe/rankme", "probe/knn", "probe/linear"}
    assert {tag.replace("time__ms_", "time (ms)") for tag in tags} == expected | probes


def test_a_skipped_update_has_a_row_without_a_loss(tmp_path):
    """Empty, null, no point, a gap; counted over a run that is resumed, which drops what lies after its checkpoint."""
    for resume_step, steps, skipped, count in ((0, range(1, 9), (1, 4, 8), 3), (6, (7, 8), (7,), 3)):
        log = RunLog(tmp_path, resume_step, tensorboard=True)
        assert log.skipped == (2 if resume_step else 0)
        for step in steps:
            log.steps([row(step)._replace(loss=None) if step in skipped else row(step)])
        log.close()
        assert log.skipped == count
    losses = [None if step in (1, 4, 7) else 1 / 3 / step for step in range(1, 9)]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == losses
    with open(tmp_path / "log.csv", newline="") as file:
        assert [line["loss"] for line in csv.DictReader(file)] == ["" if x is None else repr(x) for x in losses]
    made = [(step, np.float32(x)) for step, x in enumerate(losses, 1) if x is not None]
    assert events(tmp_path, "train/loss") == made
    assert len(events(tmp_path, "train/lr")) == 8
    assert draw_curves(tmp_path).exists()
    assert draw_runs([tmp_path], tmp_path / "runs.png").exists()


def test_curves_of_a_run_that_made_no_update(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.steps([row(1)._replace(loss=None)])
    log.close()
    assert draw_curves(tmp_path).exists()
    assert draw_runs([tmp_path], tmp_path / "runs.png").exists()


def test_read_log_of_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no log\.jsonl; name the folder of a run"):
        read_log(tmp_path)


@pytest.mark.parametrize("probe_every", [None, 2])
def test_curves_are_a_picture_of_the_log(probe_every, tmp_path, monkeypatch):
    write(tmp_path, range(1, 12), probe_every=probe_every)
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), savefig(figure, path)))
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 500
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "log.csv", "log.jsonl", "curves.png"}

    steps, probes = read_log(tmp_path)
    curves = {}
    for axes in drawn[0].axes:
        for line in axes.lines:
            curves.setdefault(axes.get_ylabel() or axes.get_title(), []).append((list(line.get_xdata()), line))
    for name, key in (("learning rate", "lr"), ("EMA momentum", "momentum"), ("images/s", "images/s")):
        ((x, line),) = curves[name]
        assert (x, list(line.get_ydata())) == ([r["step"] for r in steps], [r[key] for r in steps])
    (loss, smooth) = next(lines for name, lines in curves.items() if name.startswith("loss"))
    assert list(loss[1].get_ydata()) == [r["loss"] for r in steps]
    assert list(smooth[1].get_ydata()) == smoothed([r["loss"] for r in steps])
    accuracies = "k-NN (solid) and linear (dotted), %"
    assert ("RankMe" in curves) == (accuracies in curves) == (probe_every is not None)
    if probe_every is not None:
        assert [p["step"] for p in probes] == curves["RankMe"][0][0]
        assert [p["rankme"] for p in probes] == list(curves["RankMe"][0][1].get_ydata())
        for key, (x, line) in zip(("knn", "linear"), curves[accuracies], strict=True):
            assert (x, list(line.get_ydata())) == ([p["step"] for p in probes], [100 * p[key] for p in probes])


def test_curves_of_a_probe_without_labels(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.steps([row(1)])
    log.probe(1, {"rankme": 2.0})
    log.close()
    assert draw_curves(tmp_path).exists()


def test_rates(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    meter = Meter(waited=4.0, peak=8e12)
    meter.add(images=32, tokens=1000, flops=2e12)
    meter.add(images=32, tokens=1500, flops=3e12)
    assert meter.rates(waited=4.5) == Rates(
        time_ms=1250.0, images_s=25.6, tokens_s=1000.0, data_wait=0.2, tflops=2.0, mfu=0.25
    )


def test_no_mfu_where_the_peak_is_not_known(tmp_path):
    """An empty field, null, and no point in TensorBoard: no number that means something else."""
    meter = Meter(waited=0.0, peak=peak_flops(torch.device("cpu")))
    meter.add(images=1, tokens=1, flops=1e12)
    rates = meter.rates(waited=0.0)
    assert rates.mfu is None
    log = RunLog(tmp_path, 0, tensorboard=True)
    log.steps([row(1)._replace(**rates._asdict())])
    log.close()
    assert (tmp_path / "log.csv").read_text().endswith(",\n")
    assert read_log(tmp_path)[0][0]["mfu"] is None
    with pytest.raises(KeyError):
        events(tmp_path, "train/mfu")
    assert len(events(tmp_path, "train/images/s")) == 1


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("GeForce GTX 1080", None)]
)
def test_the_peak_goes_by_the_device_s_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_log_without_todays_columns_goes_on(tmp_path):
    """As written before TFLOP/s and MFU were logged."""
    write(tmp_path, range(1, 4))
    file = tmp_path / "log.csv"
    file.write_text("".join(",".join(line.split(",")[:-2]) + "\n" for line in file.read_text().splitlines()))
    write(tmp_path, [3, 4], resume_step=2)
    with open(file, newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [line["step"] for line in table] == ["1", "2", "3", "4"]
    assert [line["loss"] for line in table] == [repr(1 / 3 / step) for step in range(1, 5)]
    assert [line["mfu"] for line in table] == ["", "", "14.0", "14.0"]


@pytest.mark.parametrize("contexts", [1, 2])
def test_token_counts_are_those_of_the_transformers(contexts):
    grid, images = 8, 6
    config = MaskConfig(collate="ragged", min_keep=1, num_contexts=contexts, num_targets=3)
    masks = MultiBlockMasks(config, grid, seed=0, global_batch=images).sample(0, 0, images)
    batch = Batch(torch.zeros(images, 1, 1, 3, dtype=torch.uint8), masks, np.arange(images), 0, True)
    counts = TokenCounts()
    counts.add(batch, grid**2)
    counts.add(batch, grid**2)

    context, target = masks.context.cu_seqlens.diff().tolist(), masks.target.cu_seqlens.diff().tolist()
    predictor = sum(context[c] + t for c, t in zip(masks.context_of.tolist(), target, strict=True))
    with torch.device("meta"):
        encoder = build_encoder("vit_tiny", image_size=4 * grid, patch_size=4)
        narrow = build_predictor(encoder, depth=2, dim=48)
    exact = step_flops(
        encoder.size, narrow.size, 4, images=images, patches=grid**2, context_lengths=np.array(context),
        target_lengths=np.array(target), context_of=masks.context_of.numpy(), covered=len(masks.covered.rows),
    ).total  # fmt: skip
    assert counts.flops(encoder, narrow) == pytest.approx(2 * exact, rel=0.01)  # mean lengths: attention alone differs
    assert counts.all == 2 * (images * grid**2 + sum(context) + predictor)
    assert counts.context / counts.contexts == sum(context) / (images * contexts)
    assert counts.target / counts.targets == sum(target) / (images * contexts * 3)


def report(
    *, terminal: bool, shown: bool, left: float = 90.0, mfu: float | None = 0.417, width: int = 200
) -> str:
    with open(os.devnull, "w") as sink:
        console = Console(file=sink, force_terminal=terminal, width=width, record=True)
        bar = Bar(console, 10, 100, epochs=4, shown=shown)
        bar.advance(40)
        numbers = {"loss": 0.25, "lr": 1e-3, "momentum": 0.9975, "images_s": 320.5, "tokens_s": 123456.0}
        speed = {"data_wait": 0.031, "tflops": 412.4, "mfu": mfu, "time_ms": 1000 * left / 60}
        bar.report(row(40)._replace(epoch=2, **numbers, **speed))
        bar.close()
        return console.export_text()


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_progress_tells_what_is_asked_for(terminal, shown):
    text = report(terminal=terminal, shown=shown)
    for words in ("epoch 2/4", "40/100", "loss 0.2500", "lr 1.00e-03", "momentum 0.99750", "320.5 images/s",
                  "123456 tokens/s", "MFU 41.7%", "data wait 3%"):  # fmt: skip
        assert words in text
    assert ("0:01:30 left" if terminal and shown else "1.5 min left") in text


@pytest.mark.parametrize("width", [80, 110])
def test_bar_and_time_left_show_whole_on_a_narrow_terminal(width):
    text = report(terminal=True, shown=True, width=width)
    whole = [line for line in text.splitlines() if "epoch 2/4" in line and "40/100 0:01:30 left" in line]
    assert whole
    assert all(line.count("\N{BOX DRAWINGS HEAVY HORIZONTAL}") >= 35 for line in whole)
    assert "data wait 3%" in " ".join(text.split())


def test_progress_without_a_known_peak():
    assert "412 TFLOP/s" in report(terminal=False, shown=True, mfu=None)


def test_time_left_in_days():
    assert "2 d 3:04:05 left" in report(terminal=True, shown=True, left=2 * 86400 + 3 * 3600 + 4 * 60 + 5.5)


def test_smoothed_loss_follows_a_constant_and_lags_a_step():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5, rel=1e-12)  # fp64 roundings
    assert smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]  # too few to be smoothed
    # The first two of 200 count almost alike: a value weighs 12/13 of the next one, over 25 updates.
    smooth = smoothed([3.0, 1.0] + [0.0] * 198)
    assert smooth[1] == pytest.approx((3 * 12 / 13 + 1) / (12 / 13 + 1), rel=1e-12)
    smooth = smoothed([0.0] + [1.0] * 200)
    assert smooth[0] == 0
    assert all(a < b for a, b in itertools.pairwise(smooth[:50]))
    assert math.isclose(smooth[-1], 1, abs_tol=1e-5)


def test_what_has_no_loss_leaves_the_smoothed_loss_as_it_is():
    values = [1.0, 3.0, 2.0, 5.0]
    with_gaps = [None, *values[:2], None, *values[2:]]
    assert [x for x in smoothed(with_gaps) if x is not None] == smoothed(values)
    assert [i for i, x in enumerate(smoothed(with_gaps)) if x is None] == [0, 3]


def test_every_column_is_documented_in_its_order():
    page = (Path(__file__).parents[1] / "docs" / "run_folder.md").read_text()
    rows = page.split("## The columns of log.csv")[1].splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == list(COLUMNS)
