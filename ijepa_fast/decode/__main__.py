"""The command line: `python -m ijepa_fast.decode train WEIGHTS FOLDER`, then `... show WEIGHTS DECODER IMAGES...`."""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["decode", *sys.argv[1:]]))

import argparse

import torch

from ijepa_fast import arguments_pictures
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
    args = arguments_pictures.decode(argv)
    model, device = open_model(args)
    if model.predictor is None:
        raise UserError(f"{args.weights} holds no predictor: name a run, or a released checkpoint")
    {"train": _train, "show": _show}[args.task](args, model, device)


def _train(args: argparse.Namespace, model, device: torch.device) -> None:
    data = DataConfig(root=args.data, image_size=model.image_size)
    losses = train(
        model, data, args.out, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
        weights=str(args.weights), device=device,
    )  # fmt: skip
    last = losses[-50:]
    print(f"{args.out}: {args.steps} steps, loss {sum(last) / len(last):.4f} (mean of the last {len(last)})")


def _show(args: argparse.Namespace, model, device: torch.device) -> None:
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
