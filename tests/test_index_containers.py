"""Tars and parquet files in the index: as tarfile reads them, with labels from where each layout keeps them."""
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import odd_images
import pytest
import torch

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data import index as index_module
from ijepa_fast.data import tars
from ijepa_fast.data.index import build_index, cache_path
from ijepa_fast.data.index_cli import main as index_command
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.table import RECORD, Index, PathTable, load_index, save_index
from ijepa_fast.masks import MultiBlockMasks

JPEG = odd_images.encode(odd_images.photo(), "JPEG", quality=90)


def jpeg(seed: int) -> bytes:
    return odd_images.encode(odd_images.photo(seed), "JPEG", quality=90)


def write_tar(path, files: dict[str, bytes], kind=tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index_of(root, **options) -> Index:
    return build_index(root, cache_dir=root.parent / "cache", threads=2, **options)


def labels(index: Index) -> list[str | None]:
    return [index.class_names[label] if label >= 0 else None for label in index.records["label"]]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, kind):
    long = "/".join(["folder" * 5] * (4 if kind == tarfile.USTAR_FORMAT else 9)) + "/x.jpg"
    files = {"a.jpg": b"x" * 511, "b/c.jpg": b"y" * 512, "empty.jpg": b"", long: b"long", "./d.jpg": b"z" * 1025}
    if kind != tarfile.USTAR_FORMAT:
        files |= {"ü ☃.jpg": b"snow", "n" * 150 + ".png": b"name"}
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("inner.jpg"))
    path = tmp_path / "t.tar"
    of_all = {"comment": "all"} if kind == tarfile.PAX_FORMAT else None
    with tarfile.open(path, "w", format=kind, pax_headers=of_all) as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (files | {"in.tar": inner.getvalue()}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(link)
    with open(path, "rb") as file:
        read = functools.partial(os.pread, file.fileno())
        found = list(tars.members(read, 0, os.path.getsize(path)))
    with tarfile.open(path) as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg() and m.name != "in.tar"]
    assert [tuple(member) for member in found if member.name != "inner.jpg"] == theirs
    assert found[-1].name == "inner.jpg"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"n01.tar": {"n01_1.JPEG": JPEG, "n01_2.JPEG": JPEG}, "n02.tar": {"x.jpg": JPEG}}, ["n01", "n01", "n02"]),
        ({"in22k/part/n01.tar": {"1.jpg": JPEG}, "in22k/n02.tar": {"x.jpg": JPEG}}, ["n02", "n01"]),
        ({"train-000.tar": {"a.jpg": JPEG, "a.cls": b"7", "b.cls": b"3\n", "b.jpg": JPEG, "c.jpg": JPEG}},
         ["7", "3", None]),
        ({"train-000.tar": {"a.jpg": JPEG, "a.json": b'{"label": "cat"}', "b.png": JPEG, "b.json": b"[1]"}},
         ["cat", None]),
        ({"all.tar": {"./dog/1.jpg": JPEG, "./cat/1.jpg": JPEG, "./cat/._1.jpg": JPEG}}, ["dog", "cat"]),
        ({"bird/train-000.tar": {"1.jpg": JPEG}, "000.tar": {"1.jpg": JPEG}}, [None, "bird"]),
    ],
)  # fmt: skip
def test_labels_come_from_siblings_folders_and_names(tmp_path, files, expected):
    for name, members in files.items():
        write_tar(tmp_path / "r" / name, members)
    index = index_of(tmp_path / "r")
    assert labels(index) == expected
    assert set(index.records[["width", "height"]].tolist()) == {(odd_images.WIDTH, odd_images.HEIGHT)}


def test_numbers_given_as_labels_stay_these_numbers(tmp_path):
    write_tar(tmp_path / "r" / "a-0.tar", {"a.jpg": JPEG, "a.cls": b"10", "b.jpg": JPEG, "b.cls": b"9"})
    assert index_of(tmp_path / "r").records["label"].tolist() == [10, 9]


def test_a_tar_cut_short_keeps_what_is_whole(tmp_path, capsys):
    write_tar(tmp_path / "r" / "a.tar", {f"{n}.jpg": JPEG for n in range(5)})
    path = tmp_path / "r" / "a.tar"
    os.truncate(path, 3 * (512 + len(JPEG) + -len(JPEG) % 512) + 600)
    (tmp_path / "r" / "b.tar").write_bytes(b"tar")
    index = index_of(tmp_path / "r")
    assert [index.path(i) for i in range(len(index))] == [f"{path}: {n}.jpg" for n in range(3)]
    err = capsys.readouterr().err
    assert f"warning: {path}: it is cut short: 3.jpg is not whole" in err
    assert f"warning: {tmp_path}/r/b.tar: it is cut short: it has no end mark" in err


def test_a_changed_tar_is_noticed(tmp_path):
    write_tar(tmp_path / "r" / "a.tar", {"1.jpg": JPEG})
    assert len(index_of(tmp_path / "r")) == 1
    write_tar(tmp_path / "r" / "a.tar", {"1.jpg": JPEG, "2.jpg": JPEG})  # in place: its folder stays as it was
    assert len(index_of(tmp_path / "r")) == 2


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    write_tar(tmp_path / "r" / "a.tar", {"1.jpg": JPEG, "1.txt": b"words"})
    for name in ("x.TXT", "y.gif", ".hidden.jpg", "README", "z.tar.gz"):
        (tmp_path / "r" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "r" / "pipe.jpg")
    (tmp_path / "r" / "itself.jpg").symlink_to("itself.jpg")
    lines = []
    index = index_of(tmp_path / "r", report=lines.append)
    assert index.about["skipped"] == {".gif": 1, ".gz": 1, ".txt": 2, "broken link": 1, "hidden": 1,
                                      "no regular file": 1, "without a suffix": 1}  # fmt: skip
    assert lines[0].startswith(f"index of {tmp_path}/r: 1 images in 1 classes, built in ")
    assert lines[1] == ("left out: 2 .txt, 1 .gif, 1 .gz, 1 broken link, 1 hidden, 1 no regular file, "
                        "1 without a suffix")  # fmt: skip


@pytest.fixture(scope="module")
def three_forms(tmp_path_factory):
    """The same 12 images of 3 classes, one of them damaged, as folders, tars and (with pyarrow) a parquet file."""
    folder = tmp_path_factory.mktemp("forms")
    images = {f"c{n // 4}/{n:02}.jpg": jpeg(n) if n != 5 else jpeg(5)[:900] for n in range(12)}
    for name, data in images.items():
        (folder / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "folders" / name).write_bytes(data)
    for c in range(3):
        write_tar(folder / "tars" / f"c{c}.tar", {k.split("/")[1]: v for k, v in images.items() if k[1] == str(c)})
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return folder, ["folders", "tars"]
    (folder / "parquet").mkdir()
    about = {"info": {"features": {"label": {"names": ["c0", "c1", "c2"]}}}}
    table = pa.table({
        "image": pa.array([{"bytes": data, "path": name} for name, data in images.items()]),
        "label": pa.array([n // 4 for n in range(12)]),
    }).replace_schema_metadata({"huggingface": json.dumps(about)})  # fmt: skip
    pq.write_table(table, folder / "parquet" / "train-00000-of-00001.parquet", row_group_size=5)
    return folder, ["folders", "tars", "parquet"]


def test_folders_tars_and_parquet_give_the_same_batches(three_forms):
    folder, forms = three_forms
    masks = MultiBlockMasks(MaskConfig(group=1, min_keep=2), 6, 0, 6)
    seen = []
    for form in forms:
        index = index_of(folder / form)
        assert labels(index) == ["c0"] * 4 + ["c1"] * 4 + ["c2"] * 4
        settings = DataConfig(root=folder / form, image_size=24, decoder="pillow", threads=2)
        with build_pipeline(settings, masks, micro_batch=6, index=index) as data:
            seen.append(list(data.loader.batches(0, 4)))
    assert sum(len(batch.bad) for batch in seen[0]) == 2
    for other in seen[1:]:
        for ours, theirs in zip(seen[0], other, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert [(b.id, b.reason, b.substitute) for b in ours.bad] == [
                (b.id, b.reason, b.substitute) for b in theirs.bad]  # fmt: skip


def test_a_single_tar_may_be_the_root(tmp_path):
    write_tar(tmp_path / "r" / "a.tar", {"1.jpg": JPEG})
    write_tar(tmp_path / "r" / "b.tar", {"2.jpg": JPEG})
    index = build_index(tmp_path / "r" / "b.tar", cache_dir=tmp_path / "cache")
    assert [index.path(0)] == [f"{tmp_path}/r/b.tar: 2.jpg"]
    with Reader(index, 1) as reader:
        assert reader.read(np.array([0])) == [JPEG]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_builder_that_was_stopped_goes_on(tmp_path, monkeypatch):
    for n in range(6):
        write_tar(tmp_path / "r" / f"{n}.tar", {"1.jpg": JPEG})
    straight = build_index(tmp_path / "r", cache_dir=tmp_path / "straight")
    real, scanned = index_module.scan, []

    def scan(root, unit):
        if len(scanned) == 4:
            raise KeyboardInterrupt
        scanned.append(unit.paths)
        return real(root, unit)

    monkeypatch.setattr(index_module, "scan", scan)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "r", cache_dir=tmp_path / "cache", threads=1)
    (journal,) = (tmp_path / "cache").iterdir()
    with open(journal, "ab") as file:
        file.write(b"half a frame, as a kill leaves it")
    scanned[:] = [b"", b""]
    again = build_index(tmp_path / "r", cache_dir=tmp_path / "cache", threads=1)
    assert len(scanned) <= 2 + 3  # at most as many as were in hand when it stopped, and those it had not begun
    assert np.array_equal(again.records, straight.records)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".index"]


def test_fourteen_million_rows_fit_in_500_mb_and_open_at_once(tmp_path):
    assert 14_197_122 * RECORD.itemsize + 22_000 * 40 < 500e6
    rows = np.zeros(100_000, RECORD)
    rows["flag"] = 1
    index = Index(str(tmp_path), rows, ("a",), PathTable.from_paths([b"a.tar"]), {})
    save_index(str(tmp_path / "x.index"), index, PathTable.from_paths([]), np.zeros((0, 2), np.int64))
    assert (tmp_path / "x.index").stat().st_size < 100_000 * 29 + 2000
    # Opening reads none of the rows: so does an index whose rows are damaged, until it is verified.
    with open(tmp_path / "x.index", "r+b") as file:
        stat = os.fstat(file.fileno())
        file.seek(50_000)
        file.write(b"?")
    assert load_index(str(tmp_path / "x.index"), str(tmp_path)) is None
    os.utime(tmp_path / "x.index", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert load_index(str(tmp_path / "x.index"), str(tmp_path)) is not None
    assert load_index(str(tmp_path / "x.index"), str(tmp_path), verify=True) is None


def test_the_command_shows_verifies_and_lists_what_is_bad(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "a[red]b[" / "exp]:dog:"  # is no markup
    write_tar(root / "n01.tar", {"1.jpg": JPEG, "2.jpg": JPEG[:-2], "3.gif": b"GIF89a", "4.jpg": b"?"})
    for _ in range(2):
        words = ["--verify", "--workers", "2", "--bad", f"{tmp_path}/bad.jsonl", "--picture", f"{tmp_path}/s.png"]
        assert index_command([str(root), *words]) == 0
        out = capsys.readouterr().out
        assert f"{root}" in out
        for text in ("images      3 in 1 files", "left out    1 .gif", "bad         1 headers, 0 containers",
                     "verified    3 images in", "2 bad: "):
            assert text in out
        bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert [(row["image"], row["path"]) for row in bad] == [
            (1, f"{root}/n01.tar: 2.jpg"), (2, f"{root}/n01.tar: 4.jpg")]  # fmt: skip
        assert "without its end marker" in bad[0]["reason"]
    # What a stopped verification leaves: the state says how far it was, and the list may be longer.
    index = build_index(root)
    state = {"index": index.fingerprint(), "bad": str(tmp_path / "bad.jsonl"), "max_pixels": 178_956_970, "next": 2}
    (tmp_path / "cache" / "ijepa_fast" / (os.path.basename(cache_path(str(root))) + ".verify")).write_text(
        json.dumps(state))  # fmt: skip
    assert index_command([str(root), *words]) == 0
    assert "verifying from image 2 on" in capsys.readouterr().out
    assert [json.loads(line)["image"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [1, 2]
    assert index_command([str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_twenty_kills_of_the_builder(tmp_path):
    for n in range(300):
        write_tar(tmp_path / "r" / f"n{n:04}.tar", {f"{m}.jpg": JPEG for m in range(300)})
    straight = build_index(tmp_path / "r", cache_dir=tmp_path / "straight")
    script = """if True:
        import sys
        from ijepa_fast.data.index import build_index
        print('on', flush=True)
        build_index(sys.argv[1], cache_dir=sys.argv[2], threads=2)
    """
    words = [sys.executable, "-c", script, tmp_path / "r", tmp_path / "cache"]
    rng, killed = random.Random(0), 0
    while killed < 20:
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        killed += 1
        if any(path.suffix == ".index" for path in (tmp_path / "cache").glob("*")):
            for path in (tmp_path / "cache").glob("*"):
                path.unlink()
    again = build_index(tmp_path / "r", cache_dir=tmp_path / "cache")
    assert np.array_equal(again.records, straight.records)
    assert again.fingerprint() == straight.fingerprint()
