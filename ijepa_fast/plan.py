"""What a config needs and how fast it may go on N GPUs, on paper.

    python -m ijepa_fast.plan --config configs/vitg16_in22k.yaml --gpus 64 --gpu h100

Memory is counted tensor by tensor from what the code keeps (the terms of `memory`), and a test checks it against a real
run. Time is a model, and its results are predictions: matrix products at `--mfu` of the GPU's dense bf16 peak (in e4m3
of twice that), beside traffic at the link's bandwidth, the longer of the two. FLOPs are those of `flops`, lengths those
of the real masks.

Bytes that a rank sends in an update, for P parameters and W ranks (Rajbhandari et al., ZeRO, arXiv 1910.02054): ddp
reduces gradients once, 2 * 4P * (W-1)/W. fsdp gathers the target once a micro-batch and the trained models twice,
2P * (W-1)/W each, and scatters fp32 gradients once, 4P * (W-1)/W. hsdp does that in a node of S, at
its link's bandwidth, and reduces the shards' gradients over R nodes, 2 * 4P/S * (R-1)/R.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["plan", *sys.argv[1:]]))

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from ijepa_fast import arguments
from ijepa_fast.blocks import Block
from ijepa_fast.cli import command
from ijepa_fast.config import Config, load_config
from ijepa_fast.errors import UserError
from ijepa_fast.flops import PEAKS, step_flops
from ijepa_fast.fp8 import SCALES
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.model import Size
from ijepa_fast.run import draw_models

KNOWN_IMAGES = {"imagenet-1k": 1_281_167, "imagenet-22k": 14_197_122}  # by a part of data.root
RESERVED = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, fragmentation. An assumption


class Gpu(NamedTuple):
    """Vendor's figures: memory in GiB, dense bf16 TFLOP/s, GB/s of one direction within a node and to the network."""

    memory: float
    tflops: float
    node_link: float
    network: float


# NVIDIA's data sheets (SXM boards, dense rates) and the network of its DGX systems: one 200 or 400 Gb/s port a GPU.
GPUS = {
    "a100": Gpu(80, PEAKS["A100"] / 1e12, 300, 25),
    "h100": Gpu(80, PEAKS["H100"] / 1e12, 450, 50),
    "h200": Gpu(141, PEAKS["H200"] / 1e12, 450, 50),
    "b200": Gpu(180, PEAKS["B200"] / 1e12, 900, 50),
}
NODE = 8  # GPUs
STEPS = 32  # whose masks give the mean lengths


@dataclass(frozen=True)
class Model:
    """What memory and time depend on, read off models on the meta device and masks as they are drawn."""

    encoder: Size
    predictor: Size
    patches: int
    encoder_parameters: int
    predictor_parameters: int
    block_parameters: int  # of one encoder block, the largest group that is gathered at once
    context: float  # tokens an image
    target: float  # predicted rows an image
    covered: float  # patches an image that they are predictions of, each once
    predicted_from: float  # tokens an image in the predictor: contexts, repeated for each target, and mask tokens
    flops_target: float  # an image, forward
    flops_trained: float  # an image, forward and backward of context encoder and predictor
    flops_e4m3: float  # of flops_target, those of products in e4m3
    image_bytes: int

    @property
    def trained(self) -> int:
        return self.encoder_parameters + self.predictor_parameters

    def flops(self, checkpointing: str) -> float:
        """Of an image, as computed: full checkpointing repeats a forward of a third of `flops_trained`."""
        return self.flops_target + self.flops_trained * (4 / 3 if checkpointing == "full" else 1)

    def bf16_flops(self, checkpointing: str) -> float:
        """As many in bf16 as take the same time: the peak of e4m3 is twice as high."""
        return self.flops(checkpointing) - self.flops_e4m3 / 2


def e4m3_flops(config: Config, size: Size, patches: int, covered: float) -> float:
    """Of an image's target forward, those that `model.target_dtype` computes in e4m3, by the table of `fp8`."""
    if config.model.target_dtype != "fp8":
        return 0.0
    qkv = 2 * 3 * size.dim**2 if SCALES["qkv"] else 0  # a token, as the next
    mlp = 2 * size.dim * size.mlp_dim * sum(SCALES[name] is not None for name in ("fc1", "fc2"))
    inner = (size.depth - 2) * patches * (qkv + mlp)
    if config.model.fp8_blocks == "inner":
        return inner
    return inner + patches * (qkv + mlp) + patches * qkv + covered * mlp  # the last block finishes `covered`


def describe(config: Config) -> Model:
    """The model and the mean token counts of a config, from the masks of some of its steps."""
    with torch.device("meta"):
        encoder, predictor = draw_models(config, torch.device("meta"))
    sampler = MultiBlockMasks(config.mask, config.grid, config.train.seed, config.optim.global_batch_size)
    images = min(config.optim.global_batch_size, 256)
    sums = np.zeros(6)
    for step in range(STEPS):
        masks = sampler.sample(step, 0, images)
        context, target = (packed.cu_seqlens.diff().numpy() for packed in (masks.context, masks.target))
        context_of = masks.context_of.numpy()
        assert masks.covered is not None
        covered = len(masks.covered.rows)
        flops = step_flops(
            encoder.size,
            predictor.size,
            config.model.patch_size,
            images=images,
            patches=config.grid**2,
            context_lengths=context,
            target_lengths=target,
            context_of=context_of,
            covered=covered,
        )
        predicted_from = context[context_of].sum() + target.sum()
        trained = flops.context + flops.predictor
        sums += context.sum(), target.sum(), covered, predicted_from, flops.target, trained
    context, target, covered, predicted_from, flops_target, flops_trained = sums / (STEPS * images)
    return Model(
        encoder=encoder.size,
        predictor=predictor.size,
        patches=config.grid**2,
        encoder_parameters=_parameters(encoder),
        predictor_parameters=_parameters(predictor),
        block_parameters=_parameters(next(part for part in encoder.modules() if isinstance(part, Block))),
        context=context,
        target=target,
        covered=covered,
        predicted_from=predicted_from,
        flops_target=flops_target,
        flops_trained=flops_trained,
        flops_e4m3=e4m3_flops(config, encoder.size, config.grid**2, covered),
        image_bytes=3 * config.data.image_size**2,
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Memory(NamedTuple):
    """Bytes of one GPU, by what they are for."""

    weights: float
    target: float
    gradients: float
    optimizer: float
    copies: float  # of weights in the compute dtype, or gathered from other ranks
    activations: float
    data: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    model: Model,
    strategy: str,
    shards: int,
    micro_batch: int,
    checkpointing: str,
    *,
    accumulates: bool,
    compute: int,
    residual: int = 4,
    target: int | None = None,
) -> Memory:
    """The peak of an update, at the turn from forward to backward of its last micro-batch.

    `shards`: ranks that share one copy (1 for single and ddp). `compute`, `residual`: bytes of a number in matrix
    products and in the residual stream; `target`: in the target encoder's products, if others. `accumulates`: there are
    earlier micro-batches, whose gradients are there, and under fsdp whole, since they are reduced with the last one's.
    """
    sharded = strategy in ("fsdp", "hsdp")
    if sharded:
        # Two neighbouring blocks are whole at a time, one being used and one being fetched.
        copies = 2 * compute * model.block_parameters + 2 * 4 * model.block_parameters  # and their gradients, in fp32
    else:
        copied = [(model.trained, compute), (model.encoder_parameters, target or compute)]
        copies = sum(number * size for number, size in copied if size < 4)
    activations = (
        micro_batch * model.context * _kept(model.encoder, checkpointing, compute, residual)
        + micro_batch * model.predicted_from * _kept(model.predictor, checkpointing, compute, residual)
        + micro_batch * model.covered * model.encoder.dim * 4  # target features
        + micro_batch * model.target * model.encoder.dim * (2 * compute + 4)  # predictions, their gradient, normed rows
    )
    return Memory(
        weights=4 * model.trained / shards,
        target=4 * model.encoder_parameters / shards,
        gradients=4 * model.trained / (1 if accumulates else shards),
        optimizer=8 * model.trained / shards,
        copies=copies,
        activations=activations,
        data=4 * micro_batch * model.image_bytes,  # one in use, two ready, one in the making
    )


def _kept(size: Size, checkpointing: str, compute: int, residual: int) -> float:
    """Bytes a token that all blocks of a transformer keep for the backward."""
    dim, mlp = size.dim, size.mlp_dim
    stream = 2 * residual * dim  # inputs of the two norms
    # qkv, attention's result, and its log-sum-exp in fp32; what the first and the last layer of the MLP read.
    products = compute * (3 * dim + dim + mlp) + 4 * size.num_heads
    cheap = compute * (dim + dim + mlp)  # results of the two norms and of GELU
    every = stream + products + cheap
    if checkpointing == "none":
        return size.depth * every
    if checkpointing == "selective":
        # Also kept are the results of proj and fc2, which nothing else would need; the block's input, not the middle.
        return size.depth * (residual * dim + products + 2 * compute * dim) + (cheap + residual * dim)
    return size.depth * residual * dim + every


@dataclass(frozen=True)
class Plan:
    """One strategy on N GPUs, with the largest micro-batch that fits. Seconds, images/s and days are predictions."""

    strategy: str
    checkpointing: str
    gpus: int
    micro_batch: int
    fits: bool  # else the figures are those of micro_batch 1
    memory_gib: dict[str, float]  # of one GPU
    gflop_image: float
    compute_s: float  # of an update
    communication_s: float
    communication_gb: float  # that a rank sends in an update
    images_s: float
    days: float | None


def plan(
    config: Config, model: Model, gpu: Gpu, gpus: int, strategy: str, checkpointing: str, mfu: float, images: int | None
) -> Plan:
    """What `strategy` does at its best on `gpus` GPUs; `images` (of the training set) gives the days of the recipe."""
    batch = config.optim.global_batch_size
    share, room = batch // gpus, gpu.memory * 2**30 * (1 - RESERVED)
    shards = {"fsdp": gpus, "hsdp": min(config.parallel.shard_size or NODE, gpus)}.get(strategy, 1)
    residual = 2 if config.model.residual_dtype == "bfloat16" else 4
    compute = 4 if config.model.compute_dtype == "float32" else 2

    def need(micro_batch: int) -> Memory:
        return memory(
            model,
            strategy,
            shards,
            micro_batch,
            checkpointing,
            accumulates=micro_batch < share,
            compute=compute,
            residual=residual,
            target=1 if config.model.target_dtype == "fp8" else None,
        )

    fitting = [n for n in range(1, share + 1) if share % n == 0 and need(n).total <= room]
    micro_batch = max(fitting, default=1)
    needed = need(micro_batch)
    compute_s = share * model.bf16_flops(checkpointing) / (gpu.tflops * 1e12 * mfu)
    sent, communication_s = communication(model, gpu, gpus, shards, strategy, share // micro_batch)
    images_s = batch / max(compute_s, communication_s)
    return Plan(
        strategy=strategy,
        checkpointing=checkpointing,
        gpus=gpus,
        micro_batch=micro_batch,
        fits=bool(fitting),
        memory_gib={name: value / 2**30 for name, value in {**needed._asdict(), "total": needed.total}.items()},
        gflop_image=model.flops("none") / 1e9,
        compute_s=compute_s,
        communication_s=communication_s,
        communication_gb=sent / 1e9,
        images_s=images_s,
        days=None if images is None else config.optim.epochs * (images // batch) * batch / images_s / 86400,
    )


def communication(
    model: Model, gpu: Gpu, gpus: int, shards: int, strategy: str, micro_batches: int
) -> tuple[float, float]:
    """Bytes that a rank sends in an update, and the seconds that takes (see the module's head)."""

    def link(ranks: int) -> float:
        return 1e9 * (gpu.node_link if ranks <= NODE else gpu.network)

    def part(ranks: int) -> float:
        return (ranks - 1) / ranks

    gradients = 4 * model.trained
    if strategy == "single" or gpus == 1:
        return 0.0, 0.0
    if strategy == "ddp":
        sent = 2 * gradients * part(gpus)
        return sent, sent / link(gpus)
    gathers = 2 * (model.encoder_parameters + 2 * model.trained) * micro_batches  # bfloat16
    sent = (gathers + gradients) * part(shards)
    seconds = sent / link(shards)
    if shards < gpus:
        across = 2 * gradients / shards * part(gpus // shards)
        sent, seconds = sent + across, seconds + across / (1e9 * gpu.network)
    return sent, seconds


def strategies(gpus: int) -> list[str]:
    if gpus == 1:
        return ["single"]
    return ["ddp", "fsdp", *(["hsdp"] if gpus > NODE else [])]


def draw(config: Config, model: Model, gpu: Gpu, name: str, mfu: float, out: Path) -> None:
    """images/s against the number of GPUs, 8 to 1024, of every strategy that fits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    counts = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024) if config.optim.global_batch_size % n == 0]
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axis = figure.subplots()
    ideal = gpu.tflops * 1e12 * mfu / model.bf16_flops("none")
    axis.plot(counts, [n * ideal for n in counts], "--", color="#999999", label="no communication, no recomputation")
    for strategy, marker in (("ddp", "o"), ("fsdp", "s"), ("hsdp", "^")):
        best = []
        for n in counts:
            plans = [
                plan(config, model, gpu, n, strategy, checkpointing, mfu, None)
                for checkpointing in ("none", "selective", "full")
                if strategy in strategies(n)
            ]
            best.append(max((p.images_s for p in plans if p.fits), default=float("nan")))
        if not all(map(math.isnan, best)):
            axis.plot(counts, best, marker=marker, label=strategy)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(counts, map(str, counts))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_xlabel("GPUs")
    axis.set_ylabel("images/s, predicted")
    batch = config.optim.global_batch_size
    axis.set_title(f"{config.model.name}, batch {batch}, {name.upper()}, {mfu:.0%} of peak assumed")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(out)


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments.plan(argv)
    config, _ = load_config(args.config, args.overrides)
    batch = config.optim.global_batch_size
    if args.gpus < 1 or batch % args.gpus:
        raise UserError(f"optim.global_batch_size {batch} does not divide among {args.gpus} GPUs")
    if args.images is not None and args.images < batch:
        raise UserError(f"--images={args.images} is fewer than one global batch of {batch}")
    if config.model.target_dtype == "fp8" and args.gpu == "a100":
        raise UserError("model.target_dtype=fp8 needs a GPU with products of e4m3, and --gpu=a100 has none")
    known = (count for name, count in KNOWN_IMAGES.items() if name in str(config.data.root))
    images = args.images or next(known, None)
    model, gpu = describe(config), GPUS[args.gpu]
    plans = [
        plan(config, model, gpu, args.gpus, strategy, checkpointing, args.mfu, images)
        for strategy in strategies(args.gpus)
        for checkpointing in ("none", "selective", "full")
    ]
    if args.out:
        draw(config, model, gpu, args.gpu, args.mfu, args.out)
    if args.json:
        print(json.dumps([asdict(p) for p in plans], indent=1))
        return
    console = Console(highlight=False, markup=False)
    tokens = f"{model.context:.0f} context and {model.target:.0f} target tokens"
    console.print(
        f"{config.model.name}/{config.model.patch_size} at {config.data.image_size} px on {args.gpus} x {args.gpu}: "
        f"{model.encoder_parameters / 1e6:.0f} M + {model.predictor_parameters / 1e6:.0f} M parameters; "
        f"an image is {model.flops('none') / 1e9:.0f} GFLOP, {tokens}"
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("strategy, keeps", no_wrap=True, min_width=16)
    for column in ("batch", "GiB", "model", "acts", "calc", "comm", "images/s", "days"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in plans:
        held = p.memory_gib["total"] - p.memory_gib["activations"] - p.memory_gib["data"]
        table.add_row(
            f"{p.strategy}, {p.checkpointing}",
            str(p.micro_batch) if p.fits else "-",
            f"{p.memory_gib['total']:.1f}",
            f"{held:.1f}",
            f"{p.memory_gib['activations']:.1f}",
            f"{p.compute_s:.2f}",
            f"{p.communication_s:.2f}",
            f"{p.images_s:.0f}" if p.fits else "-",
            f"{p.days:.1f}" if p.fits and p.days else "-",
        )
    console.print(table)
    console.print(
        f"batch: the largest micro-batch that fits in {1 - RESERVED:.0%} of {gpu.memory:.0f} GiB. GiB: of a GPU, of "
        f"them model and activations. calc, comm: seconds that an update takes to compute and to send. These, images/s "
        f"and days are predictions: products at {args.mfu:.0%} of {gpu.tflops:.0f} TFLOP/s"
        f"{', those in e4m3 of twice that' if model.flops_e4m3 else ''}, links of "
        f"{gpu.node_link:.0f} GB/s in a node and {gpu.network:.0f} between nodes, the longer of the two."
    )
