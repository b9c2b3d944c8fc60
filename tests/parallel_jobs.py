"""What the ranks of test_parallel*.py do: the command line, with a model whose shards are uneven and some empty."""
import copy
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from spoiled import spoil
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ijepa_fast import distributed, model, parallel, preemption, step
from ijepa_fast import evaluate as evaluation
from ijepa_fast import train as driver
from ijepa_fast.config import load_config
from ijepa_fast.data import index
from ijepa_fast.data.loader import Batch
from ijepa_fast.errors import UserError
from ijepa_fast.run import Run, build_run
from ijepa_fast.weights.init_from import init_from

# Contexts and targets of all lengths; 12 images a step make 12, 6, 4 or 3 a rank in micro-batches of 2 and fewer.
CONFIG = """
model: {name: vit_tiny, patch_size: 4, predictor_depth: 2, predictor_dim: 24}
mask: {sampler: corrected, collate: ragged, min_keep: 1}
data: {root: ROOT, image_size: 24, threads: 1, decoder: pillow}
optim: {global_batch_size: 12, micro_batch: 2, epochs: 4, epoch_length: 5, warmup_epochs: 1}
parallel: {cpu_threads: 1}
log: {every: 5, probe_every: 10, tensorboard: false, progress: false}
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def prepare() -> None:
    """An encoder whose MLP of 9 rows leaves 3, 3, 3, 0 to four ranks; one row each of mask token and positions.

    No pictures at the end: they take longer than the run.
    """
    driver.draw = lambda *arguments, **named: None
    model.SIZES["vit_tiny"] = model.Size(dim=24, depth=2, num_heads=3, mlp_dim=9)


def train(argv: list[str]) -> int:
    prepare()
    return driver.main(argv)


def train_with_own_words(argv: list[str], own: dict[int, list[str]]) -> int:
    return train([*argv, *own.get(int(os.environ["RANK"]), [])])


def evaluate(argv: list[str]) -> int:
    prepare()
    return evaluation.main(argv)


def train_on_full_disk(argv: list[str]) -> int:
    """Rank 1 cannot write a file beyond 10 kB: a shard is larger, all else it writes is not."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        return train(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def exit_on_rank_0(argv: list[str]) -> int:
    """An image that rank 0 alone has cannot be decoded, in step 3: it leaves, as a process of its own does."""
    update = driver.update

    def fail(run: Run, at: int, batches: Iterator[Batch]) -> Any:
        if run.world.is_main and at == 2:
            raise UserError("a photograph cannot be decoded")
        return update(run, at, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "update", fail)
        code = train(argv)
    if os.environ["RANK"] == "0":
        os._exit(code)
    return code


def train_until(argv: list[str], number: int, at_once: bool = True) -> int:
    """A SIGTERM comes to the last rank in the middle of that step; `at_once`: the ranks ask each other after each."""
    update = driver.update

    def update_under_signal(run: Run, at: int, batches: Iterator[Batch]) -> Any:
        if at + 1 == number and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, at, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "update", update_under_signal)
        if at_once:
            patch.setattr(preemption, "REACT_S", 0.0)
        return train(argv)


def vote(paces: list[float], wanted: int, most: int) -> tuple[list[int], int]:
    """The steps after which this rank asked, and that after which it left; rank 1 wants to leave from `wanted` on.

    A step takes rank r `paces[r]` seconds, by a clock of its own.
    """
    asked, now, largest = [], 0.0, distributed.World.largest
    with pytest.MonkeyPatch.context() as patch, distributed.join_replicas(1) as world:
        patch.setattr(preemption.time, "monotonic", lambda: now)
        patch.setattr(distributed.World, "largest", lambda *some: asked.append(done) or largest(*some))
        ask = preemption.Vote(world, 0, most)
        for done in range(1, 1000):
            now += paces[world.rank]
            if ask(done, world.rank == 1 and done >= wanted):
                return asked, done
    raise AssertionError("nobody left")


def train_spoiled(argv: list[str], rank: int, numbers: set[int]) -> tuple[int, int]:
    """That rank's loss is NaN in these steps. Exit code, and how many updates this rank's optimizer skipped."""
    optimizers, update = set(), driver.update

    def watched(run: Run, at: int, batches: Iterator[Batch]) -> Any:
        optimizers.add(run.state.optimizer)
        return update(run, at, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "update", watched)
        if int(os.environ["RANK"]) == rank:
            spoil(patch, numbers)
        code = train(argv)
    (optimizer,) = optimizers
    return code, int(optimizer.skipped)


def train_compiled(argv: list[str]) -> tuple[int, int]:
    """Graphs are captured as always, but run without the compiler, which takes minutes on a CPU: also their number."""
    compile_ = torch.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
        code = train(argv)
    return code, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train_watching_shards(argv: list[str]) -> tuple[int, int, int]:
    """Exit code; how often all parameters were shards, right after a loss or before an update; empty shards."""
    loss, update, seen = step.ijepa_loss, driver.update, []

    def look(models: list[nn.Module]) -> None:
        seen.append([p for model in models for p in model.parameters()])
        assert all(isinstance(p, DTensor) for p in seen[-1])

    def update_and_look(run: Run, at: int, batches: Iterator[Batch]) -> Any:
        look([run.state.encoder, run.state.predictor, run.state.target_encoder])  # the first time: after a probe
        return update(run, at, batches)

    def loss_and_look(*arguments: Any, **options: Any) -> torch.Tensor:
        value = loss(*arguments, **options)
        look(list(arguments[:3]))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "update", update_and_look)
        patch.setattr(step, "ijepa_loss", loss_and_look)
        code = train(argv)
    return code, len(seen), sum(p.to_local().numel() == 0 for p in seen[-1])


def count_scans(argv: list[str], cache: str) -> int:
    """How often this rank reads all image headers while a run is built, with nothing cached."""
    build, scans = index._build, []
    prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_build", lambda *arguments: scans.append(1) or build(*arguments))
        patch.setenv("XDG_CACHE_HOME", cache)
        config, _ = load_config(argv[1], argv[2:])
        with distributed.join(config) as world, build_run(config, world):
            pass
    return len(scans)


def start_from(argv: list[str]) -> tuple[str, dict[str, np.ndarray]]:
    """What train.init_from says, and all weights after it, whole."""
    prepare()
    config, _ = load_config(argv[1], argv[2:])
    with distributed.join(config) as world, build_run(config, world) as run:
        assert config.train.init_from is not None
        said = init_from(config.train.init_from, run.state, world)
        weights = {f"{part}.{name}": x for part, held in run.state.weights().items() for name, x in held.items()}
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}
        return said, {name: x.numpy() for name, x in whole.items()}


def shard_giant(config_file: str, words: list[str]) -> list[tuple[int, int, bool]]:
    """Context encoder, predictor, target encoder on the meta device: parameters, FSDP groups, all of them shards?"""
    config, _ = load_config(config_file, words)
    with distributed.join(config) as world:
        with torch.device("meta"):
            models = [model.build_encoder(config.model.name, image_size=config.data.image_size, patch_size=16)]
            models += [model.build_predictor(models[0], depth=config.model.predictor_depth, dim=384)]
            models += [copy.deepcopy(models[0]).requires_grad_(False)]
        for part in models:
            parallel.parallelize(part, config, world, trained=part is not models[2])
        return [
            (
                sum(p.numel() for p in part.parameters()),
                sum(isinstance(module, FSDPModule) for module in part.modules()),
                all(isinstance(p, DTensor) for p in part.parameters()),
            )
            for part in models
        ]


def train_wide(argv: list[str]) -> list[float]:
    """Losses of three updates of a giant of two blocks; nothing is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "vit_giant", model.SIZES["vit_giant"]._replace(depth=2))
        config, _ = load_config(argv[1], argv[2:])
        with distributed.join(config) as world, build_run(config, world) as run:
            batches = run.data.loader.batches(0, 3)
            return [float(driver.update(run, number, batches).loss) for number in range(3)]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, whole, however many ranks wrote it."""
    path = max((run_folder / "checkpoints").glob("step_*"))
    reader = dcp.HuggingFaceStorageReader(str(path))
    held = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.full(tuple(about.size), float("nan")) for name, about in held.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
