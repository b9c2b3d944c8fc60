"""The command line of all pictures: `python -m ijepa_fast.view PICTURE ...`; each file here has one."""
import argparse
import sys

from ijepa_fast.cli import command
from ijepa_fast.view import attention, features, masks, predictions, runs


@command
def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown option: {' '.join(rest)}")
    args.draw(args, rest)  # argparse leaves over what follows an option


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.view", description="Draw what a run does, and what its model has learned."
    )
    pictures = parser.add_subparsers(title="pictures", metavar="PICTURE", required=True)
    for picture in (masks, features, predictions, attention, runs):
        picture.add_command(pictures)
    return parser


if __name__ == "__main__":
    sys.exit(main())
