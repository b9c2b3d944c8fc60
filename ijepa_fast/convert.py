"""Weights from one format into another: `python -m ijepa_fast.convert SRC DST --to FORMAT`.

What is read: everything that `ijepa_fast.load` reads. What is written is whole or not there, and nothing is replaced.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["convert", *sys.argv[1:]]))

import argparse
import importlib

import ijepa_fast.weights.ours as ours
import ijepa_fast.weights.released as released
from ijepa_fast import arguments_weights
from ijepa_fast.cli import command
from ijepa_fast.config import Config, load_config, validate
from ijepa_fast.errors import UserError
from ijepa_fast.weights.contents import Contents, architectures
from ijepa_fast.weights.load import read
from ijepa_fast.weights.run_folder import read_training, write_run


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments_weights.convert(argv)
    contents = read(args.src)
    architecture, predictor_size = architectures(contents, str(args.src))
    for note in contents.about.get("notes", ()):
        print(f"note: {note}")
    if args.to in ("run", "released") and args.src.is_dir() and ours.recognise(args.src) and predictor_size:
        contents = contents._replace(training=read_training(args.src, architecture, predictor_size))
    if args.to == "run":
        position = write_run(args.dst, contents, architecture, predictor_size, _config(args, contents), str(args.src))
        print(f"{args.dst}: a run after step {position.step}; it goes on with")
        print(f"python -m ijepa_fast.train --config {args.dst / 'config.yaml'} --resume")
    elif args.to == "released":
        _to_released(args, contents)
    else:
        _to_weights(args, contents)


def _config(args: argparse.Namespace, contents: Contents) -> Config:
    """The recipe: --config and overrides, or what a run of ours was written with."""
    folder = f"train.folder={args.dst}"
    if args.config is None:
        if "config" not in contents.about:
            raise UserError(
                f"{args.src} does not hold the recipe of its run: name it with --config (a released YAML or ours), and "
                f"the images with data.root=FOLDER"
            )
        if args.overrides:
            raise UserError("overrides change the config that --config names; name one")
        raw = contents.about["config"]
        return validate(raw | {"train": raw["train"] | {"folder": str(args.dst)}}, str(args.src))
    return load_config(args.config, [*args.overrides, folder])[0]


def _to_released(args: argparse.Namespace, contents: Contents) -> None:
    released.write(args.dst, contents)
    training = contents.training or {}
    print(f"{args.dst}: a checkpoint after epoch {training.get('epoch')}")
    if "step" in training and (inside := training["step"] % training["steps_per_epoch"]):
        print(f"note: the source is {inside} of {training['steps_per_epoch']} updates into the next epoch, which the "
              f"released code begins anew")  # fmt: skip


def _to_weights(args: argparse.Namespace, contents: Contents) -> None:
    held = list(contents.encoders)
    if args.which and args.which not in held:
        raise UserError(f"{args.src} holds the {held[0]} encoder alone, not the {args.which} encoder")
    if args.to == "safetensors":
        ours.write(args.dst, contents, args.which)
        parts = [f"the {which} encoder" for which in held if args.which in (None, which)]
        parts += ["the predictor"] if contents.predictor is not None and args.which is None else []
        print(f"{args.dst}: {', '.join(parts)}")
        return
    which = args.which or ("target" if "target" in held else held[0])
    module = importlib.import_module("ijepa_fast.weights." + {"hf": "huggingface", "timm": "timm"}[args.to])
    module.write(args.dst, contents, which)
    print(f"{args.dst}: the {which} encoder")
