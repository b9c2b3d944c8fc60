"""What `ijepa view` and `ijepa decode` take: which pictures, of which weights and images."""
import argparse
from pathlib import Path

from ijepa_fast.config import MaskConfig
from ijepa_fast.errors import UserError

BLOCKS = MaskConfig().num_targets  # hidden blocks of an image


def view(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa view", description="Draw what a run does, and what its model has learned."
    )
    pictures = parser.add_subparsers(title="pictures", metavar="PICTURE", required=True, dest="picture")
    for add in (_masks, _features, _predictions, _attention, _runs):
        add(pictures)
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown option: {' '.join(rest)}")
    # argparse leaves over what follows an option
    if args.picture == "masks":
        args.overrides += rest
    elif args.picture == "runs":
        args.runs += map(Path, rest)
    else:
        args.images += rest
    _check(args)
    return args


def _masks(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pictures.add_parser(
        "masks",
        help="crops of a step, with their context and target blocks",
        description="Draw a contact sheet of crops of one step, exactly as a run of this config sees them: each crop, "
        "the patches that the context encoder is shown, and each of the target blocks that are predicted.",
        epilog="Example: ijepa view masks --config vith14_in1k --images 4 data.root=PHOTOGRAPHS "
        "optim.global_batch_size=128 mask.collate=ragged",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="a config of ours, or a released I-JEPA one")
    parser.add_argument("--out", default="masks.png", type=Path, metavar="PNG", help="default: masks.png")
    parser.add_argument("--images", default=8, type=int, metavar="N", help="at most a global batch; default: 8")
    parser.add_argument("--step", default=0, type=int, metavar="N", help="step of the run, from 0; default: 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")


def _features(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pictures.add_parser(
        "features",
        help="principal components of patch features, as colours",
        description="Draw each image with the first three principal components of its patch features as colours.",
        epilog="Example: ijepa view features runs/demo PHOTOGRAPHS --out features.png",
    )
    _add_weights_and_images(parser, "features.png")


def _predictions(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pictures.add_parser(
        "predictions",
        help="hidden blocks, filled with the patches most like what is predicted there",
        description="Draw each image's context, a hidden block, and the block as the predictor sees it: patches of "
        "other images whose features are nearest to the predicted ones. Needs weights that hold a predictor.",
        epilog="Example: ijepa view predictions runs/demo PHOTOGRAPHS --out predictions.png",
    )
    _add_weights_and_images(parser, "predictions.png", rows=4)
    parser.add_argument("--bank", action="append", metavar="PATH", help="images to take patches from, and no image "
                        "from itself; may be repeated; default: IMAGES")  # fmt: skip
    parser.add_argument("--most", default=1000, type=int, metavar="N", help="images of the bank; default: 1000")
    parser.add_argument("--blocks", default=1, type=int, metavar="N", help=f"hidden blocks of an image, 1 to {BLOCKS}")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of the masks; default: 0")


def _attention(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pictures.add_parser(
        "attention",
        help="where each head of a layer looks from one patch",
        description="Draw the attention of one patch to all others, one panel a head.",
        epilog="Example: ijepa view attention runs/demo PHOTOGRAPHS --layer 6 --out attention.png",
    )
    _add_weights_and_images(parser, "attention.png", rows=4)
    parser.add_argument("--layer", type=int, metavar="N", help="block, from 1; default: the last")
    parser.add_argument("--patch", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="from 0; default: the middle")


def _runs(pictures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pictures.add_parser(
        "runs",
        help="loss and probes of several runs, over each other",
        description="Draw the loss of runs, and RankMe, spread and accuracies of their target encoders' features.",
        epilog="Example: ijepa view runs runs/small runs/small_lr --out runs.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs (train.folder)")
    parser.add_argument("--out", default="runs.png", type=Path, metavar="PNG", help="default: runs.png")


def _add_weights_and_images(parser: argparse.ArgumentParser, out: str, rows: int = 6) -> None:
    parser.add_argument("weights", type=Path, help="a run, a checkpoint, or a file or folder of another format")
    parser.add_argument("images", nargs="+", help="files, or folders of images at any depth")
    parser.add_argument("--out", default=out, type=Path, metavar="PNG", help=f"default: {out}")
    parser.add_argument("--rows", default=rows, type=int, metavar="N", help=f"images, evenly of all; default: {rows}")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder; default: target")


def _check(args: argparse.Namespace) -> None:
    if args.picture == "masks" and (args.images < 1 or args.step < 0):
        raise UserError(f"--images must be at least 1 and --step at least 0, not {args.images} and {args.step}")
    if "rows" in args:
        _check_rows(args)
    if args.picture == "predictions" and (not 1 <= args.blocks <= BLOCKS or args.most < 1):
        raise UserError(f"--blocks must be 1 to {BLOCKS} and --most at least 1, not {args.blocks} and {args.most}")


def _check_rows(args: argparse.Namespace) -> None:
    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, not {args.rows}")


def decode(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa decode",
        description="Turn what the predictor predicts for hidden blocks back into pixels, with a small decoder trained "
        "for it; the model stays frozen.",
        epilog="Example: ijepa decode train runs/demo PHOTOGRAPHS --steps 2000; "
        "ijepa decode show runs/demo decoder.safetensors PHOTOGRAPHS",
    )
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True, dest="task")
    trainer = tasks.add_parser("train", help="train a decoder on a folder of images")
    shower = tasks.add_parser("show", help="draw hidden blocks, their contexts, and samples of what is predicted")
    for task in (trainer, shower):
        task.add_argument("weights", type=Path, help="a run, a checkpoint, or another file that holds a predictor")
        task.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
        task.set_defaults(which="target")
    trainer.add_argument("data", help="a folder of images, at any depth, or its address")
    trainer.add_argument("--out", type=Path, default=Path("decoder.safetensors"), metavar="FILE",
                         help="default: decoder.safetensors")  # fmt: skip
    trainer.add_argument("--steps", type=int, default=2000, metavar="N", help="default: 2000")
    trainer.add_argument("--batch", type=int, default=16, metavar="N", help="images, of 4 blocks each; default: 16")
    trainer.add_argument("--lr", type=float, default=1e-3, metavar="X", help="default: 1e-3")
    shower.add_argument("decoder", type=Path, help="what `train` wrote")
    shower.add_argument("images", nargs="+", help="files, or folders of images at any depth")
    shower.add_argument("--out", type=Path, default=Path("decode.png"), metavar="PNG", help="default: decode.png")
    shower.add_argument("--rows", type=int, default=4, metavar="N", help="images, evenly of all; default: 4")
    shower.add_argument("--samples", type=int, default=4, metavar="N", help="default: 4")
    args = parser.parse_args(argv)
    if args.task == "train":
        if args.steps < 1 or args.batch < 1 or not args.lr > 0:
            raise UserError(f"--steps and --batch must be at least 1 and --lr above 0, "
                            f"not {args.steps}, {args.batch} and {args.lr}")  # fmt: skip
    else:
        _check_rows(args)
        if args.samples < 1:
            raise UserError(f"--samples must be at least 1, not {args.samples}")
    return args
