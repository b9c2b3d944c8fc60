"""Processes that stay: ranks which import torch once and then run one job after another, as torchrun would start them.

`Ranks.run(4, function, *arguments)` calls the function in four processes at once, with the environment of ranks 0 to 3
of a job of their own, and returns what came of it in each.
"""
import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

PATIENCE_S = 400  # for one job, import of torch on a busy machine included


class Left(NamedTuple):
    """What a job left behind in one rank: the function's result (None where it raised), and what it printed."""

    result: Any
    out: str
    err: str


DIED = Left(None, "", "")


class Ranks:
    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._processes: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Left]:
        """`function` has to be importable; its processes keep what it changes in their modules."""
        while len(self._processes) < size:
            here, there = self._spawn.Pipe()
            process = self._spawn.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._processes.append((process, here))
        chosen = self._processes[:size]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, (_, pipe) in enumerate(chosen):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            pipe.send(({k: str(v) for k, v in environment.items()}, function, arguments))
        late = [rank for rank, (_, pipe) in enumerate(chosen) if not pipe.poll(PATIENCE_S)]
        if late:
            others = [Left(*pipe.recv()) for rank, (_, pipe) in enumerate(chosen) if rank not in late]
            self.close()
            raise AssertionError(f"ranks {late} hang; of the others is left {others}")
        left = []
        for _, pipe in chosen:
            try:
                left.append(Left(*pipe.recv()))
            except EOFError:
                left.append(DIED)
        if DIED in left:
            self.close()
        return left

    def close(self) -> None:
        for process, _ in self._processes:
            process.kill()
            process.join()
        self._processes.clear()


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.distributed as dist

    while True:
        environment, function, arguments = pipe.recv()
        os.environ.update(environment)
        with _printed() as printed:
            try:
                result = function(*arguments)
            except BaseException:
                traceback.print_exc()
                result = None
            # As at the end of a process, which is what a job is elsewhere.
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send((result, *printed))


@contextlib.contextmanager
def _printed():
    """What is written to stdout and stderr inside, by C++ too: a list of the two texts, once it is left."""
    texts: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
