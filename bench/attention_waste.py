"""How much of the tensor cores' work in attention is padding, counted for several ways to lay sequences out in tiles.

    python bench/attention_waste.py                                     prints a table
    python bench/attention_waste.py --markdown docs/attention_waste.md  writes it

Counted are multiply-adds for each useful one, at the lengths that the real sampler draws for our recipes at 224 px. A
forward needs 2 products of length x length, a backward 5. A tile of queries times a tile of keys is computed whole,
whatever part of it lies in a sequence. Nothing here is a time: on an H100 tiles of 16 and 32 rows cannot use wgmma.
"""
import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ijepa_kernels import attention_short, attention_triton  # noqa: E402

from ijepa_fast.config import load_config  # noqa: E402
from ijepa_fast.masks import MultiBlockMasks  # noqa: E402

MODELS = {name: f"configs/vit{name[0].lower()}{name[2:]}_in1k.yaml" for name in ("S/16", "B/16", "L/16", "H/14")}
MODELS["g/16"] = "configs/vitg16_in22k.yaml"
STEPS, IMAGES = 64, 128  # sizes of blocks are those of a step
FORWARD, BACKWARD = attention_triton.FORWARD[16], attention_triton.BACKWARD[16]
Images = Sequence[Sequence[int]]  # the lengths of each image's sequences


def up(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def alone(images: Images, rows: int, keys: int) -> int:
    """Pairs of query and key where every sequence has tiles of its own."""
    return sum(up(n, rows) * up(n, keys) for lengths in images for n in lengths)


def packed(images: Images, rows: int, keys: int) -> int:
    """Whole sequences of an image share a tile of queries, the longest placed first, each where it first fits.

    Such a tile walks over the keys of all its sequences, of which a block-diagonal mask keeps each one's own. What is
    longer than a tile has tiles of its own.
    """
    pairs = 0
    for lengths in images:
        tiles: list[int] = []
        for n in sorted(lengths, reverse=True):
            if n > rows:
                pairs += up(n, rows) * up(n, keys)
                continue
            place = next((i for i, used in enumerate(tiles) if used + n <= rows), len(tiles))
            tiles[place : place + 1] = [n if place == len(tiles) else tiles[place] + n]
        pairs += sum(rows * up(used, keys) for used in tiles)
    return pairs


def flattened(images: Images, rows: int, keys: int) -> int:
    """Tiles of queries lie end to end over the batch; one walks over the keys of all sequences that it touches."""
    begins, ends, end = [], [], 0  # of the sequence that holds each token
    for n in (n for lengths in images for n in lengths):
        begins += [end] * n
        end += n
        ends += [end] * n
    firsts = range(0, end, rows)
    return sum(rows * up(ends[min(first + rows, end) - 1] - begins[first], keys) for first in firsts)


class Layout(NamedTuple):
    name: str
    pairs: Callable[[Images, int, int], int]
    forward: tuple[int, int]  # rows, keys
    backward: tuple[int, int]
    products: int = 7  # of the backward


SHIPPED = Layout("ours", alone, (FORWARD.block, FORWARD.block_inner), (BACKWARD.block, BACKWARD.block_inner))
SHORT = SHIPPED._replace(name="short backward", backward=(attention_short.ROWS, attention_short.KEYS), products=5)
LAYOUTS = [
    SHIPPED,
    SHORT,
    Layout("packed 128", packed, (128, 64), (128, 32)),
    Layout("flat 64", flattened, (64, 64), (64, 32)),
    Layout("flat 128", flattened, (128, 64), (128, 32)),
    Layout("rows 32", alone, (32, 32), (32, 32)),
    Layout("rows 16", alone, (16, 16), (16, 16)),
]


def ratio(layout: Layout, images: Images, training: bool) -> float:
    """Multiply-adds for each useful one, forward and in training backward."""
    done = 2 * layout.pairs(images, *layout.forward)
    if training:
        done += layout.products * layout.pairs(images, *layout.backward)
    return done / ((7 if training else 2) * sum(n * n for lengths in images for n in lengths))


def draw(config_file: str, collate: str) -> dict[str, list[list[int]]]:
    """The lengths of the first steps' first images."""
    config, _ = load_config(ROOT / config_file, [f"mask.collate={collate}"])
    sampler = MultiBlockMasks(config.mask, config.grid, config.train.seed, config.optim.global_batch_size)
    parts: dict[str, list[list[int]]] = {"context": [], "predictor": [], "dense target": []}
    for step in range(STEPS):
        masks = sampler.sample(step, 0, IMAGES)
        context, target = masks.context.cu_seqlens.diff(), masks.target.cu_seqlens.diff()
        both = context[masks.context_of.long()] + target
        parts["context"] += context.view(IMAGES, -1).tolist()  # image by image
        parts["predictor"] += both.view(IMAGES, -1).tolist()
    parts["dense target"] = [[config.grid**2]] * IMAGES
    return parts


def rows() -> list[list[str]]:
    """One for each part of a model's step; models that draw the same lengths share one."""
    found: dict[tuple[str, str, str], tuple[list[str], Images]] = {}
    for model, file in MODELS.items():
        for collate in ("truncate", "ragged"):
            for part, images in draw(file, collate).items():
                masks = "all" if part == "dense target" else collate
                models, _ = found.setdefault((part, masks, str(images)), ([], images))
                models += [model] * (model not in models)
    table = []
    for (part, masks, _), (models, images) in sorted(found.items(), key=lambda item: item[0][:2]):
        lengths = sorted(n for of_image in images for n in of_image)
        spread = f"{lengths[0]} to {lengths[-1]}" if lengths[0] < lengths[-1] else str(lengths[0])
        ratios = [
            f"{ratio(layout, images, part != 'dense target'):.2f}" if layout is not SHORT or part == "predictor" else ""
            for layout in LAYOUTS
        ]
        table.append([part, masks, ", ".join(models), f"{sum(lengths) / len(lengths):.0f} ({spread})", *ratios])
    return table


def markdown() -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def tiles(layout: Layout) -> str:
        (m, n), (k, l) = layout.forward, layout.backward  # noqa: E741
        return f"- **{layout.name}**: forward {m} x {n}, backward {k} x {l} in {layout.products} products\n"

    head = ["part", "masks", "models", "tokens a sequence", *(layout.name for layout in LAYOUTS)]
    return (
        "# Padding in attention\n\n"
        "Generated by `python bench/attention_waste.py --markdown docs/attention_waste.md`. Multiply-adds on the\n"
        f"tensor cores for each useful one, counted over {IMAGES} images of each of {STEPS} steps; nothing here is a\n"
        "time. The dense target is forward alone, the others forward and backward. Masked columns of a head are left\n"
        "out: they are the same everywhere. The short backward is for the heads of predictors.\n\n"
        f"{''.join(map(tiles, LAYOUTS))}\n"
        "Tiles are queries x keys. Packed: whole sequences of an image share a tile of queries under a block-diagonal\n"
        "mask. A context or a whole image has no other sequence of its image to share it with. Flat: tiles lie end to\n"
        "end over the batch and cross the borders of sequences.\n\n"
        "Packing does not win against tiles of 64 rows. In a shared tile every key meets 128 queries; alone it meets\n"
        "the 64 or 128 of its own sequence. Rows that packing fills multiply keys that the mask then takes away. What\n"
        "it can save is the padding of keys, where sequences are far shorter than those that a recipe draws.\n\n"
        f"{line(head)}{line(['---'] * len(head))}{''.join(map(line, rows()))}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")
    args = parser.parse_args(argv)
    text = markdown()
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
