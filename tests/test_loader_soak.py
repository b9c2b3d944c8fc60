"""A loader at work for a long time: nothing grows."""
import os
import threading

import odd_images
import pytest

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.masks import MultiBlockMasks

BATCHES, WARM, EVERY = 100_000, 10_000, 1000
IMAGES, DAMAGED = 400, 4  # one in a hundred


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_hundred_thousand_batches(tmp_path):
    for n in range(IMAGES):
        data = odd_images.encode(odd_images.photo(n).resize((20, 16)), "JPEG")
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / f"{n:03}.jpg").write_bytes(data[:-2] if n % (IMAGES // DAMAGED) == 50 else data)
    masks = MultiBlockMasks(MaskConfig(group=1, min_keep=2), 6, 0, 2)
    settings = DataConfig(root=tmp_path / "r", image_size=16, threads=2)
    index = build_index(settings.root, cache_dir=tmp_path / "cache")
    seen, bad = [], 0
    with build_pipeline(settings, masks, micro_batch=2, index=index) as data:
        for number, batch in enumerate(data.loader.batches(0, BATCHES)):
            bad += len(batch.bad)
            if number >= WARM and number % EVERY == 0:
                seen.append((resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))))
    assert bad == BATCHES * 2 * DAMAGED // IMAGES  # whole epochs, each with every image once
    memory, threads, files = zip(*seen, strict=True)
    print(f"resident, MB: {memory[0] / 1e6:.1f} at batch {WARM:,}, then up to {max(memory) / 1e6:.1f}")
    assert max(memory) <= 1.05 * memory[0]
    assert max(threads) == threads[0]
    assert max(files) <= files[0] + 2  # as many as there are readers: an image that is being read is open
