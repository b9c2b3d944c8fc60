"""What all command lines share: an error is one sentence on stderr and an exit code, never a traceback.

Exit codes: 0; 2 for a mistake that the user can correct (`UserError`, or an error of the operating system); 1 when
another rank was lost; 130 after Ctrl-C. A bug keeps its traceback.
"""
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ijepa_fast import compat
from ijepa_fast.errors import SharedError, UserError

if TYPE_CHECKING:
    from rich.console import Console


def command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Decorate `main(argv)`: it returns the exit code, and prints one sentence to stderr if that is not 0.

    All ranks make the same mistake before they have joined, and when they raise a `SharedError`: then the first rank of
    each machine prints it. An error of a single rank is printed by that rank, with its number.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        # What torchrun set is checked where the processes meet: here it is only what an error is headed with.
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
        _library_warnings()  # what a program decoded before it called the command is not the command's
        try:
            with compat.single_process_checkpoints():
                try:
                    main(argv)
                finally:
                    _tell_library_warnings()
        except UserError as error:
            own = _has_joined() and not isinstance(error, SharedError)
            if own or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {rank if own else ''}{error}", file=sys.stderr)
            return 2
        except OSError as error:  # the disk is full, or a folder went away
            where = f"{error.filename}: " if error.filename else _let_go_of_full_stdout()
            print(f"error: {rank}{where}{error.strerror or error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            from ijepa_fast import distributed

            if not (sentence := distributed.lost_contact(error)):
                raise
            # The other rank's own error comes first; torchrun, having seen it, may end this process meanwhile.
            time.sleep(1)
            print(f"error: {rank}{sentence}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            print(f"{rank}interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
            return 130
        return 0

    return run


def _has_joined() -> bool:
    """Whether other processes were met: not before the module that does it was imported, which takes seconds."""
    distributed = sys.modules.get("ijepa_fast.distributed")
    return distributed is not None and distributed.has_joined()


def _library_warnings() -> list[str]:
    module = sys.modules.get("ijepa_fast.data.library_warnings")  # without it no image was decoded
    return module.finish() if module is not None else []


def _tell_library_warnings() -> None:
    """Those on images that the command itself has not reported. Of several processes, those of the first alone."""
    for line in _library_warnings():
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {line}", file=sys.stderr)


def _let_go_of_full_stdout() -> str:
    """Whether standard output was what could not be written: then it is closed, or Python's exit would fail as well."""
    try:
        print(flush=True)  # what was being written is gone from the buffers: only another write tells
        return ""
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "standard output: "


def console(*, quiet: bool = False, width: int | None = None) -> "Console":
    """A console that prints what it is given: nothing that a user, a file or a library wrote is read as markup."""
    from rich.console import Console

    # soft_wrap: a path stays on one line where output is no terminal.
    return Console(quiet=quiet, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)
