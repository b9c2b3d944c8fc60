"""One writer a run folder: the file that marks the folder as a run's, the lock on it, and the history of its config.

The lock is flock's: it ends with its process, however that dies, and holds across machines where the file system says
so (NFS does). The file stays, so that whoever indexes images knows a run folder and leaves it out.
"""
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ijepa_fast.errors import UserError

MARKER = ".ijepa_run"
HISTORY = "config_history.jsonl"


class RunLock:
    """Held from its making to `close`; UserError with the owner's name where another process holds it.

    `held` is False on a file system without locks: then nobody is kept out.
    """

    def __init__(self, folder: Path):
        path = folder / MARKER
        self.held = True
        self._file = open(path, "a+")  # noqa: SIM115 (open as long as the run)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            self._file.close()
            raise UserError(
                f"{folder} is being written by {owner}: wait for that run, or end it, then --resume; or choose another "
                f"train.folder. The lock ends with its process; if that is dead and a file server has not noticed, "
                f"remove {path}"
            ) from None
        except OSError:
            self.held = False
        self._file.truncate(0)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(about) + "\n")
        self._file.flush()

    def _owner(self) -> str:
        try:
            self._file.seek(0)
            about = json.loads(self._file.read())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def close(self) -> None:
        self._file.close()


def record_change(folder: Path, step: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Append to the run's history which keys it goes on with another value of, from `step` on. Nested plain values."""
    changed = {
        f"{section}.{key}": [before.get(section, {}).get(key), value]
        for section, keys in after.items()
        for key, value in keys.items()
        if before.get(section, {}).get(key) != value
    }
    if changed:
        row = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "changed": changed}
        with open(folder / HISTORY, "a") as file:
            file.write(json.dumps(row) + "\n")
