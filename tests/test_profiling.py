"""train.profile: a trace and a table of some updates."""
import json

import pytest

pytestmark = pytest.mark.long  # trains


def test_a_run_leaves_a_trace_and_a_table(train, tmp_path):
    outcome = train(f"train.folder={tmp_path}", "optim.epochs=1", "train.profile=1")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"profile     {tmp_path / 'profile.txt'}" in outcome.out
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    products = sum(event.get("name") == "aten::addmm" for event in events)
    blocks = 12 + 12 + 1  # target, context and predictor, four products each, two more of the predictor, an embedding
    assert products >= 4 * blocks  # of one update, not of all five
    assert products < 2 * (4 * blocks + 4)
    assert "aten::addmm" in (tmp_path / "profile.txt").read_text()

