"""`python -m ijepa_fast.checkpoint PATH [--export FILE]`: show, verify and export a checkpoint."""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ijepa_fast import compat
from ijepa_fast.checkpoint import find, read_about, reason, verify
from ijepa_fast.cli import command
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.checkpoint",
        description="Show what a checkpoint holds and verify its sizes and checksums. Exit code 2: it is damaged.",
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a run folder: then its latest one")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the weights, whole, in fp32, as safetensors")
    args = parser.parse_args(argv)
    alone, console = World(0, 1, torch.device("cpu"), "single"), Console(highlight=False, soft_wrap=True)
    path = find(args.path, alone)
    about = read_about(path)
    if problem := verify(path, alone):
        raise UserError(problem)
    table = Table("part", "tensors", "numbers", "MiB")
    held = tensors_in(dcp.HuggingFaceStorageReader(str(path)))
    for part in ("encoder", "predictor", "target_encoder", "optimizer"):
        of_part = [tensor for name, tensor in held.items() if name.startswith(part + ".")]
        numbers = [int(tensor.size.numel()) for tensor in of_part]
        size = sum(n * tensor.properties.dtype.itemsize for n, tensor in zip(numbers, of_part, strict=True))
        table.add_row(part, str(len(of_part)), f"{sum(numbers):,}", f"{size / 2**20:.1f}")
    model = about["config"]["model"]
    console.print(f"{path}: step {about['step']}, {model['name']}/{model['patch_size']}, torch {about['torch']}")
    console.print(table)
    console.print(f"{len(about['files'])} files, sizes and checksums verified")
    if args.export:
        export(path, args.export)
        console.print(f"weights of encoder, predictor and target_encoder in {args.export}")


def tensors_in(reader: dcp.HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of all tensors in a checkpoint, by name; safetensors hold nothing else."""
    held = reader.read_metadata().state_dict_metadata
    return {name: about for name, about in held.items() if isinstance(about, TensorStorageMetadata)}


def export(path: Path, out: Path) -> None:
    """Write the weights of encoder, predictor and target_encoder, whole and in fp32, into one safetensors file."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    weights = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in tensors_in(reader).items()
        if not name.startswith("optimizer.")
    }
    with compat.single_process_checkpoints():
        dcp.load(weights, storage_reader=reader, no_dist=True)
    temporary = out.with_name(out.name + ".writing")
    try:
        save_file(weights, temporary, metadata={"step": str(read_about(path)["step"]), "format": "pt"})
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written: {reason(error)}") from None
