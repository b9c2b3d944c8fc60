"""Batches: the same whatever the threads, prefetch and start; shares of ranks; errors and endings that do not hang."""
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from decoders import DECODERS, need
from PIL import Image

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.index import build_index
from ijepa_fast.data.loader import Loader, eval_batches
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.sampler import GlobalBatchSampler, center_boxes, crop_boxes
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks

IMAGES, GLOBAL_BATCH, SIZE, PATCH, SEED = 30, 12, 32, 4, 5
CROP_SCALE = (0.3, 1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        (root / f"class{n % 3}").mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40 + n, 70 - n)).save(root / f"class{n % 3}" / f"{n:02}.jpg")
    return root


@pytest.fixture(scope="module")
def index(root, tmp_path_factory):
    return build_index(root, cache_dir=tmp_path_factory.mktemp("cache"))


def mask_sampler():
    return MultiBlockMasks(MaskConfig(group=4, min_keep=2), SIZE // PATCH, SEED, GLOBAL_BATCH)


@pytest.fixture
def make_loader(index):
    """A loader of the module's images; keywords replace parts of it. Everything is closed after the test."""
    made = []

    def make(*, threads=2, decoder=None, reader=None, masks=None, **options):
        decoder = decoder or PillowDecoder(threads)
        reader = reader or Reader(index, threads)
        sampler = GlobalBatchSampler(IMAGES, GLOBAL_BATCH, SEED)
        options = {"micro_batch": 4, "image_size": SIZE, "crop_scale": CROP_SCALE, "seed": SEED} | options
        loader = Loader(index, sampler, decoder, reader, masks or mask_sampler(), **options)
        made.extend((loader, reader, decoder))
        return loader

    yield make
    for thing in made:
        thing.close()


def same(a, b):
    def tensors(batch):
        context, target, context_of, covered = batch.masks
        return batch.images, *context[:3], *target[:3], context_of, *covered

    assert (a.step, a.last) == (b.step, b.last)
    assert np.array_equal(a.ids, b.ids)
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_a_batch_is_what_its_parts_give(make_loader, index):
    loader = make_loader(micro_batch=5)
    batches = list(loader.batches(1, 4))
    assert [len(batch.ids) for batch in batches] == [5, 5, 2] * 3
    assert [batch.step for batch in batches] == [1] * 3 + [2] * 3 + [3] * 3
    assert [batch.last for batch in batches] == [False, False, True] * 3
    assert loader.micro_batches_per_step == 3
    masks = mask_sampler()
    for n, batch in enumerate(batches):
        start = n % 3 * 5
        ids = loader.sampler.ids(batch.step)[start : start + 5]
        assert np.array_equal(batch.ids, ids)
        records, epoch = index.records[ids], loader.sampler.epoch_of(batch.step)
        boxes = crop_boxes(SEED, epoch, ids, records["width"], records["height"], CROP_SCALE)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(ids), SIZE, SIZE, 3)
        for image, box, i in zip(batch.images, boxes, ids, strict=True):
            left, top, width, height = box.tolist()
            crop = Image.open(index.path(i)).convert("RGB").crop((left, top, left + width, top + height))
            assert np.array_equal(image, crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        same(batch, batch._replace(masks=masks.sample(batch.step, start, start + len(ids))))


@pytest.mark.parametrize("kind", DECODERS)
def test_threads_prefetch_and_start_have_no_influence(make_loader, kind):
    need(kind)
    expected = list(make_loader(decoder=build_decoder(kind, 1), threads=1, prefetch=1).batches(0, 6))
    other = make_loader(decoder=build_decoder(kind, 3), threads=3, prefetch=5)
    for first in (0, 3):  # step 3 lies in the second epoch
        for a, b in zip(expected[3 * first :], other.batches(first, 6), strict=True):
            same(a, b)


@pytest.mark.parametrize("micro_batch", [2, 3, 12])
def test_the_shares_of_all_ranks_are_the_global_batch(make_loader, micro_batch):
    whole = list(make_loader(micro_batch=GLOBAL_BATCH).batches(0, 3))
    for world_size in (2, 3):
        shares = [
            list(make_loader(rank=rank, world_size=world_size, micro_batch=micro_batch).batches(0, 3))
            for rank in range(world_size)
        ]
        for step in range(3):
            parts = [batch for share in shares for batch in share if batch.step == step]
            assert np.array_equal(np.concatenate([part.ids for part in parts]), whole[step].ids)
            assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)
            for of in (lambda masks: masks.context.indices, lambda masks: masks.target.indices):
                assert torch.equal(torch.cat([of(part.masks) for part in parts]), of(whole[step].masks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "does not divide among 5 ranks"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"micro_batch": 0}, "at least 1"),
        ({"prefetch": 0}, "at least 1"),
    ],
)
def test_impossible_arguments(make_loader, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


@pytest.fixture
def broken(tmp_path):
    """A folder and its index, made before a test breaks one of the files."""
    (tmp_path / "photos").mkdir()
    for n in range(13):
        Image.new("RGB", (50, 40), (n, 0, 0)).save(tmp_path / "photos" / f"{n:02}.jpg")
    return build_index(tmp_path / "photos", cache_dir=tmp_path / "cache")


def damage(path):
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(b"\0" * (os.path.getsize(path) - 4))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage, "its JPEG header is damaged"),
        (os.unlink, "it cannot be read any more: No such file or directory"),
        (lambda path: os.truncate(path, 100), r"it is not the file that was indexed with \d+ bytes"),
        (lambda path: os.truncate(path, 10**5), r"it is not the file that was indexed with \d+ bytes"),
    ],
)
def test_a_bad_image_is_replaced_and_named(broken, harm, reason):
    masks = MultiBlockMasks(MaskConfig(group=1, min_keep=2), SIZE // PATCH, SEED, len(broken))
    settings = DataConfig(root=broken.root, image_size=SIZE, decoder="pillow", threads=2)
    with build_pipeline(settings, masks, micro_batch=3, index=broken) as data:
        before = list(data.loader.batches(0, 2))
        image = int(data.sampler.ids(0)[7])
        harm(broken.path(image))
        after = list(data.loader.batches(0, 2))
    assert [(bad.position, bad.step, bad.id) for batch in after for bad in batch.bad] == [
        (7, 0, image), (data.sampler.ids(1).tolist().index(image), 1, image)]  # fmt: skip
    for old, new in zip(before, after, strict=True):
        start = new.bad[0].position % 3 if new.bad else None
        assert np.array_equal(old.ids, new.ids)
        for at in range(len(new.ids)):
            if at != start:
                assert torch.equal(old.images[at], new.images[at])
            else:
                assert re.match(reason, new.bad[0].reason)
                assert new.bad[0].path == broken.path(image)
                # Every image here is of one colour: what stands in for image n is known by its red.
                assert abs(int(new.images[at, 0, 0, 0]) - new.bad[0].substitute) <= 2
                assert new.bad[0].substitute != image


def test_the_advice_for_a_changed_file_works(broken, tmp_path):
    folder, path = tmp_path / "photos", broken.path(0)
    Image.new("RGB", (90, 80)).save(path)  # in place: the modification time of the folder stays
    again = build_index(folder, cache_dir=tmp_path / "cache")
    with Reader(again, 1) as reader, pytest.raises(UserError, match=f"`touch {folder}`"):
        reader.read([0])
    os.utime(folder)
    again = build_index(folder, cache_dir=tmp_path / "cache")
    assert again.records["width"][0] == 90
    with Reader(again, 1) as reader:
        assert len(reader.read([0])[0]) == os.path.getsize(path)


class SlowDecoder:
    """Counts the batches it was given and takes its time over each."""

    def __init__(self, seconds=0.0):
        self.seconds, self.count = seconds, 0

    def decode_each(self, encoded, boxes, size):
        self.count += 1
        time.sleep(self.seconds)
        return torch.zeros(len(encoded), size, size, 3, dtype=torch.uint8), {}

    def close(self):
        pass


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_no_more_than_the_prefetch_is_prepared_ahead(make_loader):
    decoder = SlowDecoder()
    loader = make_loader(decoder=decoder, prefetch=3)
    batches = loader.batches(0, 100)
    next(batches)
    time.sleep(0.3)
    assert decoder.count <= 1 + 3 + 1  # taken, waiting, and in the thread's hand


def test_every_way_out_ends_the_thread_promptly(make_loader):
    decoder = SlowDecoder(0.02)
    loader = make_loader(decoder=decoder)
    for _ in loader.batches(0, 10**6):
        break  # leaves the iterator to the garbage collector
    gc.collect()
    assert not loader_threads()

    batches = loader.batches(0, 10**6)
    next(batches)
    loader.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="the loader was closed"):
        next(batches)

    loader.batches(0, 10**6)  # never begun
    again = loader.batches(0, 1)
    assert len(loader_threads()) == 1
    assert len(list(again)) == 3
    assert not loader_threads()

    with loader:
        next(loader.batches(0, 10**6))
    assert not loader_threads()
    # Of 3 * 10**6 batches each way: what was asked for, what the queue holds, and one in the thread's hand.
    assert decoder.count < 40


def test_waiting_for_data_is_counted(make_loader):
    loader, start = make_loader(decoder=SlowDecoder(0.1)), time.perf_counter()
    list(loader.batches(0, 2))
    # Six batches of 0.1 s, some of the first under way before we ask.
    assert 0.4 < loader.wait_s < time.perf_counter() - start
    ready = make_loader(decoder=SlowDecoder(), prefetch=6)
    batches = ready.batches(0, 2)
    next(batches)
    time.sleep(0.5)
    before = ready.wait_s
    list(batches)
    assert ready.wait_s - before < 0.2


def test_eval_batches_are_central_crops_in_order(index):
    ids = np.array([7, 3, 29, 0, 11])
    with closing(PillowDecoder(2)) as decoder, Reader(index, 2) as reader:
        batches = list(eval_batches(index, ids, decoder, reader, SIZE, batch=2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        records = index.records[ids]
        expected = decoder.decode(reader.read(ids), center_boxes(records["width"], records["height"]), SIZE)
    assert torch.equal(torch.cat(batches), expected)


SCRIPT = """
import signal, sys, time
from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.masks import MultiBlockMasks

index = build_index(sys.argv[1], cache_dir=sys.argv[2])
masks = MultiBlockMasks(MaskConfig(group=5, min_keep=2), 8, seed=0, global_batch=10)
data = build_pipeline(DataConfig(root=sys.argv[1], image_size=32, threads=2), masks, micro_batch=5, index=index)
batches = data.loader.batches(0, 10**9)
next(batches)
time.sleep(0.5)  # the queue is full now, and its thread waits
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins by ignoring it
print("running", flush=True)
if sys.argv[3] == "interrupt":
    for batch in batches:
        time.sleep(0.01)
"""


@pytest.mark.long
@pytest.mark.parametrize("way", ["exit", "interrupt"])
def test_a_process_that_closes_nothing_still_ends(root, tmp_path, way):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, root, tmp_path, way],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "running\n"
        if way == "interrupt":
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == (0 if way == "exit" else -signal.SIGINT)
    assert errors == "" if way == "exit" else errors.rstrip().endswith("KeyboardInterrupt")
