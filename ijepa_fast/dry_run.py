"""`train --dry-run`: memory and time of two micro-batches and one update on the real data; writes nothing."""
import contextlib
import time

import torch
from rich.console import Console

from ijepa_fast.checkpoint import Checkpoints
from ijepa_fast.data.loader import READ_AHEAD_BYTES
from ijepa_fast.memory import memory_advice, peak_memory
from ijepa_fast.optim import set_rates
from ijepa_fast.remarks import remarks
from ijepa_fast.run import Run
from ijepa_fast.step import backward
from ijepa_fast.summary import environment
from ijepa_fast.weights.init_from import init_from


def dry_run(run: Run, console: Console, *, resume: bool = False, extend: bool = False) -> None:
    config, device, loader = run.config, run.world.device, run.data.loader
    data = run.data.source.index.fingerprint()
    checkpoints = Checkpoints(config.train.folder, config.train.keep_last, run.world, data)
    with contextlib.closing(checkpoints):
        checkpoints.check_folder(config, resume, extend=extend)
        if resume and (found := checkpoints.resume(run.state, console.print)):
            console.print(f"would go on from {found[1]}")
        elif config.train.init_from is not None:
            init_from(config.train.init_from, run.state, run.world)
    console.print(environment(config, run.world))
    for remark in remarks(config, run.schedule.steps_per_epoch, run.world.device.type):
        console.print(f"note: {remark}")
    batches = loader.batches(0, 2)
    set_rates(run.state.optimizer, run.schedule, 0)
    times = []
    with memory_advice(config.optim.micro_batch):
        if run.graphed is not None:
            run.graphed.zero()
        for last in (False, True):
            batch = next(batches)
            for image in batch.bad:
                console.print(f"bad image {image}")
            for _ in range(1 if run.graphed is None else 2):  # a size that is new is captured first
                begin = _now(device)
                backward(run, batch._replace(last=last), run.loss_denominator(0))
                times.append(_now(device) - begin)
        begin = _now(device)
        run.state.update(run.schedule.momentum(0), keep_gradients=run.graphed is not None)
        rest = _now(device) - begin
    first, second = times[0], times[-1]
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (run.state.encoder, run.state.predictor)]
    parts, ipe = loader.micro_batches_per_step, run.schedule.steps_per_epoch
    console.print(f"models       {config.model.name}, {millions[0]:.1f} M parameters; predictor, {millions[1]:.1f} M")
    console.print(f"data         {len(run.data.source.index)} images; {ipe} steps an epoch, {run.total_steps} in all")
    console.print(f"read ahead   at most {READ_AHEAD_BYTES >> 20} MiB of encoded images, or one micro-batch")
    console.print(f"micro-batch  {config.optim.micro_batch} images: {second:.2f} s (the first one {first:.2f} s)")
    console.print(f"update       {rest:.2f} s; a step of {parts} micro-batches about {parts * second + rest:.2f} s")
    console.print(f"memory       {peak_memory(device, reserved=run.graphed is not None) / 2**30:.2f} GiB at the peak")
    console.print("Dry run: nothing was written.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
