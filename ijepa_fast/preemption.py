"""Preemption: a signal asks a run to finish its step, save and leave; a second one of the same kind ends it at once.

Ctrl-C (SIGINT), SIGTERM and SIGHUP (the terminal is gone) end the run, and so do SIGUSR1 and SIGUSR2, by which SLURM
announces preemption or the time limit. Under `ijepa_fast.launch` SIGTERM and these two also put the job back into the
queue (`requeue`).
"""
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ijepa_fast.distributed import World

_REQUEUEING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Of these a second one of the same kind ends the process. Not of another kind: at Ctrl-C torchrun sends its processes
# SIGTERM after the terminal's SIGINT, and SLURM sends SIGTERM some time after the warning.
_ENDING = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 30.0  # for data, once a signal has come: a read from a dead mount never returns
REACT_S = 2.0  # at most, about, from a signal that came to one rank to the last step of all

T = TypeVar("T")


class NoDataError(Exception):
    """A signal had come, and the step that it waits for has waited for its images too long."""


class StopSignal:
    """Until `close`, a signal sets `requested`. `saved`: says in a few words what a run that ends now leaves behind."""

    def __init__(self, saved: Callable[[], str] = lambda: "--resume goes on from the last checkpoint") -> None:
        self.requested = False
        self._saved, self._last, self._waiting = saved, 0, False
        self._seen: set[int] = set()
        handled = [signal.SIGINT, *_REQUEUEING]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
            handled.append(signal.SIGHUP)
        self._before: dict[int, Any] = {n: signal.signal(n, self._request) for n in handled}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)

    def _request(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, self.requested
        if number in _ENDING and number in self._seen:
            # Not by an exception: whoever unwinds would join threads that may hang in a read.
            _say(f"\n{name} again: leaving now; {self._saved()}\n")
            os._exit(128 + number)
        self.requested, self._last = True, number
        self._seen.add(number)
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._before[number])
        if again:
            return
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        _say(f"\n{name}: finishing this step, then saving (again: leave now)\n")

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            raise NoDataError(f"no images came for {PATIENCE_S:.0f} s after {signal.Signals(self._last).name}")

    def patient(self, items: Iterator[T]) -> Iterator[T]:
        """`items`; once a signal has come, one that does not come within PATIENCE_S raises NoDataError."""
        while True:
            self._waiting = True
            try:
                if self.requested:
                    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
                item = next(items, None)
            finally:
                self._waiting = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            if item is None:
                return
            yield item

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requeue(self) -> None:
        """After saving and `close`: submitit, if it runs this job, puts it back into the queue on SIGUSR2."""
        if self._last in _REQUEUEING and callable(self._before[signal.SIGUSR2]):
            os.kill(os.getpid(), signal.SIGUSR2)


class Vote:
    """Whether any rank wants to leave. All ask after the same steps, or they would wait for each other forever.

    Asking makes every rank wait for the slowest, on the host. So they ask but once in REACT_S seconds, and once in
    `most` steps: how many steps that is all of them take from the slowest rank's time for one, which they ask for too.
    """

    def __init__(self, world: "World", first: int, most: int):
        self._world, self._most = world, most
        self._asked, self._at, self._stride = first, time.monotonic(), 1

    def __call__(self, done: int, leave: bool) -> bool:
        """After step `done`: this rank wants to `leave`. One process has its answer after every step."""
        if self._world.size == 1:
            return leave
        if done < self._asked + self._stride:
            return False
        wanted, seconds = self._world.largest(leave, (time.monotonic() - self._at) / self._stride)
        # At most twice as far as before: the first steps are no measure, while a GPU is still behind its host.
        self._stride = max(1, min(int(REACT_S / max(seconds, 1e-6)), 2 * self._stride, self._most))
        self._asked, self._at = done, time.monotonic()
        return bool(wanted)


def _say(text: str) -> None:
    """On stderr. Not print: the signal may have come in the middle of one. Where the terminal is gone, nobody reads."""
    try:
        os.write(2, text.encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # or the next line that the run prints would end it before it has saved
            os.dup2(nowhere, stream)
