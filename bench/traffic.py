"""What a training step asks of a GPU, counted without one (see bench/harness/traffic.py).

    python bench/traffic.py --config configs/vith14_in1k.yaml --micro-batch 128           a table
    python bench/traffic.py --config configs/vith14_in1k.yaml --micro-batch 128 --json    one JSON object
    python bench/traffic.py --record docs/traffic/NAME.json                               S, B, L, H and g
    python bench/traffic.py --markdown docs/traffic.md                                    a table of the records

One update of one micro-batch: `ijepa_fast.step.update` itself, eager, in bf16 as on a GPU, over meta tensors and the
masks of the median step of the first 16. Predicted milliseconds are sums of each operator's least time on an H100.
"""
import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ijepa_kernels import AdamWEMA, Quantized  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.harness.machine import commit  # noqa: E402
from bench.harness.traffic import Counter, Tally, nbytes  # noqa: E402
from ijepa_fast import optim, step  # noqa: E402
from ijepa_fast.config import Config, load_config  # noqa: E402
from ijepa_fast.data.loader import Batch  # noqa: E402
from ijepa_fast.distributed import World  # noqa: E402
from ijepa_fast.fp8 import use_fp8  # noqa: E402
from ijepa_fast.masks import Covered, Masks, MultiBlockMasks  # noqa: E402
from ijepa_fast.model import keep_copies  # noqa: E402
from ijepa_fast.run import Run, TrainState, draw_models  # noqa: E402

META = torch.device("meta")
MODELS = {"S/16": ("vits16", 128), "B/16": ("vitb16", 128), "L/16": ("vitl16", 128), "H/14": ("vith14", 128)}
MODELS["g/16"] = ("vitg16", 64)
STEPS = 16  # that the median is of
COLUMNS = tuple(Tally.__dataclass_fields__)


def median_masks(config: Config, batch: int) -> Masks:
    sampler = MultiBlockMasks(config.mask, config.grid, config.train.seed, batch)
    drawn = [sampler.sample(number, 0, batch) for number in range(STEPS)]
    drawn.sort(key=lambda masks: len(masks.context.indices) + len(masks.target.indices))
    return drawn[STEPS // 2]


def squared_lengths(masks: Masks, images: int, patches: int) -> dict[str, float]:
    """Pairs of tokens that attend to each other, by part of the step."""
    context, target = (packed.cu_seqlens.diff().double().numpy() for packed in masks[:2])
    both = context[masks.context_of.numpy()] + target
    parts = {"context": float((context**2).sum()), "predictor": float((both**2).sum())}
    pairs = {f"{name} {way}": value for name, value in parts.items() for way in ("forward", "backward")}
    return pairs | {"target forward": float(images * patches**2)}


def on_meta(masks: Masks) -> Masks:
    packs = (p._replace(**{f: x.to(META) for f, x in p._asdict().items() if isinstance(x, Tensor)}) for p in masks[:2])
    assert masks.covered is not None
    return Masks(*packs, masks.context_of.to(META), Covered(*(x.to(META) for x in masks.covered)))


def build_state(config: Config) -> TrainState:
    """As `ijepa_fast.run.build_state` for one GPU, without values."""
    with META:
        encoder, predictor = draw_models(config, torch.device("cuda"))
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    if config.model.target_dtype == "fp8":
        use_fp8(target_encoder, config.model.fp8_blocks)
    for model in (encoder, predictor, target_encoder):
        keep_copies(model)
    return TrainState(encoder, predictor, target_encoder, optim.build_optimizer(encoder, predictor, target_encoder))


def count_update(counter: Counter) -> Callable[..., None]:
    """What takes the place of `AdamWEMA.step`, whose kernel finds its tensors by their addresses.

    It reads and writes weight and moments once, reads the gradient, reads and writes a target, writes copies.
    """

    def step(optimizer: AdamWEMA, *_: Any, **__: Any) -> None:
        counter.part, moved, kinds = "update", 0, set()
        for group in optimizer.param_groups:
            for p in group["params"]:
                target = optimizer.targets.get(p)
                low = [optimizer.copies[x] for x in (p, target) if x in optimizer.copies]
                # Of e4m3 the rows that count, and their scales; it reads a target again, from the cache, for those.
                rows = [x for x in low if isinstance(x, Quantized)]
                written = [part[: x.rows] for x in rows for part in (x.values, x.scale)]
                written += [x for x in low if isinstance(x, Tensor)]
                moved += 7 * nbytes(p) + (0 if target is None else 2 * nbytes(target)) + sum(map(nbytes, written))
                kinds.add((target is None, len(low), *(x.values.shape[1] for x in rows)))
        # The kernel that begins the update, and two small copies: rates, and addresses of gradients.
        counter.add("optimizer", Tally(other_bytes=moved, launches=len(kinds) + 3))

    return step


class Marks:
    """Tells the counter where in the step it is: forward by hooks of the modules, backward by those of gradients."""

    def __init__(self, counter: Counter, state: TrainState):
        self.counter = counter
        self.watch(state.target_encoder, "target", None)
        self.watch(state.encoder, "context", "context backward")
        self.watch(state.predictor, "predictor", "predictor backward")

    def enter(self, part: str) -> None:
        self.counter.part = part

    def watch(self, module: nn.Module, name: str, backward: str | None) -> None:
        def after(_module: nn.Module, _args: Any, out: Tensor) -> None:
            self.enter("loss")
            if backward is not None:
                out.register_hook(lambda _gradient: self.enter(backward))

        module.register_forward_pre_hook(lambda *_: self.enter(f"{name} forward"))
        module.register_forward_hook(after)


def count(config: Config, micro_batch: int) -> Counter:
    """One update of `micro_batch` images."""
    masks = median_masks(config, micro_batch)
    state = build_state(config)
    patches, size = config.grid**2, config.data.image_size
    weights = [p for model in (state.encoder, state.predictor, state.target_encoder) for p in model.parameters()]
    counter = Counter(weights, squared_lengths(masks, micro_batch, patches))
    Marks(counter, state)
    images = torch.empty(micro_batch, size, size, 3, dtype=torch.uint8, device=META)
    batch = Batch(images, on_meta(masks), np.arange(micro_batch), step=0, last=True)
    loader = SimpleNamespace(micro_batches_per_step=1)
    run = Run(
        config=config,
        world=World(0, 1, META, "single"),
        masks=MultiBlockMasks(config.mask, config.grid, config.train.seed, micro_batch),
        data=SimpleNamespace(loader=loader),  # type: ignore[arg-type]
        state=state,
        encoder=state.encoder,
        predictor=state.predictor,
        schedule=optim.build_schedule(config.optim, 100),
        probe=None,
    )
    state.target_encoder.every_patch(images)  # made once, as the copies below; each update writes those anew
    for model in (state.encoder, state.predictor, state.target_encoder):
        for copies in model.kept_copies():
            copies.refresh()
    counter.part = "loss"
    with mock.patch.object(AdamWEMA, "step", count_update(counter)), counter:
        step.update(run, 0, iter([batch]))
    return counter


def summary(counter: Counter) -> dict[str, Any]:
    """The whole step, by part and by kind of operator."""
    parts, kinds = counter.by_part(), counter.by_kind()
    return {
        **asdict(counter.total()),
        "parts": {name: asdict(parts[name]) for name in sorted(parts)},
        "kinds": {name: asdict(kinds[name]) for name in sorted(kinds, key=lambda n: -kinds[n].other_bytes)},
    }


def load(path: Path, micro_batch: int, words: list[str]) -> Config:
    fixed = [f"optim.micro_batch={micro_batch}", f"optim.global_batch_size={micro_batch}", f"mask.group={micro_batch}"]
    return load_config(path, [*fixed, *words])[0]


def rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "step", result
    for group in ("parts", "kinds"):
        yield from result[group].items()


def table(result: dict[str, Any]) -> str:
    """GB, TFLOP, milliseconds."""
    units = {"other_bytes": 1e9, "product_bytes": 1e9, "attention_bytes": 1e9, "flops": 1e12}
    lines = [" " * 18 + "".join(f"{name:>16}" for name in COLUMNS)]
    for name, row in rows(result):
        cells = [f"{row[c] / units[c]:.2f}" if c in units else f"{row[c]:.4g}" for c in COLUMNS]
        lines.append(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def markdown(records: list[dict[str, Any]]) -> str:
    lines = [
        "# What a step asks of a GPU",
        "",
        "Counted without one by `python bench/traffic.py`, over one update of one micro-batch, eager, in bf16: see "
        "bench/harness/traffic.py for what counts. Not a measurement. *Predicted*: the sum of each operator's least "
        "time, its bytes at 3.0 TB/s or its FLOPs at 798 TFLOP/s (1,150 of e4m3), an H100's measured ceilings; "
        "launches are not in it.",
        "",
        "| model | images | record | commit | GB outside products and attention | launches | weight casts | host syncs "
        "| TFLOP | predicted ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for record in records:
            r = record["models"].get(model)
            if r is not None:
                lines.append(
                    f"| {model} | {r['micro_batch']} | {record['name']} | `{record['commit']}` "
                    f"| {r['other_bytes'] / 1e9:.1f} | {r['launches']} | {r['weight_casts']} | {r['host_syncs']} "
                    f"| {r['flops'] / 1e12:.1f} | {r['predicted_ms']:.1f} |"
                )
    for record in records:
        r = record["models"]["H/14"]
        lines += ["", f"H/14, {record['name']}, by part and by kind of operator:", "", "```", table(r), "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--micro-batch", type=int, default=128, help="images of the step")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--record", type=Path, help="count S, B, L, H and g, and write them here")
    parser.add_argument("--markdown", type=Path, help="make this of the records in the folder of the same name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.config is not None:
        result = summary(count(load(args.config, args.micro_batch, args.overrides), args.micro_batch))
        print(json.dumps(result) if args.json else table(result))
    if args.record is not None:
        models = {}
        for model, (name, batch) in MODELS.items():
            path = next((ROOT / "configs").glob(f"{name}_*.yaml"))
            models[model] = {"micro_batch": batch, **summary(count(load(path, batch, args.overrides), batch))}
        about = {"name": args.record.stem, "commit": commit(), "overrides": args.overrides, "torch": torch.__version__}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps({**about, "models": models}, indent=1) + "\n")
    if args.markdown is not None:
        files = sorted(args.markdown.with_suffix("").glob("*.json"), key=lambda path: int(path.stem.partition("_")[0]))
        records = [json.loads(path.read_text()) for path in files]
        args.markdown.write_text(markdown(records))


if __name__ == "__main__":
    main()
