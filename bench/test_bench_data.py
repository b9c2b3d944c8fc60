"""From JPEGs to crops of 224 px, by each decoder and in the released way; and the cost of order, boxes and masks.

The photographs are JPEGs of three sizes; 500 x 375 is ImageNet's usual one. All runs on the host, except DALI's decoder
on a GPU.
"""
import functools
import importlib
import io
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image

from bench.baselines.workers import build_workers
from bench.harness import heap
from bench.harness.compare import Case, NotRun, Variant
from bench.harness.machine import cores
from bench.harness.workload import encode_photographs, encode_textures
from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.index import RECORD, build_index
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.data.sampler import GlobalBatchSampler, crop_boxes
from ijepa_fast.masks import Masks, MultiBlockMasks

SIZE, SCALE = 224, (0.3, 1.0)
IMAGES = {"160x213": 32, "500x375": 32, "1600x1200": 8}  # of a batch, by the size of the JPEGs
THREADS = [1 << i for i in range(cores().bit_length())]  # 1, 2, 4, ... up to the cores
PASS, LOADED, WORKERS, TEXTURES = 256, 64, 2, 16  # images of a pass, of a batch; processes or threads; different images
SHARE = 128  # images of a step that one rank takes
GRID = 16  # patches along a side: H/14 at 224 px
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


def check_pixels(pixels: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a grey level of Pillow's, away from the borders."""
    if pixels.is_floating_point():  # normalised, [n, 3, S, S]
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((pixels * std + mean) * 255).round().permute(0, 2, 3, 1)
    difference = (pixels.cpu().int() - expected)[:, 1:-1, 1:-1].abs().max().item()
    assert difference <= 1, f"a pixel differs from Pillow's by {difference} levels"


def need(decoder: str) -> None:
    if decoder == "dali":
        try:
            importlib.import_module("nvidia.dali")
        except ImportError:
            raise NotRun("nvidia.dali is not installed") from None


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
            need(name)
            if where.type != device.type and where.type == "cuda":
                raise NotRun("GPU only")
            built = build_decoder(name, threads, where)
            return lambda: built.decode(encoded, boxes, SIZE)

        return Variant(make)

    def one_by_one():
        if threads > 1:
            raise NotRun("one thread: a loader's worker is a process of its own")
        return lambda: straight(encoded, boxes)

    cpu = torch.device("cpu")
    return Case(
        {
            "pillow": decoder("pillow", cpu),
            "turbo": decoder("turbo", cpu),
            "dali": decoder("dali", cpu),
            "dali_gpu": decoder("dali", torch.device("cuda")),
            "straight": Variant(one_by_one),
        },
        {"images": n, "size": SIZE, "threads": threads},
        torch.uint8,
        lambda pixels: check_pixels(pixels, expected),
        host=True,
        seconds=0.7,
        note=lambda seconds: {"ms/image": 1e3 * seconds / n, "images/s": n / seconds},
    )


@pytest.mark.parametrize("provider", ["pillow", "turbo", "dali", "dali_gpu", "straight"])
@pytest.mark.parametrize("threads", [pytest.param(n, id=f"{n}threads") for n in THREADS])
@pytest.mark.parametrize("size", ["160x213", pytest.param("500x375", marks=QUICK), "1600x1200"])
def test_bench_decode(bench, size, threads, provider):
    bench(lambda: decode_case(size, threads, bench.device))


def loader_case(size: str, folder: Path) -> Case:
    """`PASS` JPEGs of 110 kB as batches: by our loader, masks and all, and by workers' processes.

    "ours" has the decoder that `auto` takes on a CPU.

    A sample is a whole pass, which begins with nothing prepared and ends with nothing left over. Beside the time by the
    clock it takes the CPU time of this process and of all workers, which others on the machine have no part in.
    """
    encoded = encode_textures(TEXTURES, size, 110_000)
    for i in range(PASS):
        (folder / f"{i:05d}.jpg").write_bytes(encoded[i % TEXTURES])
    index = build_index(folder, write_cache=False)
    masks = MultiBlockMasks(MaskConfig(group=LOADED), GRID, seed=0, global_batch=LOADED)
    ids = np.concatenate([GlobalBatchSampler(PASS, LOADED, seed=0).ids(step) for step in range(PASS // LOADED)])
    records = index.records[ids]
    boxes = crop_boxes(0, 0, ids, records["width"], records["height"], SCALE)
    spent: dict[str, list[float]] = {}

    def timed(name: str, one_pass, workers=()):
        def call() -> torch.Tensor:
            before = cpu_seconds(workers)
            last = one_pass()
            spent.setdefault(name, []).append(cpu_seconds(workers) - before)
            return last

        return call

    def ours(name: str, decoder: str):
        need(decoder)
        settings = DataConfig(root=folder, image_size=SIZE, crop_scale=SCALE, decoder=decoder, threads=WORKERS)
        pipeline = build_pipeline(settings, masks, micro_batch=LOADED, index=index)

        def one_pass() -> torch.Tensor:
            return [batch.images for batch in pipeline.loader.batches(0, PASS // LOADED)][-1]

        return timed(name, one_pass)

    def workers(name: str, dtype: torch.dtype):
        heap.enter("returned")  # the workers inherit it
        loader = build_workers([Path(index.path(i)) for i in ids], boxes, SIZE, dtype, LOADED, WORKERS)
        next(iter(loader))
        heap.enter("kept")
        pids = [worker.pid for worker in loader._iterator._workers]
        return timed(name, lambda: list(loader)[-1], pids)

    pillow = PillowDecoder(1)
    expected = pillow.decode([encoded[i % TEXTURES] for i in ids[-LOADED:]], boxes[-LOADED:], SIZE).int()
    pillow.close()

    def note(name: str):
        def info(timing) -> dict:
            cpu = {each: float(np.median(times[-len(timing.samples) :])) for each, times in spent.items()}
            note = {"images/s": PASS / timing.median, "CPU ms/image": 1e3 * cpu[name] / PASS}
            return {"note": note | {f"CPU of {each}": cpu[name] / cpu[each] for each in cpu if each != name}}

        return info

    decoders = {"ours": "auto", "pillow": "pillow", "scaled": "scaled"}
    dtypes = {"workers": torch.uint8, "released": torch.float32}
    return Case(
        {name: Variant(functools.partial(ours, name, decoder), info=note(name)) for name, decoder in decoders.items()}
        | {name: Variant(functools.partial(workers, name, dtype), info=note(name)) for name, dtype in dtypes.items()},
        {"images": PASS, "batch": LOADED, "workers": WORKERS, "bytes": len(encoded[0])},
        torch.uint8,
        lambda pixels: check_pixels(pixels, expected),
        host=True,
        seconds=8,
    )


def cpu_seconds(pids: list[int]) -> float:
    """Of this process and of those, all their threads included (Linux)."""
    total = time.process_time()
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return total


@QUICK
@pytest.mark.parametrize("provider", ["ours", "pillow", "scaled", "workers", "released"])
@pytest.mark.parametrize("size", ["500x375"])
def test_bench_loader(bench, tmp_path, size, provider):
    bench(lambda: loader_case(size, tmp_path))


def order_case(images: int) -> Case:
    """A rank's share of one step: ids, index records, crop boxes; and its masks. The epoch's order is drawn before."""
    records = np.zeros(images, RECORD)
    records["width"], records["height"] = 500, 375
    sampler = GlobalBatchSampler(images, 2048, seed=0)
    begin = time.perf_counter()
    sampler.ids(0)
    permutation_s = time.perf_counter() - begin
    masks = MultiBlockMasks(MaskConfig(), GRID, seed=0, global_batch=2048)
    steps = itertools.count()

    def step() -> tuple[np.ndarray, np.ndarray]:
        ids = sampler.ids(next(steps) % sampler.steps_per_epoch)[:SHARE]
        some = records[ids]
        return ids, crop_boxes(0, 0, ids, some["width"], some["height"], SCALE)

    def with_masks() -> tuple[np.ndarray, np.ndarray, Masks]:
        return *step(), masks.sample(next(steps), 0, SHARE)

    def check(result: tuple[np.ndarray, ...]) -> None:
        ids, boxes = result[:2]
        assert len(set(ids.tolist())) == SHARE, "an image twice"
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        assert ((corners >= 0) & (corners <= (500, 375))).all(), "a box outside its image"

    return Case(
        {"ours": Variant(lambda: step), "with_masks": Variant(lambda: with_masks)},
        {"images": images, "share": SHARE, "grid": GRID},
        torch.int64,
        check,
        host=True,
        note=lambda seconds: {"us/image": 1e6 * seconds / SHARE, "s for the epoch's order": permutation_s},
    )


@QUICK
@pytest.mark.parametrize("provider", ["ours", "with_masks"])
@pytest.mark.parametrize("images", [pytest.param(1_281_167, id="in1k"), pytest.param(14_197_122, id="in22k")])
def test_bench_order_and_boxes(bench, images, provider):
    bench(lambda: order_case(images))
