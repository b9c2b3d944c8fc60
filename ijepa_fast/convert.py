"""Weights from one format into another: `python -m ijepa_fast.convert SRC DST --to FORMAT`.

What is read: everything that `ijepa_fast.load` reads. What is written is whole or not there, and nothing is replaced.
"""
import argparse
import importlib
import sys
from pathlib import Path

import ijepa_fast.weights.ours as ours
import ijepa_fast.weights.released as released
from ijepa_fast.cli import command
from ijepa_fast.config import Config, load_config, validate
from ijepa_fast.errors import UserError
from ijepa_fast.weights.contents import Contents, architectures
from ijepa_fast.weights.load import read
from ijepa_fast.weights.run_folder import read_training, write_run

FORMATS = ("run", "released", "hf", "safetensors", "timm")


@command
def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    if args.to != "run" and (args.config or args.overrides):
        raise UserError(f"--to {args.to} takes no config; a run needs one")
    if args.to in ("run", "released") and args.which:
        raise UserError(f"--to {args.to} writes both encoders; leave out --which")
    if args.dst.exists():
        raise UserError(f"{args.dst} is there already; choose another name, or remove it first")
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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.convert",
        description="Write weights in another format: a run of ours that can be resumed, a checkpoint that the "
        "released code goes on from, a Hugging Face or timm folder, or one safetensors file.",
        epilog="Examples: python -m ijepa_fast.convert runs/vith14 vith14-hf --to hf; python -m ijepa_fast.convert "
        "IN1K-vit.h.14-300e.pth.tar runs/more --to run --config in1k_vith14_ep300.yaml data.root=/data/imagenet/train",
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="weights of any format that ijepa_fast.load reads")
    parser.add_argument("dst", type=Path, metavar="DST", help="what to write; it must not be there yet")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--which", choices=("target", "context"), help="the encoder; by default, of hf and timm the "
                        "target encoder where SRC holds it, of safetensors everything")  # fmt: skip
    parser.add_argument("--config", help="of --to run: the recipe, a released YAML or ours; a run of ours has it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --to run: keys to replace")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
