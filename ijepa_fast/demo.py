"""The whole of I-JEPA in minutes: `python -m ijepa_fast.demo --config configs/demo.yaml [section.key=value ...]`.

Pretrains on the real photographs that scikit-image and scikit-learn ship, or on your own, and ends with a table and a
picture of what the predictor knows of hidden blocks before and after. Nothing is downloaded.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["demo", *sys.argv[1:]]))

from importlib.resources import files
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from ijepa_fast import arguments, distributed
from ijepa_fast.cli import command, console
from ijepa_fast.config import load_config
from ijepa_fast.evaluation.probe import evenly
from ijepa_fast.memory import memory_advice
from ijepa_fast.retrieval import accuracy, ask, photograph_accuracy, retrieve, retrieve_by_colour
from ijepa_fast.retrieval_sheet import retrieval_sheet
from ijepa_fast.run import Run, build_run, initial_models
from ijepa_fast.train import train

# Colour photographs inside the installed packages.
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "hubble_deep_field.jpg",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
IN_TABLE = 10  # photographs at most


def write_photographs(folder: Path) -> list[Path]:
    """Put the photographs into `folder`: JPEG files as they are, others converted to JPEG; none is written twice."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            source = files(package) / name
            if not source.is_file():
                continue  # not every version ships every picture
            target = folder / (Path(name).stem + ".jpg")
            if not target.exists():
                if name.endswith(".jpg"):
                    target.write_bytes(source.read_bytes())
                else:
                    with source.open("rb") as file:
                        Image.open(file).convert("RGB").save(target, quality=95)
            written.append(target)
    return written


def show_retrieval(run: Run, console: Console) -> None:
    """What the predictor knows of hidden blocks before and after pretraining: a table, and a picture in the folder."""
    config, device, source = run.config, run.world.device, run.data.source
    ids = evenly(len(source.index), IN_TABLE)
    questions = ask(source, ids, config.mask, config.grid, config.data.crop_scale[0])
    encoder, predictor = (model.to(device) for model in initial_models(config, device))
    trained = run.state.encoder, run.state.predictor, run.state.target_encoder
    with memory_advice(config.optim.micro_batch):
        picks = {
            "mean colour of the context nearby": retrieve_by_colour(questions, config.grid),
            "predictor before": retrieve(questions, encoder, predictor, encoder),  # the target starts as a copy
            "predictor after": retrieve(questions, *trained),
        }
        if len(ids) > 1:
            picks["predictor after, shown another photograph"] = retrieve(questions, *trained, wrong_context=True)
    candidates = len(questions.crops) * len(ids)
    table = Table("Which block is hidden?", "the block", "its photograph")
    table.add_row("chance", f"{1 / candidates:.1%}", f"{1 / len(ids):.1%}")
    for name, picked in picks.items():
        table.add_row(name, f"{accuracy(questions, picked):.1%}", f"{photograph_accuracy(questions, picked):.1%}")
    console.print(table)
    console.print(
        f"Shown the context of a crop alone, the predictor picks the hidden block among the blocks at that place in "
        f"{candidates} crops of {len(ids)} photographs, all of which it was trained on. "
        f"{questions.answers().numel()} questions, the same for every seed."
    )
    if run.world.is_main:
        path = config.train.folder / "retrieval.png"
        before, after = (picks[f"predictor {when}"].cpu() for when in ("before", "after"))
        retrieval_sheet(questions, before, after, config.model.patch_size, path)
        console.print(f"picture     {path}")


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments.demo(argv)
    config, _ = load_config(args.config, args.overrides)
    root = config.data.root
    if isinstance(root, Path) and not root.exists():
        write_photographs(root)
    with distributed.join(config) as world, build_run(config, world) as run:
        out = console(quiet=not world.is_main)
        if train(run, out, resume=False):
            show_retrieval(run, out)
