"""`python -m ijepa_fast.checkpoint PATH [--export FILE]`: show, verify and export a checkpoint."""
from rich.table import Table

import ijepa_fast.weights.ours as ours
from ijepa_fast import arguments
from ijepa_fast.checkpoint import find, read_about, verify
from ijepa_fast.cli import command, console
from ijepa_fast.errors import UserError


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments.checkpoint(argv)
    out = console()
    path = find(args.path, ours.ALONE)
    about = read_about(path)
    if problem := verify(path, ours.ALONE):
        raise UserError(problem)
    table = Table("part", "tensors", "numbers", "MiB")
    held = ours.held(path)
    for part in ("encoder", "predictor", "target_encoder", "optimizer"):
        of_part = [tensor for name, tensor in held.items() if name.startswith(part + ".")]
        numbers = [int(tensor.size.numel()) for tensor in of_part]
        size = sum(n * tensor.properties.dtype.itemsize for n, tensor in zip(numbers, of_part, strict=True))
        table.add_row(part, str(len(of_part)), f"{sum(numbers):,}", f"{size / 2**20:.1f}")
    model = about["config"]["model"]
    out.print(f"{path}: step {about['step']}, {model['name']}/{model['patch_size']}, torch {about['torch']}")
    out.print(table)
    out.print(f"{len(about['files'])} files, sizes and checksums verified")
    if args.export:
        ours.write(args.export, ours.read_checkpoint(path))
        out.print(f"weights of encoder, predictor and target_encoder in {args.export}")
