"""Reading: few calls where images lie together, bounded memory, nothing left behind."""
import os

import numpy as np
import pytest
import torch
from test_index_containers import jpeg, write_tar

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data import loader as loader_module
from ijepa_fast.data import reader as reader_module
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.data.reader import Reader
from ijepa_fast.masks import MultiBlockMasks

IMAGES = {f"{n:02}.jpg": jpeg(n) for n in range(24)}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Two tars; in the second, a long file lies between two halves."""
    root = tmp_path_factory.mktemp("reader") / "r"
    names = sorted(IMAGES)
    write_tar(root / "a.tar", {name: IMAGES[name] for name in names[:12]})
    gap = {"gap.txt": bytes(reader_module._GAP)}
    write_tar(root / "b.tar", {n: IMAGES[n] for n in names[12:18]} | gap | {n: IMAGES[n] for n in names[18:]})
    return build_index(root, cache_dir=root.parent / "cache")


@pytest.fixture
def calls(monkeypatch):
    """The (size, offset) of every read."""
    seen, real = [], os.pread

    def pread(handle, size, offset):
        seen.append((size, offset))
        return real(handle, size, offset)

    monkeypatch.setattr(reader_module.os, "pread", pread)
    return seen


def test_neighbours_in_a_tar_are_read_at_one_go(index, calls):
    ids = np.random.default_rng(0).permutation(24)
    with Reader(index, 2) as reader:
        assert reader.read(ids) == [IMAGES[f"{i:02}.jpg"] for i in ids]
    assert len(calls) == 3


def test_far_images_are_read_alone(index, calls, monkeypatch):
    with Reader(index, 2) as reader:
        assert reader.read(np.array([0, 23, 0])) == [IMAGES["00.jpg"], IMAGES["23.jpg"], IMAGES["00.jpg"]]
        assert len(calls) == 3  # the same image twice is no neighbour of itself
        monkeypatch.setattr(reader_module, "_SPAN", 4000)
        calls.clear()
        reader.read(np.arange(12))
        assert len(calls) > 3
        assert max(size for size, _ in calls) <= 4000


def test_a_tar_that_shrank_spoils_only_what_it_lost(tmp_path):
    write_tar(tmp_path / "r" / "a.tar", IMAGES)
    index = build_index(tmp_path / "r", cache_dir=tmp_path / "cache")
    os.truncate(tmp_path / "r" / "a.tar", int(index.records["offset"][20]) + 10)
    with Reader(index, 2) as reader:
        found = list(reader.start(np.arange(24)))
    assert found[:20] == [IMAGES[f"{i:02}.jpg"] for i in range(20)]
    assert all(isinstance(one, ImageError) for one in found[20:])


def test_what_is_read_ahead_is_bounded_by_its_bytes(index, monkeypatch):
    sizes = index.records["size"].astype(int)
    outstanding, most = [0], [0]

    class Counted(Reader):
        def start(self, ids):
            outstanding[0] += sizes[ids].sum()
            most[0] = max(most[0], outstanding[0])
            return super().start(ids)

    monkeypatch.setattr("ijepa_fast.data.pipeline.Reader", Counted)
    real = loader_module.Loader._build

    def build(self, share, encoded):
        outstanding[0] -= sizes[share.ids].sum()
        return real(self, share, encoded)

    monkeypatch.setattr(loader_module.Loader, "_build", build)
    masks = MultiBlockMasks(MaskConfig(group=1, min_keep=2), 6, 0, 8)
    settings = DataConfig(root=index.root, image_size=24, decoder="pillow", threads=2)
    seen = {}
    for bound in (1, 10 * sizes.max(), 1 << 30):
        monkeypatch.setattr(loader_module, "READ_AHEAD_BYTES", bound)
        outstanding[0] = most[0] = 0
        with build_pipeline(settings, masks, micro_batch=2, index=index) as data:
            seen[bound] = list(data.loader.batches(0, 9))
        if bound == 1:
            assert most[0] <= 4 * sizes.max()  # the one in hand and the next
        elif bound < 1 << 30:
            assert 4 * sizes.max() < most[0] <= bound + 2 * sizes.max()
        assert outstanding[0] == 0
    first, *others = seen.values()
    assert all(torch.equal(a.images, b.images) for other in others for a, b in zip(first, other, strict=True))
