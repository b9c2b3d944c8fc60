"""When a run's log speaks of collapse, and when it does not; the same after a resume."""
import json

import pytest

from ijepa_fast.evaluation.collapse import collapse_warning
from ijepa_fast.evaluation.probe import Probe
from ijepa_fast.metrics import RunLog


def said(ranks: list[float], every: int = 500, total: int = 10_000, relative_std: float = 0.3) -> list[int]:
    """At which steps something is said, in a run whose probes saw `ranks`."""
    rows = [{"step": every * n, "rankme": rank, "relative_std": relative_std} for n, rank in enumerate(ranks)]
    return [rows[n]["step"] for n in range(len(rows)) if collapse_warning(rows[: n + 1], total)]


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [
        ([20, 15, 12, 11, 11, 11, 11], []),  # lower, but not below half
        ([20, 5, 7, 12, 18, 30], []),  # one early dip
        ([20, 9, 6, 7, 8, 9, 9.5], []),  # low for long, and rising
        ([20, 8, 5, 4, 4, 3], [1500, 2000, 2500]),  # low and not rising, after three probes
        ([20, 30, 40, 8, 20, 8, 20], []),  # never three in a row
        ([20, 30, 9, 8, 7], [2000]),
        ([20], []),
    ],
)
def test_rank_alarms_after_three_low_probes(ranks, steps):
    assert said(ranks) == steps


def test_an_early_dip_of_any_number_of_probes_is_no_alarm():
    dip = [20, 9, 8, 7, 6, 5, 5, 5, 5, 5, 5, 5]
    assert said(dip, every=100) == [1100]  # good runs are back after about 900 updates
    assert said(dip, every=10, total=160) == [90, 100, 110]  # a short run is judged in its second half


def test_features_that_are_all_alike_alarm_at_two_probes():
    assert said([20, 20, 20], every=10, relative_std=0.01) == [10, 20]
    rows = [{"step": n, "rankme": 20.0, "relative_std": value} for n, value in enumerate((0.3, 0.01))]
    assert collapse_warning(rows, 100) is None
    rows = [{"step": n, "rankme": 20.0} for n in range(3)]  # of a log that an earlier version wrote
    assert collapse_warning(rows, 100) is None


def test_a_resumed_log_knows_the_probes_of_its_checkpoint(tmp_path):
    values = [20.0, 8.0, 5.0, 4.0]
    log = RunLog(tmp_path, 0, tensorboard=False)
    for n, rank in enumerate(values):
        log.probe(500 * n, {"rankme": rank})
    log.note(1500, "x")
    log.close()
    whole = log.probes
    again = RunLog(tmp_path, 1000, tensorboard=False)
    assert again.probes == whole[:3]
    again.probe(1500, {"rankme": 4.0})
    again.close()
    assert again.probes == whole
    assert collapse_warning(again.probes, 10_000) == collapse_warning(whole, 10_000) is not None
    fresh = RunLog(tmp_path, 0, tensorboard=False)
    assert fresh.probes == []
    fresh.close()


@pytest.mark.long
def test_a_run_says_what_usually_helps(train, monkeypatch, tmp_path):
    ranks = iter([20.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(Probe, "__call__", lambda self, encoder: {"rankme": next(ranks), "knn": 0.5, "linear": 0.25})
    outcome = train(f"train.folder={tmp_path}", "log.probe_every=4", "optim.epochs=3", "optim.epoch_length=4")
    assert (outcome.code, outcome.err) == (0, "")
    assert "step 0: target features have RankMe 20.0, k-NN 50.0%, linear 25.0%" in outcome.out
    sentence = (
        "step 12: this looks like collapse: RankMe has been below 50% of its first 20.0 for 3 probes and does not rise "
        "(now 2.0); what usually helps: a lower optim.lr, a longer warm-up (optim.warmup_epochs), a slower EMA "
        "(optim.momentum nearer to 1)"
    )
    assert outcome.out.count("warning:") == 1
    assert f"warning: {sentence}" in outcome.out
    notes = [row for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if row["kind"] == "note"]
    assert notes == [{"kind": "note", "step": 12, "text": sentence}]
