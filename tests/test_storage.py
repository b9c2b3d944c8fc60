"""Images at an address: the same index and batches as from a folder, by ranges of bytes, over errors that pass."""
import errno
import io
import json
import os
import threading

import numpy as np
import pytest
import torch
from test_index_containers import jpeg, write_tar

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data import index as index_module
from ijepa_fast.data import patience, storage
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.images import index_images
from ijepa_fast.data.index import build_index, cache_path
from ijepa_fast.data.index_cli import main as index_command
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.subset import select
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.splits import check_one_split

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

BUCKET = "weak://bucket"


class WeakFileSystem(MemoryFileSystem):
    """A store that fails every `period`-th request of a thread, with one kind of error after the other, and counts all.

    Of a thread, so that the next try is no such request: of all, a reader's threads could leave one to the same image
    each time.
    """

    protocol = "weak"
    store, pseudo_dirs = {}, [""]
    period, requests, ranges, broken = 0, 0, [], ()
    of_thread = threading.local()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("weak://"))

    def _fail_now_and_then(self, path):
        cls = type(self)
        cls.requests += 1
        if path.endswith(cls.broken):
            raise TimeoutError("no answer")
        number = cls.of_thread.requests = getattr(cls.of_thread, "requests", 0) + 1
        if cls.period and number % cls.period == 0:
            errors = ConnectionError("reset"), RuntimeError("503 Slow Down"), OSError(errno.EIO, "Input/output error")
            raise errors[number // cls.period % 3]

    def cat_file(self, path, version_id=None, start=None, end=None):  # as s3fs has it
        assert version_id is None
        self._fail_now_and_then(path)
        type(self).ranges.append((path, start, end))
        data = super().cat_file(path)
        if start >= len(data):
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        return data[start:end]

    def cat_ranges(self, paths, starts, ends, on_error="return"):
        return [self._answer(*each) for each in zip(paths, starts, ends, strict=True)]

    def _answer(self, path, start, end):
        try:
            return self.cat_file(path, start=start, end=end)
        except Exception as error:
            return error

    def ls(self, path, detail=True, **kwargs):
        self._fail_now_and_then(path)
        return super().ls(path, detail=detail)

    def info(self, path, **kwargs):
        self._fail_now_and_then(path)
        return super().info(path)


fsspec.register_implementation("weak", WeakFileSystem, clobber=True)


@pytest.fixture
def weak(monkeypatch):
    """The file system, empty and without failures."""
    WeakFileSystem.store.clear()
    for name, value in {"period": 0, "requests": 0, "ranges": [], "broken": ()}.items():
        monkeypatch.setattr(WeakFileSystem, name, value)
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0, 0.0))
    return WeakFileSystem()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Loose files, tars (a nested one, one with long names) and a parquet file, with what is left out."""
    root = tmp_path_factory.mktemp("photographs") / "r"
    for n in range(5):
        (root / "loose" / f"{n}.jpg").parent.mkdir(parents=True, exist_ok=True)
        (root / "loose" / f"{n}.jpg").write_bytes(jpeg(n))
    (root / "loose" / "empty.jpg").write_bytes(b"")
    (root / "loose" / "notes.txt").write_bytes(b"words")
    (root / "loose" / ".hidden.jpg").write_bytes(jpeg(0))
    (root / "run").mkdir()
    (root / "run" / ".ijepa_run").write_bytes(b"")
    (root / "run" / "picture.png").write_bytes(jpeg(0))
    write_tar(root / "n01.tar", {f"{n}.jpg": jpeg(n) for n in range(5, 11)})
    write_tar(root / "deep" / "n02.tar", {"f" * 150 + f"/{n}.jpg": jpeg(n) for n in range(11, 14)})
    write_tar(root / "outer.tar", {"n01.tar": (root / "n01.tar").read_bytes(), "bad.jpg": b"?"})
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return root
    table = pa.table({"image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(14, 20)], "label": [*"ababab"]})
    pq.write_table(table, root / "train.parquet", row_group_size=4)
    return root


def upload(files, root, address=BUCKET):
    for path in sorted(root.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{address}/{path.relative_to(root)}", path.read_bytes())


def shown(index):
    """Everything that an index says, without its root."""
    rows = [tuple(row)[:2] + tuple(row)[3:] for row in index.records.tolist()]
    bad = [(where.removeprefix(index.root), reason) for where, reason in index.about["bad"]]
    paths = [index.path(i).removeprefix(index.root) for i in range(len(index))]
    return rows, index.class_names, paths, bad, index.about["skipped"], index.about["faults"]


@pytest.mark.parametrize("period", [0, 3])
def test_the_index_and_the_images_are_those_of_the_folder(weak, photographs, tmp_path, period):
    upload(weak, photographs)
    WeakFileSystem.period = period
    here = build_index(photographs, cache_dir=tmp_path / "here")
    there = build_index(BUCKET, cache_dir=tmp_path / "there", threads=2)
    assert there.root == BUCKET
    assert shown(there) == shown(here)
    assert there.fingerprint() == here.fingerprint()
    with Reader(here, 2) as reader, Reader(there, 2) as remote:
        ids = np.random.default_rng(0).permutation(len(here))
        seen, expected = (list(each.start(ids)) for each in (remote, reader))
    assert sum(isinstance(one, bytes) for one in expected) == len(here) - 2
    assert [one if isinstance(one, bytes) else str(one) for one in seen] == [
        one if isinstance(one, bytes) else str(one) for one in expected]  # fmt: skip


def test_a_run_sees_the_same_batches(weak, photographs, tmp_path):
    upload(weak, photographs)
    masks, seen = MultiBlockMasks(MaskConfig(group=1, min_keep=2), 6, 0, 6), []
    for root in (photographs, BUCKET + "/"):
        settings = DataConfig(root=root, image_size=24, decoder="pillow", threads=2)
        index = build_index(settings.root, cache_dir=tmp_path / "cache")
        with build_pipeline(settings, masks, micro_batch=6, index=index) as data:
            seen.append(list(data.loader.batches(0, 3)))
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert [(b.id, b.reason, b.substitute) for b in ours.bad] == [
            (b.id, b.reason, b.substitute) for b in theirs.bad]  # fmt: skip


def test_neighbours_in_a_tar_are_one_request(weak, tmp_path):
    images = {f"{n:02}.jpg": jpeg(n) for n in range(12)}
    write_tar(tmp_path / "r" / "a.tar", images)
    upload(weak, tmp_path / "r")
    index = build_index(BUCKET, cache_dir=tmp_path / "cache")
    assert len(WeakFileSystem.ranges) == 1  # the whole tar fits into what one request fetches
    WeakFileSystem.ranges.clear()
    with Reader(index, 2) as reader:
        assert reader.read(np.arange(12)) == list(images.values())
    (one,) = WeakFileSystem.ranges
    assert one == ("/bucket/a.tar", 512, 512 + sum(512 + len(d) + -len(d) % 512 for d in images.values())
                   - 512 - -len(images["11.jpg"]) % 512)  # fmt: skip


def test_headers_of_a_large_tar_are_read_by_ranges(weak, tmp_path, monkeypatch):
    """What lies between the headers of members that are longer than a window is never fetched."""
    monkeypatch.setattr(storage, "_WINDOW", 8192)
    padding = b"\xff\xd9" + bytes(200_000)
    write_tar(tmp_path / "r" / "a.tar", {f"{n}.jpg": jpeg(n) + padding for n in range(10)})
    upload(weak, tmp_path / "r")
    assert len(build_index(BUCKET, cache_dir=tmp_path / "cache")) == 10
    assert sum(end - start for _, start, end in WeakFileSystem.ranges) <= 12 * 8192
    assert max(end for _, _, end in WeakFileSystem.ranges) <= os.path.getsize(tmp_path / "r" / "a.tar")


def test_the_cache_is_used_until_something_changes(weak, photographs, tmp_path):
    upload(weak, photographs)
    first = build_index(BUCKET, cache_dir=tmp_path / "cache")
    assert os.path.exists(cache_path(BUCKET, tmp_path / "cache"))
    WeakFileSystem.ranges.clear()
    again = build_index(f"{BUCKET}/", cache_dir=tmp_path / "cache")
    assert WeakFileSystem.ranges == []
    assert np.array_equal(again.records, first.records)
    weak.pipe_file(f"{BUCKET}/loose/9.jpg", jpeg(9))
    requests = WeakFileSystem.requests
    believed = build_index(BUCKET, cache_dir=tmp_path / "cache", compare=False)
    assert (len(believed), WeakFileSystem.requests) == (len(first), requests)
    assert len(build_index(BUCKET, cache_dir=tmp_path / "cache")) == len(first) + 1
    weak.pipe_file(f"{BUCKET}/loose/9.jpg", jpeg(8))  # another version, perhaps of the same size
    WeakFileSystem.ranges.clear()
    build_index(BUCKET, cache_dir=tmp_path / "cache")
    assert "/bucket/loose/9.jpg" in [path for path, _, _ in WeakFileSystem.ranges]


def test_one_tar_may_be_the_root(weak, photographs, tmp_path):
    upload(weak, photographs)
    index = build_index(f"{BUCKET}/n01.tar", cache_dir=tmp_path / "cache")
    assert (len(index), index.path(0)) == (6, f"{BUCKET}/n01.tar: 5.jpg")
    assert len(build_index(f"{BUCKET}/n01.tar", cache_dir=tmp_path / "cache")) == 6
    with pytest.raises(UserError, match=f"^data folder {BUCKET}/none.tar does not exist$"):
        build_index(f"{BUCKET}/none.tar", cache_dir=tmp_path / "cache")


def test_storage_that_stays_broken_keeps_nothing_as_an_images_fault(weak, photographs, tmp_path):
    upload(weak, photographs)
    WeakFileSystem.broken = ("2.jpg",)
    with pytest.raises(UserError, match=f"^{BUCKET}/loose/2.jpg cannot be read: no answer$"):
        build_index(BUCKET, cache_dir=tmp_path / "cache")
    WeakFileSystem.broken = ()
    index = build_index(BUCKET, cache_dir=tmp_path / "cache")
    assert [where for where, _ in index.about["bad"]] == [f"{BUCKET}/loose/empty.jpg", f"{BUCKET}/outer.tar: bad.jpg"]
    WeakFileSystem.broken = ("2.jpg", "n01.tar")
    with Reader(index, 2) as reader:
        found = list(reader.start(np.arange(len(index))))
    WeakFileSystem.broken = ()
    lost = {index.path(i).rpartition("/")[2] for i, one in enumerate(found) if isinstance(one, ImageError)
            and str(one) == "it cannot be read any more: no answer"}  # fmt: skip
    assert lost == {"2.jpg"} | {f"n01.tar: {n}.jpg" for n in range(5, 11)}


def test_an_object_that_was_replaced_is_no_image_of_the_index(weak, tmp_path):
    weak.pipe_file(f"{BUCKET}/1.jpg", jpeg(1))
    index = build_index(BUCKET, cache_dir=tmp_path / "cache")
    weak.pipe_file(f"{BUCKET}/1.jpg", jpeg(1) + b"more")
    with Reader(index, 1) as reader:
        assert "put that back, or start again to have it indexed again" in str(next(iter(reader.start(np.array([0])))))


def test_the_command_and_its_verification(weak, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(weak, photographs)
    assert index_command([BUCKET, "--verify", "--workers", "2", "--bad", f"{tmp_path}/bad.jsonl"]) == 0
    out = capsys.readouterr().out
    assert f"index of {BUCKET}: " in out
    assert "(not written)" not in out
    rows = [json.loads(line)["path"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert rows == [f"{BUCKET}/loose/empty.jpg", f"{BUCKET}/outer.tar: bad.jpg"]


def test_lists_and_looking_at_images_take_an_address(weak, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(weak, photographs)
    index = index_images([BUCKET])
    (tmp_path / "list").write_text(f"loose/1.jpg\n{BUCKET}/n01.tar: 5.jpg\n")
    chosen = select(index, DataConfig(root=BUCKET, list=tmp_path / "list"))
    assert [chosen.path(i) for i in range(len(chosen))] == [f"{BUCKET}/loose/1.jpg", f"{BUCKET}/n01.tar: 5.jpg"]
    with pytest.raises(UserError, match=f"^{BUCKET} is an address, and can only be named alone"):
        index_images([photographs, BUCKET])


def test_splits_side_by_side_are_noticed(weak):
    for split in ("train", "val"):
        weak.pipe_file(f"{BUCKET}/set/{split}/1.jpg", b"")
    with pytest.raises(UserError, match=f"in {BUCKET}/set: train, val; name one: data.root={BUCKET}/set/train$"):
        check_one_split(BUCKET)
    check_one_split(f"{BUCKET}/set/train")


class Closed(WeakFileSystem):
    protocol = "closed"

    def ls(self, path, detail=True, **kwargs):
        raise PermissionError("Access Denied")


class Keyless(WeakFileSystem):
    protocol = "keyless"

    def ls(self, path, detail=True, **kwargs):
        raise RuntimeError("Unable to locate\n credentials")


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        (f"{BUCKET}/none", f"data folder {BUCKET}/none does not exist"),
        ("closed://b/x", "folder closed://b/x cannot be listed: Access Denied"),
        ("keyless://b/x", "folder keyless://b/x cannot be listed: Unable to locate credentials"),
        ("nothing://b", "nothing://b cannot be reached: Protocol not known: nothing"),
        ("lost://b", "lost://b cannot be reached: Install lostfs to reach it (pip install 'ijepa_fast[remote]')"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(weak, tmp_path, root, sentence):
    fsspec.register_implementation("closed", Closed, clobber=True)
    fsspec.register_implementation("keyless", Keyless, clobber=True)
    fsspec.register_implementation("lost", "lostfs.FileSystem", errtxt="Install lostfs to reach it", clobber=True)
    with pytest.raises(UserError) as caught:
        build_index(root, cache_dir=tmp_path / "cache")
    assert str(caught.value) == sentence


def test_fsspec_is_imported_for_addresses_alone(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "is_remote", lambda root: False)
    monkeypatch.setattr(storage, "_remote", None)
    assert len(build_index(photographs, cache_dir=tmp_path / "cache"))


def test_a_range_file_reads_as_a_file_does():
    data = bytes(range(256)) * 40
    ours, real = storage.RangeFile(lambda size, offset: data[offset : offset + size], len(data)), io.BytesIO(data)
    for file in (ours, real):
        file.seek(-10, os.SEEK_END)
        file.seek(4, os.SEEK_CUR)
    assert (ours.tell(), ours.read(100), ours.read(1)) == (real.tell(), real.read(100), real.read(1))
    ours.seek(5)
    assert ours.read() == data[5:]
