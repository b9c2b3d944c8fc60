"""The whole training step and its parts, by each provider, on shared weights and one batch.

Only ours takes ragged masks. A ragged batch holds more tokens than a truncated one, so do not compare its images/s with
those of truncated masks.
"""
import statistics
from pathlib import Path

import pytest
import torch

from bench.baselines.gate import Gate
from bench.baselines.providers import PROVIDERS, Ours
from bench.harness import heap
from bench.harness.compare import Case, Variant
from bench.harness.machine import cores
from bench.harness.profiling import top_ops
from bench.harness.workload import IMAGE_SIZE, MODELS, Setup, write_photographs
from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import build_pipeline
from ijepa_fast.masks import MultiBlockMasks

SECONDS = {"cuda": 4.0, "cpu": 12.0}  # of sampling, a provider
# What matters most comes first, should the time run out.
CASES = [
    pytest.param(
        *(model, collate),
        id=f"{model}-{collate}",
        marks=[pytest.mark.gpu_only] * (MODELS[model].cpu_batch is None)
        + [pytest.mark.quick] * ((model, collate) == ("S16", "truncate")),
    )
    for collate in ("truncate", "ragged")
    for model in ("H14", "B16", "g16", "S16", "L16")
]


def step_case(model: str, collate: str, bench) -> Case:
    setup = Setup(MODELS[model], collate, bench.device, bench.released, compiled=bench.compiled)
    gate, flops = Gate(setup), setup.flops()
    providers = {}

    def variant(name: str) -> Variant:
        def prove() -> None:
            providers[name] = PROVIDERS[name](setup)
            gate(providers[name])

        def info(timing) -> dict:
            fields = {
                "images_per_s": setup.batch / timing.median,
                "tokens_per_s": setup.tokens() / timing.median,
                "parts": providers[name].marks.seconds(last=len(timing.samples)),
            }
            return fields | ({"profile": top_ops(providers[name].step, setup.device)} if bench.profile else {})

        def before() -> None:
            providers[name].before_step()

        return Variant(lambda: providers[name].step, gate=prove, graph=False, before=before, info=info)

    size = setup.model.size
    block = setup.batch * setup.model.grid**2, size.dim, size.mlp_dim
    if setup.device.type == "cuda":
        bench.ceilings.matmul_rate(*block, torch.float8_e4m3fn)  # for the record: the ceiling of an fp8 step
    shapes = {
        "model": setup.model.encoder,
        "patch_size": setup.model.patch_size,
        "batch": setup.batch,
        "collate": collate,
        "context": float(setup.lengths[0].mean()),
        "target": float(setup.lengths[1].mean()),
    }
    return Case(
        {name: variant(name) for name in PROVIDERS},
        shapes,
        setup.dtype,
        flops=flops.total,
        block=block,
        seconds=SECONDS[bench.device.type],
        info={"compiled": setup.compiled, "tokens": setup.tokens(), "flops_parts": flops._asdict()},
    )


def fed_case(model: str, bench, folder: Path) -> Case:
    """Our step behind the real loader, on JPEGs of ImageNet's usual size: how long it waits for data."""
    setup = Setup(MODELS[model], "truncate", bench.device)
    ours, waits = Ours(setup), []
    write_photographs(folder, "500x375", 2 * setup.batch)
    masks = MultiBlockMasks(MaskConfig(group=setup.batch), setup.model.grid, 0, setup.batch)
    loader = build_pipeline(
        DataConfig(root=folder, image_size=IMAGE_SIZE, threads=cores()),
        masks,
        micro_batch=setup.batch,
        index=build_index(folder, write_cache=False),
        device=bench.device,
    ).loader

    def make():
        batches = loader.batches(0, 1_000_000)

        def call() -> None:
            before = loader.wait_s
            batch = next(batches)
            waits.append(loader.wait_s - before)
            setup.images, setup.masks = batch.images, batch.masks
            ours.step()

        return call

    def info(timing) -> dict:
        wait = statistics.median(waits[-len(timing.samples) :])
        share = 100 * wait / timing.median
        return {"note": {"images/s": setup.batch / timing.median, "ms data wait": 1e3 * wait, "% of the step": share}}

    shapes = {"model": setup.model.encoder, "batch": setup.batch, "threads": cores()}
    variant = Variant(make, gate=lambda: Gate(setup)(ours), graph=False, info=info)
    return Case({"ours": variant}, shapes, setup.dtype, seconds=SECONDS[bench.device.type])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("model", "collate"), CASES)
def test_bench_step(bench, model, collate, provider):
    bench(lambda: step_case(model, collate, bench))
    if bench.device.type == "cpu":
        heap.enter("kept")


@pytest.mark.parametrize("model", ["S16", pytest.param("H14", marks=pytest.mark.gpu_only)])
def test_bench_step_with_loader(bench, model, tmp_path):
    bench(lambda: fed_case(model, bench, tmp_path))
