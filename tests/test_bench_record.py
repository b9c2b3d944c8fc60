"""bench/record.py: which suites a part runs, where its record goes, and what is kept when a process dies."""
import json
from pathlib import Path

import pytest

from bench.report import record


@pytest.fixture
def runs(monkeypatch):
    """Instead of pytest: remember the arguments, answer with the exit code that `codes` holds for the suite."""
    seen, codes = [], {}

    def fake(*arguments: str, minutes: float) -> int | str:
        seen.append(arguments)
        path = Path(arguments[arguments.index("--record") + 1])
        kept = record.Record(path)
        kept.open_session({"ceilings": {}})
        kept.write()
        return codes.get(Path(arguments[0]).stem.removeprefix("test_bench_"), 0)

    monkeypatch.setattr(record, "_pytest", fake)
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    return seen, codes


def written(folder: Path) -> dict:
    (path,) = folder.rglob("*.json")
    return json.loads(path.read_text())


def test_all_runs_every_suite_there_is(runs, tmp_path):
    assert record.main(["--out", str(tmp_path)]) == 0
    named = {Path(a).name for arguments in runs[0] for a in arguments if a.endswith(".py")}
    assert named == {path.name for path in (record.ROOT / "bench").glob("test_bench_*.py")}
    assert [row["status"] for row in written(tmp_path)["rows"]] == ["not run: GPU only"] * 2  # tests, and sanitized


def test_options_reach_the_suites(runs, tmp_path):
    record.main(["--out", str(tmp_path), "--part", "memory", "--quick", "--released", str(tmp_path)])
    (arguments,) = runs[0]
    assert "--quick" in arguments
    assert arguments[arguments.index("--released") + 1] == str(tmp_path)
    assert float(arguments[arguments.index("--budget") + 1]) < 9 * 60


def test_chosen_cases_and_minutes(runs, tmp_path, capsys):
    seen, codes = runs
    codes["ops"] = 5  # pytest's: no test was collected
    words = ["--out", str(tmp_path), "--part", "ops", "--only", "step and H14", "--minutes", "20"]
    assert record.main(words) == 0
    assert seen[0][seen[0].index("-k") + 1] == "step and H14"
    assert float(seen[0][seen[0].index("--budget") + 1]) == 19 * 60
    with pytest.raises(SystemExit):
        record.main([*words[:-1], "1"])
    assert "--minutes: want more than 1, the time that the last case may take, got 1" in capsys.readouterr().err


def test_twice_runs_each_part_again(runs, tmp_path):
    record.main(["--out", str(tmp_path), "--part", "attention", "--twice"])
    assert ["--again" in arguments for arguments in runs[0]] == [False, True]


def test_the_record_lies_under_the_device_and_commit(runs, tmp_path):
    record.main(["--out", str(tmp_path), "--part", "tests"])
    (path,) = tmp_path.rglob("*.json")
    assert path.parent.name == record.folder_name(record.device_name(record.torch.device("cpu")))
    assert path.stem.endswith(record.commit().removesuffix("+"))


def test_a_process_that_dies_leaves_a_row_and_the_next_part_runs(runs, tmp_path):
    seen, codes = runs
    codes["ops"] = -11
    assert record.main(["--out", str(tmp_path)]) == 1
    rows = {row["suite"]: row["status"] for row in written(tmp_path)["rows"]}
    assert rows["ops"] == "error: exit code -11"
    assert len(seen) == sum(bool(suites) for suites in record.PARTS.values())
