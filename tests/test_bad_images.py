"""A tree of odd and damaged files: every batch comes whole and in order, with an exact account of what was replaced."""
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import odd_images
import pytest
import torch
from decoders import LIBRARIES, need
from safetensors.torch import load_file

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data import order, patience
from ijepa_fast.data import reader as reader_module
from ijepa_fast.data.bad import Account, BadImage, substitutes
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.formats import ImageError, prepare, read_header
from ijepa_fast.data.index import build_index
from ijepa_fast.data.loader import eval_batches
from ijepa_fast.data.pipeline import ImageSource, build_pipeline
from ijepa_fast.data.reader import Reader
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks

SIZE, BATCH, SEED = 24, 20, 3
SOUND = dict(odd_images.sound())
BAD = dict(odd_images.bad_at_index()) | dict(odd_images.bad_inside())
VANISHED = ("vanished.jpg", "grown.jpg", "changed.jpg", "no right to read.jpg")


def write_corpus(root: Path) -> None:
    for folder, files in (("sound", SOUND), ("bad", BAD)):
        (root / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
    for name in VANISHED:
        (root / "bad" / name).write_bytes(SOUND["jpeg.jpg"])
    os.mkfifo(root / "bad" / "pipe.jpg")
    (root / "bad" / "itself.jpg").symlink_to("itself.jpg")
    (root / "bad" / "nowhere.jpg").symlink_to("not there.jpg")
    (root / "bad" / "a folder.jpg").mkdir()


def harm(root: Path) -> None:
    """What happens to files after they were indexed."""
    vanished, grown, changed, secret = (root / "bad" / name for name in VANISHED)
    vanished.unlink()
    grown.write_bytes(grown.read_bytes() + b"more")
    size = changed.stat().st_size
    other = odd_images.encode(odd_images.photo(1).resize((40, 30)), "JPEG", quality=90)
    changed.write_bytes(other + bytes(size - len(other)))  # as many bytes, fewer pixels
    secret.unlink()
    secret.mkdir()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "photos")
    index = build_index(folder / "photos", cache_dir=folder / "cache", threads=2)
    harm(folder / "photos")
    return index


def batches_of(index, decoder="pillow", threads=2, rank=0, world_size=1, first=0, **options):
    masks = MultiBlockMasks(MaskConfig(group=1, min_keep=2), SIZE // 4, SEED, BATCH)
    settings = DataConfig(root=index.root, image_size=SIZE, decoder=decoder, threads=threads, **options)
    with build_pipeline(
        settings, masks, micro_batch=4, index=index, rank=rank, world_size=world_size
    ) as data:
        return list(data.loader.batches(first, 2 * data.sampler.steps_per_epoch))


@pytest.fixture(scope="module")
def delivered(corpus):
    return batches_of(corpus)


def test_the_corpus_is_large_enough():
    assert len(SOUND) + len(BAD) + len(VANISHED) >= 60


def test_two_epochs_are_whole_and_in_order_with_an_exact_account(corpus, delivered):
    assert len(corpus) == len(SOUND) + len(BAD) + len(VANISHED)
    steps = len(corpus) // BATCH
    assert [batch.step for batch in delivered] == [step for step in range(2 * steps) for _ in range(BATCH // 4)]
    expected = {i for i in range(len(corpus)) if "/bad/" in corpus.path(i)}
    for epoch in range(2):
        seen = [b for b in delivered if b.step // steps == epoch]
        ids = np.concatenate([batch.ids for batch in seen])
        events = [event for batch in seen for event in batch.bad]
        assert Counter(event.id for event in events) == Counter(expected & set(ids.tolist()))
        assert all(event.path == corpus.path(event.id) for event in events)
        assert all("/sound/" in event.substitute_path for event in events)
        for event in events:
            assert ids[event.step % steps * BATCH + event.position] == event.id
    assert all(batch.images.flatten(1).amax(1).min() > 0 for batch in delivered)  # no place is left empty
    assert not [thread for thread in threading.enumerate() if thread.name in ("loader", "reader", "decoder")]


@pytest.mark.parametrize("other", ["turbo", "dali"])
def test_decoders_agree_on_which_are_bad(corpus, delivered, other):
    need(other)
    for ours, theirs in zip(delivered, batches_of(corpus, other), strict=True):
        assert ours.bad == theirs.bad
        assert np.array_equal(ours.ids, theirs.ids)
        # One level between the decoders; at the borders, where DALI repeats the last pixel, more.
        assert (ours.images.int() - theirs.images)[:, 1:-1, 1:-1].abs().max() <= 1


@pytest.mark.parametrize(("world_size", "threads"), [(2, 1), (5, 3)])
def test_another_world_size_thread_count_and_start_see_the_same(corpus, delivered, world_size, threads):
    shares = [batches_of(corpus, threads=threads, rank=r, world_size=world_size, first=3) for r in range(world_size)]
    for step in range(3, delivered[-1].step + 1):
        whole = [batch for batch in delivered if batch.step == step]
        parts = [batch for share in shares for batch in share if batch.step == step]
        assert torch.equal(torch.cat([b.images for b in parts]), torch.cat([b.images for b in whole]))
        assert [e for b in parts for e in b.bad] == [e for b in whole for e in b.bad]


@pytest.mark.long
def test_nothing_unprefixed_is_printed(tmp_path):
    script = """if True:
        import sys
        from pathlib import Path
        import test_bad_images as t
        t.write_corpus(Path(sys.argv[1]) / "photos")
        index = t.build_index(Path(sys.argv[1]) / "photos", cache_dir=sys.argv[1] + "/cache")
        for decoder in sys.argv[2:]:
            t.batches_of(index, decoder)
    """
    decoders = ["pillow"]
    for decoder, library in LIBRARIES.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
            decoders.append(decoder)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", script, tmp_path, *decoders], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    strange = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert strange == []


# --- single rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "it is empty"),
        ("gif.jpg", "a GIF file"),
        ("avif.jpg", "an AVIF file"),
        ("12 bit.jpg", "a JPEG of 12 bits"),
        ("float.tif", "float numbers"),
        ("cut gzip.jpg", "gzip inside, and cut short"),
        ("half with a thumbnail.jpg", "without its end marker"),
        ("wrong checksum.png", "PNG chunk IDAT is damaged"),
        ("bomb.png", r"3,600,000,000 pixels, more than data.max_pixels=178,956,970"),
    ],
)
def test_a_reason_says_what_is_wrong(name, reason):
    with pytest.raises(ImageError, match=reason):
        prepare(BAD[name], odd_images.WIDTH, odd_images.HEIGHT)


def test_deep_images_are_scaled_by_their_range(corpus):
    index = {os.path.basename(corpus.path(i)): i for i in range(len(corpus))}
    with Reader(corpus, 1) as reader, contextlib.closing(PillowDecoder(1)) as decoder:
        boxes = np.array([[0, 0, odd_images.WIDTH, odd_images.HEIGHT]], np.int32)
        for name in ("16 bit gray.png", "16 bit gray alpha.png", "16 bit colour.png", "16 bit alpha.png"):
            pixels = decoder.decode(reader.read(np.array([index[name]])), boxes, SIZE)
            ramp = np.linspace(0, 255, SIZE)
            assert np.abs(pixels[0, :, 1:-1, 1].numpy() - ramp[None, 1:-1]).max() < 8  # from black to white
        for name in ("16 bit.pgm", "16 bit.tif"):
            assert (decoder.decode(reader.read(np.array([index[name]])), boxes, SIZE) == 30000 >> 8).all()


def test_max_pixels_is_a_key(tmp_path):
    (tmp_path / "r").mkdir()
    for n in range(BATCH):
        (tmp_path / "r" / f"{n}.jpg").write_bytes(SOUND["jpeg.jpg"])
    (tmp_path / "r" / "large.png").write_bytes(odd_images.encode(odd_images.photo().resize((200, 100)), "PNG"))
    index = build_index(tmp_path / "r", cache_dir=tmp_path / "cache")
    with Reader(index, 1, max_pixels=20_000) as reader, Reader(index, 1, max_pixels=19_999) as small:
        last = np.array([len(index) - 1])
        assert isinstance(next(iter(reader.start(last))), bytes)
        assert "more than data.max_pixels=19,999" in str(next(iter(small.start(last))))


def test_headers_are_those_that_pillow_reads():
    for name, data in SOUND.items():
        assert read_header(data)[1:3] == (odd_images.WIDTH, odd_images.HEIGHT), name


def test_passing_errors_are_tried_again(corpus, monkeypatch):
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0, 0.0))
    real, left = os.pread, [2]

    def pread(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(116, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(reader_module.os, "pread", pread)
    sound = next(i for i in range(len(corpus)) if corpus.path(i).endswith("sound/jpeg.jpg"))
    with Reader(corpus, 1) as reader:
        assert reader.read(np.array([sound]))[0] == SOUND["jpeg.jpg"]
        left[0] = 10
        assert "Stale file handle" in str(next(iter(reader.start(np.array([sound])))))


def test_substitutes_are_spread_and_depend_on_their_key_alone():
    one = [next(substitutes(0, 0, image, 1000)) for image in range(2000)]
    assert one == [next(substitutes(0, 0, image, 1000)) for image in range(2000)]
    # 2000 draws of 1000: the number of different ones is 1000 (1 - e^-2) = 865, standard deviation below 12.
    assert abs(len(set(one)) - 865) < 60
    assert one[:50] != [next(substitutes(0, 1, image, 1000)) for image in range(50)]


def test_an_evaluation_takes_the_next_image_of_the_same_label(tmp_path, capsys):
    for label in "ab":
        (tmp_path / "r" / label).mkdir(parents=True)
        for n in range(3):
            image = odd_images.photo(ord(label) + n)
            (tmp_path / "r" / label / f"{n}.jpg").write_bytes(odd_images.encode(image, "JPEG"))
    (tmp_path / "r" / "a" / "2.jpg").write_bytes(b"nothing")
    index = build_index(tmp_path / "r", cache_dir=tmp_path / "cache")
    capsys.readouterr()
    source = ImageSource(index, DataConfig(root=index.root, image_size=SIZE, decoder="pillow", threads=1))
    lines = []
    (pixels,) = eval_batches(index, np.arange(6), source.decoder, source.reader, SIZE, 6, lines.append)
    assert torch.equal(pixels[2], pixels[0])  # after a/2 come b/0, b/1, b/2, then a/0
    assert lines == [f"warning: bad image {index.path(2)}: it is not a JPEG, PNG, WebP, BMP, TIFF, PPM or PGM image; "
                     f"{index.path(0)} is in its place"]  # fmt: skip
    source.close()


def test_no_image_left_is_a_user_error(tmp_path):
    (tmp_path / "r").mkdir()
    for n in range(BATCH):
        (tmp_path / "r" / f"{n}.jpg").write_bytes(SOUND["jpeg.jpg"])
    index = build_index(tmp_path / "r", cache_dir=tmp_path / "cache")
    for n in range(BATCH):
        (tmp_path / "r" / f"{n}.jpg").unlink()
    with pytest.raises(UserError, match="and neither can any of the images that were tried in its place"):
        batches_of(index)


# --- the account of a run ---------------------------------------------------------------------------------------------


def event(image: int, step: int = 0) -> BadImage:
    return BadImage(image, step, image, f"/x/{image}.jpg", "it is empty", 1, "/x/1.jpg")


def test_the_limit_counts_different_images(tmp_path):
    account = Account(tmp_path, images=1000, limit=0.02)
    for step in range(100):
        account.add([event(7, step)], write=True)
    account.check(20_000)  # one image, a hundred times
    account.add([event(i) for i in range(10, 19)], write=True)
    account.check(100)  # ten are always allowed
    account.add([event(20)], write=True)
    account.check(600)
    with pytest.raises(UserError, match=r"11 of the 500 images read so far are bad, more than data.max_bad_fraction=0"):
        account.check(500)
    account.add([event(i) for i in range(30, 40)], write=True)
    with pytest.raises(UserError, match=r"21 of the 1,000 images .* the last one: /x/39.jpg: it is empty; .*jsonl"):
        account.check(10**9)
    assert len(account.file.read_text().splitlines()) == account.replaced == 120


def test_a_resumed_account_forgets_what_comes_again(tmp_path):
    account = Account(tmp_path, 1000, 0.01)
    first = [event(1, 0), event(2, 1)]
    assert account.add(first, write=True) == [f"bad image {one}" for one in first]
    state = account.state()
    account.add([event(1, 2)], write=True)
    again = Account(tmp_path, 1000, 0.01)
    again.restore(json.loads(json.dumps(state)), 2, write=True)
    assert again.state() == state
    assert [json.loads(line)["id"] for line in again.file.read_text().splitlines()] == [1, 2]
    assert again.add([event(1, 2)], write=True) == []


@pytest.mark.long
def test_a_run_goes_through_bad_images_and_resumes_exactly(train, photographs, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(photographs, root)
    for name, size in (("class_0/1.jpg", 300), ("class_2/5.jpg", 400), ("class_3/9.jpg", 0)):
        os.truncate(root / name, size)
    words = (f"data.root={root}", "optim.epochs=2", "train.checkpoint_every=5", "log.probe_every=10")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    outcome = train(*words, f"train.folder={straight}")
    assert outcome.code == 0, outcome.err
    for name in ("class_0/1.jpg", "class_2/5.jpg", "class_3/9.jpg"):
        assert outcome.out.count(f"bad image {root}/{name}: ") == 1
    rows = [json.loads(line) for line in (straight / "bad_images.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {row["step"] <= 5 for row in rows} == {True, False}
    about = json.loads((straight / "checkpoints" / "step_00000010" / "checkpoint.json").read_text())
    assert about["bad_images"] == {"replaced": 6, "ids": sorted({row["id"] for row in rows})}

    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("step_00000010"))
    assert train(*words, f"train.folder={resumed}", "--resume").code == 0
    assert (resumed / "bad_images.jsonl").read_text() == (straight / "bad_images.jsonl").read_text()
    last = "checkpoints/step_00000010"
    for shard in (straight / last).glob("*.safetensors"):
        one, other = load_file(shard), load_file(resumed / last / shard.name)
        assert all(torch.equal(one[name], other[name]) for name in one)
    again = json.loads((resumed / last / "checkpoint.json").read_text())
    assert again["bad_images"] == about["bad_images"]

    monkeypatch.setattr(order, "VERSION", order.VERSION + 1)
    assert "a version that drew another order of the images" in train(
        *words, f"train.folder={resumed}", "--resume").error  # fmt: skip
