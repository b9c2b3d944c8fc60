"""What is said at both ends of a run: the machine and the versions at its start, the last figures in summary.json."""
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.config import Config
from ijepa_fast.distributed import World
from ijepa_fast.durable import write_durably
from ijepa_fast.metrics import read_log
from ijepa_fast.threads import torch_threads
from ijepa_fast.version import __version__


def environment(config: Config, world: World) -> str:
    """One line: device, threads and where their number comes from, versions, seed."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world.device.type == "cuda":
        device = f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    else:
        threads, because = torch_threads(config.parallel.cpu_threads, processes)
        each = f"{world.size} processes, each " if world.size > 1 else ""
        device = f"cpu, {each}{threads} thread{'s' * (threads != 1)} ({because})"
    return (
        f"{device}; ijepa_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{world.strategy}, seed {config.train.seed}"
    )


def write_summary(folder: Path, total_steps: int, checkpoint: Path) -> dict[str, Any] | None:
    """Write summary.json from the log: the last figures of a run, or of the part of it that is done.

    `seconds`: of the updates alone, over all processes in a row that made them. `loss` is the last one that was finite,
    `probe` the last one, each None where there was none; `skipped` counts the losses that were not finite. Without a
    row there is no summary.
    """
    steps, probes = read_log(folder)
    if not steps:
        return None
    last, losses = steps[-1], [row["loss"] for row in steps if row["loss"] is not None]
    summary = {
        "finished": last["step"] == total_steps,
        "step": last["step"],
        "total_steps": total_steps,
        "epoch": last["epoch"],
        "loss": losses[-1] if losses else None,
        "skipped": len(steps) - len(losses),
        "images/s": last["images/s"],
        "seconds": round(sum(row["time (ms)"] for row in steps) / 1000, 1),
        "probe": {key: value for key, value in probes[-1].items() if key != "kind"} if probes else None,
        "checkpoint": str(checkpoint.relative_to(folder)),
        "ijepa_fast": __version__,
        "torch": torch.__version__,
    }
    write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def last_line(summary: dict[str, Any]) -> str:
    seconds, loss = round(summary["seconds"]), summary["loss"]
    line = (
        f"{summary['step']} of {summary['total_steps']} steps in {seconds // 3600}:{seconds // 60 % 60:02d}:"
        f"{seconds % 60:02d}: loss {'never finite' if loss is None else f'{loss:.4f}'}, "
        f"{summary['images/s']:.1f} images/s"
    )
    if summary["skipped"]:
        line += f", {summary['skipped']} update{'s' * (summary['skipped'] != 1)} skipped"
    probe = summary["probe"] or {}
    if "rankme" in probe:
        line += f", RankMe {probe['rankme']:.1f}"
    if "knn" in probe:
        line += f", k-NN {probe['knn']:.1%}"
    return line
