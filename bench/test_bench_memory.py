"""The peak memory of a step: what lives from step to step, and the most that a step holds beyond it.

One provider after the other is built, checked by the gate of the step suite, observed during one step, and freed. The
time in a row is that of the observed step, which the observing slows down: it does not measure speed.
"""
import time

import pytest

from bench.baselines.gate import Gate
from bench.baselines.providers import PROVIDERS
from bench.harness.compare import Case, Variant, observe
from bench.harness.profiling import peak_bytes
from bench.harness.workload import MODELS, Setup

MODEL = [
    pytest.param(name, marks=[pytest.mark.gpu_only] * (MODELS[name].cpu_batch is None))
    for name in ("H14", "B16", "g16", "S16", "L16")
]


def memory_case(model: str, collate: str, bench) -> Case:
    setup = Setup(MODELS[model], collate, bench.device, bench.released, compiled=bench.compiled)
    gate = Gate(setup)

    def follow(name: str) -> dict:
        provider = PROVIDERS[name](setup)
        gate(provider)
        started = time.perf_counter()
        peak = peak_bytes(provider.step, setup.device)
        seconds = time.perf_counter() - started
        persistent = provider.persistent_bytes()
        return {"peak_bytes": persistent + peak, "persistent_bytes": persistent, "seconds": {"median": seconds}}

    shapes = {"model": setup.model.encoder, "batch": setup.batch, "collate": collate}
    return Case({name: Variant(lambda name=name: follow(name)) for name in PROVIDERS}, shapes, setup.dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("model", MODEL)
def test_bench_memory(bench, model, collate, provider):
    bench(lambda: memory_case(model, collate, bench), observe)
