"""Under torchrun: train, and one rank kills itself. `killed_rank.py (step N | load | save N) RANK --config ...`"""
import os
import signal
import sys
import time

import parallel_jobs as jobs
import torch.distributed.checkpoint as dcp

from ijepa_fast import step as step_module
from ijepa_fast import train


def die(*arguments, **keywords) -> None:
    print(f"killing itself at {time.time()}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


when, _, number = sys.argv[1].partition(" ")
if int(os.environ["RANK"]) == int(sys.argv[2]):
    update, backward = train.update, step_module.backward
    if when == "load":
        dcp.load = die
    elif when == "save":
        # The writer's thread dies with its shard half way, while the main thread goes on with the next steps.
        save = dcp.save

        def die_in_writer(state, *, storage_writer, **keywords):
            if str(storage_writer.path).endswith(number.zfill(8)):
                storage_writer.write_data = die
            return save(state, storage_writer=storage_writer, **keywords)

        dcp.save = die_in_writer
    else:
        # Between the backward of a micro-batch and the next, at which the others wait for it.
        def die_in_step(run, step, batches):
            if step + 1 == int(number):
                step_module.backward = lambda *some: (backward(*some), die())
            return update(run, step, batches)

        train.update = die_in_step

sys.exit(jobs.train(sys.argv[3:]))
