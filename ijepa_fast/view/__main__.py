"""The command line of all pictures: `python -m ijepa_fast.view PICTURE ...`; a file here that has one has its name."""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["view", *sys.argv[1:]]))

import importlib

from ijepa_fast import arguments_pictures
from ijepa_fast.cli import command


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_pictures.view(argv)
    importlib.import_module(f"ijepa_fast.view.{args.picture}").draw(args)
