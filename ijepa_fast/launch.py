"""Run on a SLURM cluster, through submitit: one process a GPU, requeued and resumed after preemption or a time limit.

    python -m ijepa_fast.launch --nodes 8 --gpus-per-node 8 --partition P --config configs/vitg16_in22k.yaml

SLURM warns the job 90 s before it ends it. The run then finishes its step and saves (see `preemption`), submitit puts
the job back into the queue, and it goes on from the latest checkpoint.
"""
from __future__ import annotations

import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["launch", *sys.argv[1:]]))

import os
from pathlib import Path
from typing import Any

from ijepa_fast import arguments, compat, train
from ijepa_fast.cli import command
from ijepa_fast.config import find_config, load_config
from ijepa_fast.errors import UserError

try:
    import submitit
except ImportError:  # of the extra `slurm`
    submitit = None  # type: ignore[assignment]

REQUEUES = 1000  # time limits a job may run into; a long recipe on a short queue needs many


class Task:
    """What each process of the job runs. submitit pickles it, and calls `checkpoint` to learn what to requeue."""

    def __init__(self, arguments: list[str], run_folder: Path, requeued: bool = False):
        self.arguments, self.run_folder, self.requeued = arguments, run_folder, requeued

    def __call__(self) -> None:
        # All GPUs of the node stay visible: a process takes the one of its local rank.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        arguments = list(self.arguments)
        # SLURM also starts a job again by itself, without asking submitit, when a node dies.
        again = self.requeued or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        if again and (self.run_folder / "config.yaml").exists() and "--resume" not in arguments:
            arguments.append("--resume")
        if code := train.main(arguments):
            raise SystemExit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(Task(self.arguments, self.run_folder, requeued=True))


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments.launch(argv)
    if submitit is None:
        raise UserError("launching needs submitit, the extra `slurm`: pip install 'ijepa_fast[slurm]'")
    config, _ = load_config(args.config, args.overrides)
    for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "hours"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    processes, batch = args.nodes * args.gpus_per_node, config.optim.global_batch_size
    if batch % processes:
        raise UserError(f"optim.global_batch_size {batch} does not divide among {processes} GPUs")
    more = dict(option.partition("=")[::2] for option in args.sbatch)
    if not all(more.values()):
        raise UserError(f"--sbatch takes KEY=VALUE, not {next(key for key, value in more.items() if not value)}")

    options: dict[str, Any] = {
        "job_name": config.train.folder.name,
        "nodes": args.nodes,
        "ntasks_per_node": args.gpus_per_node,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_gpu,
        "time": max(1, round(60 * args.hours)),
        "srun_args": ["--kill-on-bad-exit=1"],  # a process that fails ends the others
        "additional_parameters": {"requeue": True, **more},
    }
    if args.partition:
        options["partition"] = args.partition
    folder = config.train.folder.absolute() / "slurm"
    if args.print:
        print(compat.sbatch_script(folder, **options))
        return

    words = ["--config", str(find_config(args.config).absolute()), *args.overrides]
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=REQUEUES)
    except RuntimeError:
        raise UserError("there is no srun here: call this on a login node of the cluster, or add --print") from None
    executor.update_parameters(**options)
    words += ["--resume"] if args.resume else []
    job = executor.submit(Task(words, config.train.folder.absolute()))
    print(f"job {job.job_id} submitted; its log: {job.paths.stdout}")
