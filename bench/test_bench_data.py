"""JPEGs to crops of 224 px by each decoder, beside the plain float pipeline; and what order and boxes cost an image.

The photographs are scikit-image's, written as JPEGs of three sizes: 500 x 375 is ImageNet's usual one.
"""

import io
import itertools
import statistics
import time

import numpy as np
import pytest
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image

from ijepa_fast.data.decoder import PillowDecoder, build_decoder
from ijepa_fast.data.index import RECORD
from ijepa_fast.data.sampler import GlobalBatchSampler, crop_boxes

SIZE, SCALE = 224, (0.3, 1.0)
IMAGES = {(160, 213): 32, (500, 375): 32, (1600, 1200): 8}  # of a batch, by the size of the JPEGs


@pytest.fixture(scope="module", params=IMAGES, ids="{0[0]}x{0[1]}".format)
def batch(request):
    """Encoded JPEGs of one size and their boxes."""
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")
    width, height = request.param
    encoded = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        file = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize(request.param).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    n = IMAGES[request.param]
    boxes = crop_boxes(0, 0, np.arange(n), np.full(n, width), np.full(n, height), SCALE)
    return encoded * (n // len(encoded)), boxes


def measure(benchmark, decode, images, **info):
    benchmark.pedantic(decode, rounds=7, warmup_rounds=1)
    cpu = []  # what the process used, all threads together: on a machine with other work the steadier figure
    for _ in range(3):
        begin = time.process_time()
        decode()
        cpu.append(time.process_time() - begin)
    stats = benchmark.stats.stats
    benchmark.extra_info.update(
        images=images,
        size=SIZE,
        ms_per_image_median=1e3 * stats.median / images,
        ms_per_image_iqr=1e3 * stats.iqr / images,
        cpu_ms_per_image=1e3 * statistics.median(cpu) / images,
        **info,
    )


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("provider", ["pillow", "dali"])
def test_bench_decode(benchmark, batch, provider, threads):
    encoded, boxes = batch
    if provider == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder, pillow = build_decoder(provider, threads), PillowDecoder(1)
    try:
        difference = decoder.decode(encoded, boxes, SIZE).int() - pillow.decode(encoded, boxes, SIZE).int()
        assert difference[:, 1:-1, 1:-1].abs().max() <= (1 if provider == "dali" else 0)
        measure(benchmark, lambda: decoder.decode(encoded, boxes, SIZE), len(encoded),
                provider=provider, threads=threads)
    finally:
        decoder.close()
        pillow.close()


def straight(encoded, boxes):
    """What a worker of a data loader does: crop, resize, float, normalise, channels first, one image after another."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    images = []
    for data, (left, top, width, height) in zip(encoded, boxes.tolist(), strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
        images.append((pixels.permute(2, 0, 1).contiguous().float() / 255 - mean) / std)
    return torch.stack(images)


@pytest.mark.benchmark(group="decode")
def test_bench_straight_decode(benchmark, batch):
    encoded, boxes = batch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measure(benchmark, lambda: straight(encoded, boxes), len(encoded), provider="straight", threads=1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.benchmark(group="order and boxes")
@pytest.mark.parametrize("images", [1_281_167, 14_197_122], ids=["in1k", "in22k"])
def test_bench_order_and_boxes(benchmark, images):
    """One step's share of a rank: ids, records, boxes. The epoch's permutation is drawn before and timed apart."""
    records = np.zeros(images, RECORD)
    records["width"], records["height"] = 500, 375
    sampler = GlobalBatchSampler(images, 2048, seed=0)
    begin = time.perf_counter()
    sampler.ids(0)
    permutation_s = time.perf_counter() - begin
    steps = itertools.count()

    def step():
        ids = sampler.ids(next(steps))[:128]
        some = records[ids]
        return crop_boxes(0, 0, ids, some["width"], some["height"], SCALE)

    boxes = step()
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 500
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 375
    benchmark.pedantic(step, rounds=100, warmup_rounds=5)
    benchmark.extra_info.update(
        images=images, us_per_image=1e6 * benchmark.stats.stats.median / 128, permutation_s=permutation_s
    )
