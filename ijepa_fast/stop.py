"""Ctrl-C and SIGTERM ask a run to finish its step, save and leave; a second one ends it at once."""
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """From its making until `close`, the first signal sets `requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.close()
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving (again: leave now)\n".encode())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
