"""`python -m ijepa_fast.data.index ROOT... [--verify] [--workers N]`: build indexes, show what they hold, decode all.

What `--verify` finds goes to `bad.jsonl`, an object a line: path (or tar and member), reason. It is strict: it also
finds JPEGs with flipped bits, which decoders paint over in silence.
"""
import contextlib
import io
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijepa_fast import arguments_data
from ijepa_fast.cli import command, console
from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder_pillow import open_image
from ijepa_fast.data.formats import ImageError
from ijepa_fast.data.index import build_index, cache_path, describe, real_root
from ijepa_fast.data.reader import Reader
from ijepa_fast.data.table import Index, load_index
from ijepa_fast.durable import write_durably

_CHUNK = 256  # images between two notes of how far the verification is


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_data.index(argv)
    report = console().print
    for root in args.roots:
        index = build_index(root, threads=args.workers, report=report)
        real = real_root(root)
        cached = load_index(cache_path(real), index.root, verify=True)
        report(f"kept in     {cache_path(real)}" + ("" if cached is not None else " (not written)"))
        summarize(index, report)
        if args.picture is not None:
            draw_sizes(index, args.picture)
            report(f"picture     {args.picture}")
        if args.verify:
            verify(index, Path(cache_path(real) + ".verify"), args.bad, args.workers, args.max_pixels, report)


def summarize(index: Index, report: Any) -> None:
    records = index.records
    size = records["size"].sum(dtype=np.int64)
    report(f"images      {len(index):,} in {len(index.containers):,} files, {size / 1e6:,.1f} MB, "
           f"{size / len(index) / 1e3:,.1f} kB each")  # fmt: skip
    sides = np.minimum(records["width"], records["height"])
    known = sides[sides > 0]
    quantiles = ", ".join(f"{value:,.0f}" for value in np.quantile(known, (0, 0.05, 0.5, 0.95, 1)))
    report(f"sizes       shorter side {quantiles} pixels (least, 5 %, median, 95 %, most)")
    unlabelled = int((records["label"] < 0).sum())
    report(f"classes     {len(index.class_names):,}; {unlabelled:,} images without one")
    report(f"left out    {describe(index.about['skipped']) or 'nothing'}")
    reasons = Counter(reason for _, reason in index.about["bad"])
    report(f"bad         {reasons.total():,} headers, {len(index.about['faults']):,} containers")
    for reason, number in reasons.most_common(20):
        report(f"            {number:,}: {reason}")


def draw_sizes(index: Index, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    known = index.records[index.records["width"] > 0]
    some = known[np.linspace(0, len(known) - 1, min(len(known), 1 << 20)).astype(np.int64)]
    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    least, most = min(some["width"].min(), some["height"].min()), max(some["width"].max(), some["height"].max())
    edges = np.geomspace(0.8 * least, 1.25 * most, 60)
    *_, cells = axes.hist2d(some["width"], some["height"], bins=[edges, edges], norm="log", cmin=1)
    figure.colorbar(cells, label="images")
    axes.set(xscale="log", yscale="log", xlabel="width, pixels", ylabel="height, pixels",
             title=f"Sizes of {len(index):,} images", aspect="equal")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter("")
    figure.savefig(path, dpi=110)


def verify(index: Index, state: Path, bad: Path, workers: int, max_pixels: int, report: Any) -> None:
    """Decode every image, and append the bad ones to the file `bad`; `state` says how far it is."""
    mark = {"index": index.fingerprint(), "bad": str(bad.resolve()), "max_pixels": max_pixels}
    first = _go_on(state, bad, mark)
    if first:
        report(f"verifying from image {first:,} on, where it was stopped")
    reasons, begin, warned = Counter[str](), time.perf_counter(), library_warnings.Account()

    def fault(image: int, data: bytes | ImageError) -> str | None:
        with library_warnings.about(lambda: index.path(image)):
            return fault_of(data)

    bar = Progress(TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)  # fmt: skip
    with (
        Reader(index, workers, max_pixels) as reader,
        ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool,
        open(bad, "a") as out,
        bar,
    ):
        task = bar.add_task("", total=len(index), completed=first)
        ahead = reader.start(np.arange(first, min(first + _CHUNK, len(index))))
        for start in range(first, len(index), _CHUNK):
            stop = min(start + _CHUNK, len(index))
            current, ahead = ahead, reader.start(np.arange(stop, min(stop + _CHUNK, len(index))))
            for image, reason in enumerate(pool.map(fault, range(start, stop), current), start):
                if reason is not None:
                    reasons[reason] += 1
                    out.write(json.dumps({"image": image, "path": index.path(image), "reason": reason}) + "\n")
            out.flush()
            write_durably(state, json.dumps({**mark, "next": stop}))
            bar.update(task, completed=stop)
    state.unlink(missing_ok=True)
    number = len(bad.read_text().splitlines())
    report(f"verified    {len(index) - first:,} images in {time.perf_counter() - begin:.1f} s; {number:,} bad: {bad}")
    for reason, count in reasons.most_common(20):
        report(f"            {count:,}: {reason}")
    for line in warned.add([library_warnings.take()]):
        report(line)
    if warned.raised:
        report(f"warnings    {warned.raised:,} of libraries on images")


def _go_on(state: Path, bad: Path, mark: dict[str, Any]) -> int:
    """The image to go on with: 0, unless a verification of the same was stopped."""
    first = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(state.read_text())
        if {key: before[key] for key in mark} == mark:
            first = before["next"]
    kept = []
    if first and bad.exists():
        lines = bad.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["image"] < first]
    write_durably(bad, "".join(kept))
    return first


def fault_of(data: bytes | ImageError) -> str | None:
    """Why an image cannot be decoded whole and without a complaint, or None."""
    if isinstance(data, ImageError):
        return str(data)
    try:
        with open_image(io.BytesIO(data), float("inf")) as image:
            image.load()
    except Exception as error:  # Pillow's plugins raise whatever damaged data leads them to
        return " ".join(str(error).split()) or type(error).__name__
    if data.startswith(b"\xff\xd8"):
        try:
            simplejpeg.decode_jpeg(data, strict=True)
        except ValueError as error:
            # What libjpeg warns of; not the kinds of JPEG that this library alone cannot convert.
            if str(error).startswith(("Corrupt", "Premature", "Invalid", "Inconsistent", "Unexpected")):
                return str(error)
    return None
