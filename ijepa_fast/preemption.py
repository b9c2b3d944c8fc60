"""Preemption: a signal asks a run to finish its step, save and leave; a second one of the same kind ends it at once.

Ctrl-C (SIGINT) ends the run, and so do SIGTERM, SIGUSR1 and SIGUSR2, by which SLURM announces preemption or the time
limit. Under `ijepa_fast.launch` these three also put the job back into the queue (`requeue`).
"""
import os
import signal
from types import FrameType
from typing import Any

_REQUEUEING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Until `close`, a signal sets `requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._last: int | None = None
        self._before: dict[int, Any] = {n: signal.signal(n, self._request) for n in (signal.SIGINT, *_REQUEUEING)}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested, self._last = True, number
        signal.signal(number, self._before[number])
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving (again: leave now)\n".encode())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requeue(self) -> None:
        """After saving and `close`: submitit, if it runs this job, puts it back into the queue on SIGUSR2."""
        if self._last in _REQUEUEING and callable(self._before[signal.SIGUSR2]):
            os.kill(os.getpid(), signal.SIGUSR2)
