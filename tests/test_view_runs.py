"""What the picture of several runs draws, read back from the figure, and its sentences for what is no run."""

import json

from matplotlib.figure import Figure
from PIL import Image

from ijepa_fast.view.__main__ import main


def write_log(folder, losses, probes):
    folder.mkdir()
    rows = [{"kind": "step", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    rows += [{"kind": "probe", **probe} for probe in probes]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_run_is_drawn_in_every_panel_that_it_measured(tmp_path, monkeypatch, capsys):
    probes = [{"step": 0, "rankme": 8.0, "knn": 0.25}, {"step": 2, "rankme": 9.0, "knn": 0.5}]
    good = tmp_path / "go$od^$"  # no formula
    write_log(good, [1.0, 0.5], probes)
    write_log(tmp_path / "bad", [1.0, 0.1, 0.0], [{"step": 0, "rankme": 8.0}, {"step": 3, "rankme": 2.0}])
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))

    assert main(["runs", str(good), str(tmp_path / "bad"), "--out", str(tmp_path / "runs.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs.png'}\n"
    assert Image.open(tmp_path / "runs.png").size == (1440, 840)

    panels = {axis.get_title(): axis for axis in figures[0].axes}
    drawn = {title: [list(line.get_ydata()) for line in axis.lines] for title, axis in panels.items()}
    assert [len(values) for values in drawn["loss, smoothed"]] == [2, 3]
    assert drawn["RankMe"] == [[8, 9], [8, 2]]
    assert drawn["k-NN accuracy, %"] == [[25, 50]]
    assert [text.get_text() for text in panels["linear accuracy, %"].texts] == ["not measured"]
    assert [line.get_label() for line in panels["loss, smoothed"].lines] == [str(good), str(tmp_path / "bad")]


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    write_log(tmp_path / "new", [], [])
    for folder, sentence in (
        (tmp_path, "holds no log.jsonl; name the folder of a run"),
        (tmp_path / "new", "holds the log of a run that has made no update yet"),
    ):
        assert main(["runs", str(folder)]) == 2
        assert sentence in capsys.readouterr().err
    write_log(tmp_path / "run", [1.0], [])
    assert main(["runs", str(tmp_path / "run"), "--out", str(tmp_path / "none" / "a.png")]) == 2
    assert "a.png cannot be written: No such file" in capsys.readouterr().err
