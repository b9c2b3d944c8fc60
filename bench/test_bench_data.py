"""From JPEGs to crops of 224 px, by each decoder and in the released way; and the cost of order and crop boxes.

The photographs are JPEGs of three sizes; 500 x 375 is ImageNet's usual one. All runs on the host, except DALI's decoder
on a GPU.
"""
import io
import itertools
import time

import numpy as np
import pytest
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image

from bench.harness.compare import Case, NotRun, Variant
from bench.harness.machine import cores
from bench.harness.workload import encode_photographs
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.index import RECORD
from ijepa_fast.data.sampler import GlobalBatchSampler, crop_boxes

SIZE, SCALE = 224, (0.3, 1.0)
IMAGES = {"160x213": 32, "500x375": 32, "1600x1200": 8}  # of a batch, by the size of the JPEGs
THREADS = [1 << i for i in range(cores().bit_length())]  # 1, 2, 4, ... up to the cores
SHARE = 128  # images of a step that one rank takes
QUICK = pytest.mark.quick


def straight(encoded: list[bytes], boxes: np.ndarray) -> torch.Tensor:
    """What a worker of the released loader does: image by image crop, resize, to float, normalise, channels first."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    images = []
    for data, (left, top, width, height) in zip(encoded, boxes.tolist(), strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
        images.append((pixels.permute(2, 0, 1).contiguous().float() / 255 - mean) / std)
    return torch.stack(images)


def decode_case(size: str, threads: int, device: torch.device) -> Case:
    encoded = encode_photographs(size)
    encoded *= IMAGES[size] // len(encoded)
    n = len(encoded)
    width, height = (np.full(n, int(side)) for side in size.split("x"))
    boxes = crop_boxes(0, 0, np.arange(n), width, height, SCALE)
    pillow = PillowDecoder(1)
    expected = pillow.decode(encoded, boxes, SIZE).int()
    pillow.close()

    def decoder(name: str, where: torch.device):
        def make():
            if name == "dali":
                try:
                    import nvidia.dali  # noqa: F401
                except ImportError:
                    raise NotRun("DALI is not installed") from None
            if where.type != device.type and where.type == "cuda":
                raise NotRun("GPU only")
            built = build_decoder(name, threads, where)
            return lambda: built.decode(encoded, boxes, SIZE)

        return Variant(make)

    def one_by_one():
        if threads > 1:
            raise NotRun("one thread: a loader's worker is a process of its own")
        return lambda: straight(encoded, boxes)

    def check(pixels: torch.Tensor) -> None:
        if pixels.is_floating_point():  # normalised, [n, 3, S, S]
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
            pixels = ((pixels * std + mean) * 255).round().permute(0, 2, 3, 1)
        difference = (pixels.cpu().int() - expected)[:, 1:-1, 1:-1].abs().max().item()
        assert difference <= 1, f"a pixel differs from Pillow's by {difference} levels"

    cpu = torch.device("cpu")
    return Case(
        {
            "pillow": decoder("pillow", cpu),
            "dali": decoder("dali", cpu),
            "dali_gpu": decoder("dali", torch.device("cuda")),
            "straight": Variant(one_by_one),
        },
        {"images": n, "size": SIZE, "threads": threads},
        torch.uint8,
        check,
        host=True,
        seconds=0.7,
        note=lambda seconds: {"ms/image": 1e3 * seconds / n, "images/s": n / seconds},
    )


@pytest.mark.parametrize("provider", ["pillow", "dali", "dali_gpu", "straight"])
@pytest.mark.parametrize("threads", [pytest.param(n, id=f"{n}threads") for n in THREADS])
@pytest.mark.parametrize("size", ["160x213", pytest.param("500x375", marks=QUICK), "1600x1200"])
def test_bench_decode(bench, size, threads, provider):
    bench(lambda: decode_case(size, threads, bench.device))


def order_case(images: int) -> Case:
    """A rank's share of one step: ids, index records, crop boxes. The epoch's order is drawn before."""
    records = np.zeros(images, RECORD)
    records["width"], records["height"] = 500, 375
    sampler = GlobalBatchSampler(images, 2048, seed=0)
    begin = time.perf_counter()
    sampler.ids(0)
    permutation_s = time.perf_counter() - begin
    steps = itertools.count()

    def step() -> tuple[np.ndarray, np.ndarray]:
        ids = sampler.ids(next(steps) % sampler.steps_per_epoch)[:SHARE]
        some = records[ids]
        return ids, crop_boxes(0, 0, ids, some["width"], some["height"], SCALE)

    def check(result: tuple[np.ndarray, np.ndarray]) -> None:
        ids, boxes = result
        assert len(set(ids.tolist())) == SHARE, "an image twice"
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        assert ((corners >= 0) & (corners <= (500, 375))).all(), "a box outside its image"

    return Case(
        {"ours": Variant(lambda: step)},
        {"images": images, "share": SHARE},
        torch.int64,
        check,
        host=True,
        note=lambda seconds: {"us/image": 1e6 * seconds / SHARE, "s for the epoch's order": permutation_s},
    )


@QUICK
@pytest.mark.parametrize("images", [pytest.param(1_281_167, id="in1k"), pytest.param(14_197_122, id="in22k")])
def test_bench_order_and_boxes(bench, images):
    bench(lambda: order_case(images))
