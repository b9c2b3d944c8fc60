"""Signals that ask a run to finish its step, save and leave; a second one of the same kind ends it at once.

Ctrl-C (SIGINT) and SIGTERM end the run. SIGUSR1 and SIGUSR2 are how SLURM announces preemption or the time limit: under
`ijepa_fast.launch`, `pass_on` then hands them to submitit, which puts the job back into the queue.
"""
import os
import signal
from types import FrameType

_ENDING, _REQUEUEING = (signal.SIGINT, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """From its making until `close`, a signal sets `requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._last: int | None = None
        self._before = {number: signal.signal(number, self._request) for number in _ENDING + _REQUEUEING}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested, self._last = True, number
        self.close()
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving (again: leave now)\n".encode())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """After saving and `close`: repeat a signal that whoever started this process waits for."""
        if self._last in _REQUEUEING and callable(self._before[self._last]):
            os.kill(os.getpid(), self._last)
