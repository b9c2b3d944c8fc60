"""The command line: `python -m ijepa_fast.decode train WEIGHTS FOLDER`, then `... show WEIGHTS DECODER IMAGES...`."""
import argparse
import sys
from pathlib import Path

import torch

from ijepa_fast.cli import command
from ijepa_fast.config import DataConfig
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.decode.blocks import predicted_blocks
from ijepa_fast.decode.model import load
from ijepa_fast.decode.show import decoded_sheet
from ijepa_fast.decode.training import train
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.view.open import MASKS, chosen, open_model


@command
def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    model, device = open_model(args)
    if model.predictor is None:
        raise UserError(f"{args.weights} holds no predictor: name a run, or a released checkpoint")
    args.do(args, model, device)


def _train(args: argparse.Namespace, model, device: torch.device) -> None:
    if args.steps < 1 or args.batch < 1 or not args.lr > 0:
        raise UserError(f"--steps and --batch must be at least 1 and --lr above 0, "
                        f"not {args.steps}, {args.batch} and {args.lr}")  # fmt: skip
    data = DataConfig(root=args.data, image_size=model.image_size)
    losses = train(
        model, data, args.out, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
        weights=str(args.weights), device=device,
    )  # fmt: skip
    last = losses[-50:]
    print(f"{args.out}: {args.steps} steps, loss {sum(last) / len(last):.4f} (mean of the last {len(last)})")


def _show(args: argparse.Namespace, model, device: torch.device) -> None:
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, not {args.samples}")
    index = index_images(args.images)
    decoder = load(args.decoder).to(device)
    wanted, own = decoder.settings, (model.encoder.size.dim, model.image_size, model.patch_size)
    if own != (wanted.feature_dim, wanted.image_size, wanted.patch_size):
        raise UserError(f"{args.decoder} was trained for features of {wanted.feature_dim} channels, "
                        f"{wanted.image_size} px and patches of {wanted.patch_size}; {args.weights} has {own[0]}, "
                        f"{own[1]} px and {own[2]}")  # fmt: skip
    ids, names = chosen(index, args.rows)
    images = torch.cat(list(center_crops(index, ids, model.image_size, batch=8)))
    masks = MultiBlockMasks(MASKS, model.encoder.grid, args.seed, len(images)).sample(0, 0, len(images))
    blocks = predicted_blocks(model, images, masks, device)
    print(decoded_sheet(images, masks, blocks, decoder, args.out, names, samples=args.samples, seed=args.seed))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.decode",
        description="Turn what the predictor predicts for hidden blocks back into pixels, with a small decoder trained "
        "for it; the model stays frozen.",
        epilog="Example: python -m ijepa_fast.decode train runs/demo PHOTOGRAPHS --steps 2000; "
        "python -m ijepa_fast.decode show runs/demo decoder.safetensors PHOTOGRAPHS",
    )
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
    trainer = tasks.add_parser("train", help="train a decoder on a folder of images")
    shower = tasks.add_parser("show", help="draw hidden blocks, their contexts, and samples of what is predicted")
    for task in (trainer, shower):
        task.add_argument("weights", type=Path, help="a run, a checkpoint, or another file that holds a predictor")
        task.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    trainer.add_argument("data", type=Path, help="a folder of images, at any depth")
    trainer.add_argument("--out", type=Path, default=Path("decoder.safetensors"), metavar="FILE",
                         help="default: decoder.safetensors")  # fmt: skip
    trainer.add_argument("--steps", type=int, default=2000, metavar="N", help="default: 2000")
    trainer.add_argument("--batch", type=int, default=16, metavar="N", help="images, of 4 blocks each; default: 16")
    trainer.add_argument("--lr", type=float, default=1e-3, metavar="X", help="default: 1e-3")
    trainer.set_defaults(do=_train, which="target")
    shower.add_argument("decoder", type=Path, help="what `train` wrote")
    shower.add_argument("images", nargs="+", help="files, or folders of images at any depth")
    shower.add_argument("--out", type=Path, default=Path("decode.png"), metavar="PNG", help="default: decode.png")
    shower.add_argument("--rows", type=int, default=4, metavar="N", help="images, evenly of all; default: 4")
    shower.add_argument("--samples", type=int, default=4, metavar="N", help="default: 4")
    shower.set_defaults(do=_show, which="target")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
