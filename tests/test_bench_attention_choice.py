"""bench/attention_choice.py: the table in the code is that of the committed records, and what decides it."""
import json
import re

import pytest
import torch
from ijepa_kernels import attention_triton
from ijepa_kernels.attention_backends import MEASURED_FASTER

from bench import attention_choice

NAME = "NVIDIA H100 80GB HBM3"


def test_the_table_in_the_code_is_that_of_the_records():
    """Else: `python bench/attention_choice.py --write`."""
    text = attention_choice.table(attention_choice.RESULTS)
    assert text in attention_choice.TABLE.read_text()
    assert re.search(rf"# {NAME}, 20\d\d-\d\d-\d\d, beside torch_varlen: 1\.4 to 2\.9 times as fast", text)
    names = {"torch": torch}
    exec(text, names)
    assert names["MEASURED_FASTER"] == MEASURED_FASTER == {(d, torch.bfloat16, 9) for d in (24, 32, 64, 80, 88)}


@pytest.fixture
def results(tmp_path):
    """Adds records and sweeps of a folder of results."""
    folder = tmp_path / "results/gpu"
    (folder / "sweeps").mkdir(parents=True)

    def add(date: str, times: dict[str, dict[str, float]], device=NAME, **session) -> None:
        """`times`: case -> provider -> seconds."""
        rows = [
            {
                "op": "attention", "case": case, "provider": provider, "dtype": "bfloat16", "session": 0,
                "status": "timed", "shapes": {"head_dim": int(re.findall(r"\d+", case)[0])},
                "backend": "triton" if provider == "ours" else provider, "seconds": {"median": seconds},
            }
            for case, providers in times.items() for provider, seconds in providers.items()
        ]  # fmt: skip
        about = {"device": device, "type": "cuda", "date": f"{date}T00:00:00", **session}
        (folder / f"{date}.json").write_text(json.dumps({"sessions": [about], "rows": rows}))

    add.folder = folder
    return add


def table(results) -> dict[tuple, None]:
    names = {"torch": torch}
    exec(attention_choice.table(results.folder.parent), names)
    return names["MEASURED_FASTER"]


def entry(head_dim, major=9):
    return head_dim, torch.bfloat16, major


def test_a_head_dim_needs_every_case_and_every_library(results):
    results("2027-01-01", {
        "context64-truncate": {"ours": 1.0, "torch_varlen": 2.0, "fa3": 1.5},
        "context80-truncate": {"ours": 1.0, "torch_varlen": 2.0, "fa3": 0.9},
        "context88-truncate": {"ours": 1.0, "torch_varlen": 2.0},
        "context88-ragged": {"ours": 1.0, "torch_varlen": 1.04},
        "predictor24-ragged": {"ours": 1.0, "torch_varlen": 1.06},
        "predictor32-ragged": {"ours": 1.0, "batched": 9.0},
        "dense48-truncate": {"ours": 1.0, "torch_varlen": 9.0},
    })  # fmt: skip
    assert table(results) == {entry(64), entry(24)}
    assert f"# {NAME}, 2027-01-01, beside fa3 and torch_varlen: 1.1 to 2.0 times" in attention_choice.table(
        results.folder.parent
    )


def test_the_newest_measurement_of_a_case_counts(results):
    results("2027-01-01", {"context64-truncate": {"ours": 1.0, "torch_varlen": 2.0},
                           "context80-truncate": {"ours": 1.0, "torch_varlen": 2.0}})  # fmt: skip
    results("2027-02-01", {"context64-truncate": {"ours": 1.0, "torch_varlen": 0.5}})
    assert table(results) == {entry(80)}


def test_a_sweep_counts_at_our_tiles_and_where_no_record_has_the_case(results):
    forward, backward = (str(tuple(x[16])) for x in (attention_triton.FORWARD, attention_triton.BACKWARD))
    lib = {"torch_varlen": 2.0, "torch_varlen bwd": 4.0}
    rows = [
        {"shape": ["context64", "truncate"], "fwd": {forward: 1.0}, "bwd": {backward: 2.0}, "lib": lib},
        {"shape": ["context80", "truncate"], "fwd": {forward: 1.0}, "bwd": {backward: 2.0}, "lib": lib},
        {"shape": ["predictor24", "ragged"], "fwd": {forward: 1.0}, "bwd": {backward: 9.0, "(1, 1)": 2.0}, "lib": lib},
        {"shape": ["predictor32", "ragged"], "fwd": {forward: 1.0}, "bwd": {"(1, 1)": 2.0}, "lib": lib},
    ]
    (results.folder / attention_choice.SWEEP).write_text(json.dumps({"date": "2026-12-01", "rows": rows}))
    results("2027-01-01", {"context80-truncate": {"ours": 3.0, "torch_varlen": 2.0}})
    assert table(results) == {entry(64)}


def test_another_gpu_has_a_line_of_its_own(results, tmp_path):
    results("2027-01-01", {"context64-truncate": {"ours": 1.0, "torch_varlen": 2.0}}, "NVIDIA B200", capability=[10, 0])
    assert table(results) == {entry(64, 10)}
    results("2027-01-01", {"context64-truncate": {"ours": 1.0, "torch_varlen": 2.0}}, "NVIDIA B200")
    with pytest.raises(SystemExit, match="no record names the compute capability of NVIDIA B200: measure once more"):
        table(results)


def test_the_short_backward_needs_every_case_of_every_gpu(results):
    root = results.folder.parent
    results("2027-01-01", {"predictor24-ragged": {"ours": 2.0, "torch_varlen": 3.0}})
    assert attention_choice.short_backward(root) == ""
    results("2027-01-02", {
        "predictor24-truncate": {"ours": 2.0, "short": 1.0},
        "predictor24-ragged": {"ours": 2.0, "short": 1.8},
        "predictor32-truncate": {"ours": 2.0, "short": 1.0},
        "predictor32-ragged": {"ours": 2.0, "short": 1.95},
    })  # fmt: skip
    assert attention_choice.short_backward(root) == "SHORT_BACKWARD: frozenset[int] = frozenset({24})\n"
    results("2027-01-03", {"predictor24-ragged": {"ours": 2.0, "short": 2.0}})  # the newer one counts
    assert attention_choice.short_backward(root) == "SHORT_BACKWARD: frozenset[int] = frozenset()\n"


def test_it_writes_what_it_prints(results, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "attention_backends.py"
    before = attention_choice.TABLE.read_text()
    copy.write_text(before)
    monkeypatch.setattr(attention_choice, "ROOT", tmp_path)
    monkeypatch.setattr(attention_choice, "TABLE", copy)
    results("2027-01-01", {"context64-truncate": {"ours": 1.0, "torch_varlen": 2.0}})
    attention_choice.main(["--results", str(results.folder.parent), "--write"])
    printed = capsys.readouterr().out
    assert "(9, (64,))," in printed
    assert copy.read_text() == before.replace(attention_choice.table(attention_choice.RESULTS), printed) != before
