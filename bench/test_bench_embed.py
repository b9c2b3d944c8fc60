"""Embedding a folder of 5,000 JPEGs, beside the bare loop: decode a batch, forward, keep the row.

`ours` is `ijepa_fast.embed`, index, files and all; `loop` decodes with the same decoder and does nothing else but the
forward; `forward` has its batches decoded before the clock starts, all of one batch in turn. One pass of each, in parts
that take turns, so that whatever else the machine does meanwhile hits all three.
"""
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.harness.compare import NotRun
from bench.harness.workload import write_photographs
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.embed import embed
from ijepa_fast.model import build_encoder

IMAGES, BATCH, SIZE, PATCH = 5000, 50, 224, 16
PARTS = 10  # of the folder, each embedded by every provider in turn
FLAT = IMAGES * SIZE * SIZE * 3 // 10  # bytes: what keeping a tenth of the pixels would add


class Model:
    """What `embed` asks of weights, around an encoder drawn at random."""

    image_size, patch_size, predictor = SIZE, PATCH, None

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        self.encoder = build_encoder("vit_tiny", image_size=SIZE, patch_size=PATCH).to(device)

    @torch.no_grad()
    def features(self, images: torch.Tensor, layers: int = 1, pool: str | None = None) -> torch.Tensor:
        return self.encoder(images).mean(1)


def run(folder: Path, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each part by provider; and "resident", the bytes held after each part of ours."""
    (folder / "images").mkdir()
    write_photographs(folder / "images", "500x375", IMAGES)
    model = Model(device)
    files = sorted((folder / "images").iterdir())
    seconds: dict[str, list[float]] = {"ours": [], "loop": [], "forward": [], "resident": []}
    for part in range(PARTS):
        index = index_images(files[part * IMAGES // PARTS : (part + 1) * IMAGES // PARTS])
        ready = next(center_crops(index, np.arange(BATCH), SIZE, batch=BATCH)).to(device)
        rows: dict[str, np.ndarray] = {}

        def ours(index=index, part=part, rows=rows) -> None:
            rows["ours"] = embed(model, index, folder / f"{part}.npy", batch=BATCH)

        def loop(index=index, rows=rows) -> None:
            crops = center_crops(index, np.arange(len(index)), SIZE, batch=BATCH)
            rows["loop"] = np.concatenate([model.features(some.to(device)).cpu().numpy() for some in crops])

        def forward(index=index, ready=ready) -> None:
            for _ in range(len(index) // BATCH):
                model.features(ready).cpu()

        order = [("ours", ours), ("loop", loop), ("forward", forward)]
        for name, call in order[part % 3 :] + order[: part % 3]:
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
            if name == "ours":
                seconds["resident"].append(resident())
        assert np.allclose(rows["ours"], rows["loop"], atol=1e-5), "ours has other features than the loop"
    return seconds


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, request):
    try:
        return run(tmp_path_factory.mktemp("embed"), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except NotRun as reason:
        pytest.skip(f"not run: {reason}")


@pytest.mark.parametrize("provider", ["ours", "loop", "forward"])
def test_bench_embed(bench, measured, provider):
    images = IMAGES // PARTS
    other = np.array(measured[provider]) / np.array(measured["ours"])
    # Medians of three: the allocator's caches come and go by some tens of megabytes.
    growth = float(np.median(measured["resident"][-3:]) - np.median(measured["resident"][:3]))
    note = {"images/s": images / np.median(measured[provider]), "memory grows by, MB": growth / 1e6}
    fields = {"status": "timed", "clock": "wall", "shapes": {"images": IMAGES, "batch": BATCH}, "note": note}
    fields["seconds"] = {"median": float(np.median(measured[provider]))}
    if provider != "ours":
        fields["ours_is"] = {"median": float(np.median(other)), "p10": float(np.quantile(other, 0.1)),
                             "p90": float(np.quantile(other, 0.9))}  # fmt: skip
    bench.report("embed", fields, measured[provider])
    assert growth < FLAT, f"memory grew by {growth / 1e6:.0f} MB over {PARTS} parts"
