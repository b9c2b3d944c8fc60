"""The command `ijepa`, also `python -m ijepa_fast`: a line on each command, and the way to it.

The modules have a door each (`python -m ijepa_fast.train`), which leads here as well: arguments and config are read
before anything heavy is imported.
"""
import difflib
import importlib
import sys

from ijepa_fast.cli import command
from ijepa_fast.errors import UserError
from ijepa_fast.version import __version__

COMMANDS = {  # name: module, and what it does
    "train": ("ijepa_fast.train", "pretrain from a config; --resume goes on, --dry-run tells memory and time"),
    "demo": ("ijepa_fast.demo", "pretrain on ten photographs in minutes, and show what the predictor knows"),
    "launch": ("ijepa_fast.launch", "submit a run to SLURM, requeued and resumed when it is preempted"),
    "plan": ("ijepa_fast.plan", "memory and time of a config on N GPUs, on paper"),
    "view": ("ijepa_fast.view.__main__", "draw masks, features, predictions and attention"),
    "checkpoint": ("ijepa_fast.checkpoint_cli", "show, verify and export a checkpoint"),
    "index": ("ijepa_fast.data.index_cli", "index and verify the images of a folder, tars or parquet files"),
    "tune": ("ijepa_fast.data.tune", "how fast each decoder reads and decodes your images"),
    "convert": ("ijepa_fast.convert", "weights from and to the released code, Hugging Face, timm, safetensors"),
    "evaluate": ("ijepa_fast.evaluate", "how good features are: k-NN, linear and other probes, rank"),
    "embed": ("ijepa_fast.embed", "write the features of images, and tell which are alike"),
    "decode": ("ijepa_fast.decode.__main__", "train a decoder of features, and sketch what the predictor believes"),
    "env": ("ijepa_fast.env", "what is installed and usable here: for a bug report"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `ijepa ARGUMENTS`; returns the exit code."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # while something was imported: a command reports its own
        print("interrupted", file=sys.stderr)
        return 130


@command
def _check(argv: list[str] | None) -> None:
    name, *rest = argv or []
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name}; {hint}")
    from ijepa_fast import arguments  # not for the usage, which needs no config

    arguments.check(name, rest)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"ijepa_fast {__version__}")
        return 0
    return _check(argv) or importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


def usage() -> str:
    lines = [f"  {name:<12}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([
        "usage: ijepa COMMAND ...     (ijepa COMMAND --help tells what it takes)",
        "",
        "Fast I-JEPA pretraining.",
        "",
        *lines,
        "",
        "ijepa --version tells the version. Every command is also a module: python -m ijepa_fast.train ...",
    ])


if __name__ == "__main__":
    sys.exit(main())
