"""An update whose loss is not finite changes nothing, is named and counted, and ten of them in a row end a run."""
import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spoiled import spoil
from torch import Tensor

import ijepa_fast.train as driver
from ijepa_fast.metrics import read_log
from ijepa_fast.reporting import MOST_SKIPPED

pytestmark = pytest.mark.long

STEPS = 20  # 4 epochs of 5


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*"))


def tensors(folder: Path, number: int) -> dict[str, Tensor]:
    (shard,) = (folder / "checkpoints" / f"step_{number:08d}").glob("*.safetensors")
    return load_file(shard)


def changed(folder: Path, before: int, after: int) -> set[str]:
    one, other = tensors(folder, before), tensors(folder, after)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def counts(folder: Path, number: int) -> set[float]:
    """The optimizer's own, of all weights."""
    held = tensors(folder, number)
    return {float(x) for name, x in held.items() if name.startswith("optimizer.") and name.endswith(".step")}


def warnings(text: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in text.splitlines() if line.startswith("warning: ")]


def rows(folder: Path) -> list[dict]:
    """log.jsonl, which has to be JSON: no NaN."""
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]


def notes(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["text"]) for row in rows(folder) if row["kind"] == "note"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_skipped_update_changes_nothing_and_the_run_goes_on(loss, train, tmp_path, monkeypatch):
    """Of steps 3 and 5; the last one too, whose checkpoint holds what that of the step before it does."""
    folder, words = tmp_path / "run", ("optim.epochs=1", "train.checkpoint_every=1", "train.keep_last=9")
    states = {}
    update = driver.update

    def watched(run, number, batches):
        done = update(run, number, batches)
        optimizer = run.state.optimizer
        named = {f"{part}.{name}": x for part, held in run.state.weights().items() for name, x in held.items()}
        named |= {f"{i}.{k}": x for i, held in enumerate(optimizer.state.values()) for k, x in held.items()}
        states[number + 1] = {name: x.clone() for name, x in named.items()}, int(optimizer.skipped)
        return done

    monkeypatch.setattr(driver, "update", watched)
    spoil(monkeypatch, {3, 5}, loss)
    outcome = train(*words, f"train.folder={folder}")
    assert outcome.code == 0, outcome.err

    assert [skipped for _, skipped in states.values()] == [0, 0, 1, 1, 2]
    for before, after, same in ((1, 2, False), (2, 3, True), (3, 4, False), (4, 5, True)):
        (one, _), (other, _) = states[before], states[after]
        assert all(torch.equal(one[name], other[name]) for name in one) == same, (before, after)
    # Not after a skipped update but at the end: a checkpoint there would take the place of an older one.
    assert checkpoints(folder) == [1, 2, 4, 5]
    assert changed(folder, 4, 5) == set()
    assert changed(folder, 1, 2) > {"target_encoder.norm.weight"}
    assert [counts(folder, number) for number in checkpoints(folder)] == [{1.0}, {2.0}, {3.0}, {3.0}]

    said = [f"the loss of step {n} is {loss}: its update was skipped ({i} so far)" for i, n in ((1, 3), (2, 5))]
    assert warnings(outcome.out) == said
    assert notes(folder) == list(zip((3, 5), said, strict=True))
    steps, _ = read_log(folder)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in steps if row["loss"] is None] == [3, 5]
    with open(folder / "log.csv", newline="") as file:
        losses = [line["loss"] for line in csv.DictReader(file)]
    assert losses == ["" if row["loss"] is None else repr(row["loss"]) for row in steps]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["skipped"]) == (True, 5, 2)
    assert summary["loss"] == steps[3]["loss"]
    assert outcome.out.splitlines()[-1].endswith(", 2 updates skipped")
    assert (folder / "curves.png").exists()


FIRST = 5  # of a series


@pytest.mark.parametrize(("every", "save_every"), [(1, 3), (7, 1000), (50, 3), (50, 1000)])
def test_ten_in_a_row_stop_the_run(every, save_every, train, tmp_path, monkeypatch):
    """Whenever the losses are read, also after they were finite again; no checkpoint takes the place of one before."""
    folder, last = tmp_path / "run", FIRST + MOST_SKIPPED - 1
    spoil(monkeypatch, range(FIRST, last + 1))
    words = (f"log.every={every}", f"train.checkpoint_every={save_every}", "train.keep_last=1")
    outcome = train(*words, f"train.folder={folder}")
    assert outcome.error.startswith(
        f"10 updates in a row were skipped, up to step {last}, whose loss is nan, so the run stopped and saved nothing "
        f"of it; --resume would do the same again: "
    )
    assert checkpoints(folder) == ([3] if save_every == 3 else [])
    steps, _ = read_log(folder)
    assert [row["step"] for row in steps] == list(range(1, last + 1))
    assert [row["step"] for row in steps if row["loss"] is None] == list(range(FIRST, last + 1))
    assert len(warnings(outcome.out)) == MOST_SKIPPED


@pytest.mark.parametrize("every", [1, 50])
def test_nine_in_a_row_do_not(every, train, tmp_path, monkeypatch):
    """Nor eighteen with one between. What was to be saved among them is saved with the first that is made."""
    folder, between = tmp_path / "run", FIRST + MOST_SKIPPED - 1
    spoil(monkeypatch, set(range(FIRST, STEPS)) - {between})
    words = (f"log.every={every}", "train.checkpoint_every=6", "train.keep_last=9")
    outcome = train(*words, f"train.folder={folder}")
    assert outcome.code == 0, outcome.err
    assert len(warnings(outcome.out)) == STEPS - FIRST - 1
    assert checkpoints(folder) == [between, STEPS]
    assert counts(folder, STEPS) == {FIRST + 1.0}
    assert changed(folder, between, STEPS)


@pytest.mark.parametrize(
    ("skipped", "stop"), [({1, 7, 10}, 1), ({3, 6, 7, 8}, 7)], ids=["the first update", "in a series"]
)
def test_a_run_with_skipped_updates_resumes_exactly(skipped, stop, train, tmp_path, monkeypatch):
    """Stopped by a signal in a step that is skipped, and killed later: the same rows, warnings, counts and tensors."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    words = ("optim.epochs=2", "train.checkpoint_every=9", "log.every=2")
    spoil(monkeypatch, skipped)
    whole = train(*words, f"train.folder={straight}")
    assert whole.code == 0, whole.err
    assert len(warnings(whole.out)) == len(skipped)
    assert counts(straight, 10) == {10.0 - len(skipped)}

    update = driver.update

    def stopped(run, number, batches):
        if number + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "update", stopped)
        first = train(*words, f"train.folder={resumed}")
    assert first.code == 0, first.err
    assert checkpoints(resumed) == [stop]
    assert counts(resumed, stop) == {float(stop - len([n for n in skipped if n <= stop]))}
    second = train(*words, "--resume", f"train.folder={resumed}")
    assert second.code == 0, second.err
    assert checkpoints(resumed) == [stop, 9, 10]
    shutil.rmtree(resumed / "checkpoints" / "step_00000010")  # as if it had been killed before
    third = train(*words, "--resume", f"train.folder={resumed}")
    assert third.code == 0, third.err

    assert warnings(first.out) + warnings(second.out) == warnings(whole.out)
    # Sorted: a note comes after all rows that were read with its own.
    computed = ("step", "kind", "loss", "lr", "weight_decay", "momentum", "text")
    logs = [sorted([[str(row.get(name)) for name in computed] for row in rows(f)]) for f in (straight, resumed)]
    assert logs[0] == logs[1]
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (straight, resumed))
    assert (one["skipped"], one["loss"]) == (other["skipped"], other["loss"])
    assert one["skipped"] == len(skipped)
    ours, theirs = tensors(straight, 10), tensors(resumed, 10)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_that_makes_no_update(train, tmp_path, monkeypatch):
    """Too short for ten: it ends with the weights that it began with, and says so."""
    spoil(monkeypatch, range(1, 4))
    folder = tmp_path / "run"
    outcome = train("optim.epochs=1", "optim.epoch_length=3", f"train.folder={folder}", "log.every=2")
    assert outcome.code == 0, outcome.err
    assert counts(folder, 3) == {0.0}
    assert json.loads((folder / "summary.json").read_text())["loss"] is None
    assert ": loss never finite, " in outcome.out.splitlines()[-1]
    assert "loss not finite  lr" in outcome.out
