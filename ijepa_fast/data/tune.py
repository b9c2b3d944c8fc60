"""`python -m ijepa_fast.data.tune CONFIG [section.key=value ...]`: how fast are the user's own images read and decoded?

Measures images/s of every decoder and thread count on random crops of the images of `data.root`, in interleaved rounds
and after one that fills the file cache, and how far each decoder's pixels are from Pillow's. With `--step-ms`, the time
of a training step (the log's `time (ms)`), also what the step needs.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["tune", *sys.argv[1:]]))

import contextlib
import os
import statistics
import time
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ijepa_fast import arguments_data
from ijepa_fast.cli import command, console
from ijepa_fast.config import load_config
from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.index import build_index
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.sampler import GlobalBatchSampler, crop_boxes
from ijepa_fast.data.subset import select


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_data.tune(argv)
    config, _ = load_config(args.config, args.overrides)
    data, out = config.data, console()
    whole = build_index(data.root, threads=data.threads, report=out.print)
    index = select(whole, data)
    count = min(args.images, len(index))
    ids = GlobalBatchSampler(len(index), count, config.train.seed, data.shuffle).ids(0)
    records = index.records[ids]
    boxes = crop_boxes(config.train.seed, 0, ids, records["width"], records["height"], data.crop_scale)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates, far = measure(index, ids, boxes, data.image_size, device, args.rounds)

    table = Table("decoder", "threads", "images/s", "of them reading", "from Pillow: mean, most inside", box=None)
    for (name, threads), (rate, reading) in sorted(rates.items(), key=lambda item: -item[1][0]):
        mean, most = far[name]
        table.add_row(name, str(threads), f"{rate:,.0f}", f"{reading:.0%} of the time", f"{mean:.2f}, {most}")
    out.print(table)
    best = max(((key, rate) for key, (rate, _) in rates.items() if key[0] != "scaled"), key=lambda item: item[1])
    out.print(f"fastest within a grey level of Pillow: data.decoder={best[0][0]} data.threads={best[0][1]}")
    if args.step_ms is not None:
        needed = config.optim.global_batch_size / args.step_ms * 1000
        share = best[1] / needed
        out.print(f"a step of {config.optim.global_batch_size} images in {args.step_ms:g} ms needs {needed:,.0f} "
                  f"images/s over all ranks: {1 / share:.1f} loaders like this one")  # fmt: skip
    else:
        out.print("--step-ms MS (`time (ms)` of the log) shows what a step needs")


def measure(
    index: Any, ids: np.ndarray, boxes: np.ndarray, size: int, device: torch.device, rounds: int
) -> tuple[dict[tuple[str, int], tuple[float, float]], dict[str, tuple[float, int]]]:
    """(images/s, share of reading) by decoder and threads, and how far each decoder is from Pillow, in grey levels."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, cores, *(1 << i for i in range(cores.bit_length()) if 1 << i <= cores)})
    names: list[Literal["pillow", "scaled", "turbo", "dali"]] = ["pillow", "scaled", "turbo"]
    with contextlib.suppress(ImportError):
        import nvidia.dali  # noqa: F401

        names.append("dali")
    times: dict[tuple[str, int], list[tuple[float, float]]] = {(n, t): [] for n in names for t in counts}
    pixels: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        readers = {t: stack.enter_context(Reader(index, t)) for t in counts}
        decoders = {(n, t): stack.enter_context(contextlib.closing(build_decoder(n, t, device)))
                    for n in names for t in counts}  # fmt: skip
        for number in track(range(rounds + 1), "measuring", console=Console(stderr=True), transient=True):
            for (name, threads), decoder in decoders.items():
                begin = time.perf_counter()
                encoded = list(readers[threads].start(ids))
                read = time.perf_counter()
                good = [at for at, one in enumerate(encoded) if not isinstance(one, ImageError)]
                some = [one for one in encoded if isinstance(one, bytes)]
                with library_warnings.batch(lambda at: index.path(ids[good[at]])):  # noqa: B023 (called in here only)
                    decoded, _ = decoder.decode_each(some, boxes[good], size)
                end = time.perf_counter()
                if number:  # the first round fills caches and starts libraries
                    times[name, threads].append((len(ids) / (end - begin), (read - begin) / (end - begin)))
                pixels[name] = decoded.cpu().int()
    rates = {key: (statistics.median(r for r, _ in some), statistics.median(s for _, s in some))
             for key, some in times.items()}  # fmt: skip
    far: dict[str, tuple[float, int]] = {}
    for name in names:
        difference = (pixels[name] - pixels["pillow"]).abs()
        far[name] = difference.float().mean().item(), int(difference[:, 1:-1, 1:-1].max())
    return rates, far
