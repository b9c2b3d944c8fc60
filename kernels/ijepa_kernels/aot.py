"""Compile every kernel in every shipped configuration, without a GPU, and report what the compiler made of it.

    python -m ijepa_kernels.aot                                       prints the table
    python -m ijepa_kernels.aot --markdown docs/kernels_compiled.md   writes it
    python -m ijepa_kernels.aot --module loss --arch 90               one file's kernels, one chip
    python -m ijepa_kernels.aot --widest                              one configuration of each kind of kernel

A file that has kernels lists its configurations in a function `shipped() -> list[Shipped]`:

    def shipped():
        types = dict(x_ptr="bf16", out_ptr="bf16")  # the other arguments are int32: see Shipped.signature
        return [Shipped(_gather_kernel, types, dict(DIM=dim, BLOCK=block), num_warps=warps) for dim, ... in TABLE]
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import ijepa_kernels

from .dispatch import HAS_TRITON, WANTED
from .shipped import Shipped

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use: CUDA programming guide
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|BGMMA|UTC\w*MMA)")  # mma, wgmma, tcgen05


@dataclass
class Compiled:
    """What ptxas made of a `Shipped` on one chip."""

    module: str
    kernel: str
    title: str
    arch: int
    registers: int
    stack: int  # bytes; not 0 means that registers spilled
    shared: int  # bytes
    spills: int  # instructions that load or store local memory
    tensor_core: int  # instructions
    loads: dict[str, int] = field(default_factory=dict)  # bytes a thread -> instructions
    stores: dict[str, int] = field(default_factory=dict)
    vector_bytes: int = 0  # what was asked for
    dot: bool = False
    note: str = ""

    def faults(self) -> list[str]:
        """Why this may not be shipped."""
        found = []
        if (self.stack or self.spills) and not self.note:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} instructions")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory: {self.shared} of {SHARED_LIMIT[self.arch]} bytes")
        if self.dot and not self.tensor_core:
            found.append("no tensor-core instruction")
        for what, widths in (("load", self.loads), ("store", self.stores)):
            widest = max(map(int, widths), default=None)
            if self.vector_bytes and (widest is None or widest < self.vector_bytes):
                found.append(f"widest global {what} is {widest} bytes, wanted {self.vector_bytes}")
        return found


def configurations() -> list[tuple[str, int]]:
    """(module, position in the list that its `shipped` returns) of everything that is shipped."""
    found = []
    for module in pkgutil.iter_modules(ijepa_kernels.__path__, "ijepa_kernels."):
        lists = vars(importlib.import_module(module.name)).get("shipped")
        if callable(lists) and lists.__module__ == module.name:  # not imported from another module
            found += [(module.name, i) for i in range(len(lists()))]
    return found


def widest(work: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Of configurations that differ in sizes alone the last: the widest, for the tables go from small to large."""
    last = {}
    for module, position in work:
        ship: Shipped = importlib.import_module(module).shipped()[position]
        kinds = [value for value in ship.constexprs.values() if type(value) is not int]
        last[(module, ship.kernel.__name__, str(ship.signature), str(kinds))] = module, position
    return list(last.values())


def compile_one(module: str, position: int, arch: int) -> Compiled:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    ship: Shipped = importlib.import_module(module).shipped()[position]
    names = ship.kernel.arg_names
    types = ship.signature
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ship.divisible]
    source = ASTSource(
        ship.kernel,
        signature,
        {(names.index(name),): value for name, value in ship.constexprs.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = dict(num_warps=ship.num_warps, num_stages=ship.num_stages)
    kernel = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = _disassemble(kernel.asm["cubin"])
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return Compiled(
        module=module.rpartition(".")[2],
        kernel=ship.kernel.__name__.strip("_"),
        title=ship.title(),
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", text)[1]),
        stack=int(re.search(r"STACK:(\d+)", text)[1]),
        shared=max(kernel.metadata.shared, int(re.search(r"SHARED:(\d+)", text)[1])),
        spills=sum(i.startswith(("STL", "LDL")) for i in instructions),
        tensor_core=sum(bool(TENSOR_CORE.match(i)) for i in instructions),
        loads=_widths(i for i in instructions if i.startswith(("LDG", "LD.E"))),  # LDGSTS, a copy to shared memory, too
        stores=_widths(i for i in instructions if i.startswith(("STG", "ST.E"))),
        vector_bytes=ship.vector_bytes,
        dot=ship.dot,
        note=ship.note,
    )


def _disassemble(cubin: bytes) -> str:
    """Its resource usage, then its instructions. nvdisasm takes a third of a second, more than most compilations."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "--print-code", "--no-dataflow"]
        runs = [subprocess.run([*c, file.name], capture_output=True, text=True, check=True) for c in commands]
    return "".join(run.stdout for run in runs)


def _widths(instructions) -> dict[str, int]:
    """Bytes a thread moves -> instructions. `LDG.E.128.CONSTANT` moves 16, `LDG.E.U16` 2, without a number 4."""
    counts = Counter()
    for name in instructions:
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
        counts[int(bits[1]) // 8 if bits else 4] += 1
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def markdown(rows: list[Compiled]) -> str:
    import triton

    out = [
        "# What the compiler makes of the kernels",
        "",
        "Generated by `python -m ijepa_kernels.aot --markdown docs/kernels_compiled.md` with triton "
        f"{triton.__version__}. No GPU is needed, and nothing here is a speed.",
        "",
        "Loads and stores of global memory: bytes a thread moves by one instruction x how many there are in the code; "
        "`+` separates widths. Narrow ones beside wide ones are scalars (lengths, table entries) and the tails of a "
        "tensor. Spills: bytes of stack. MMA: tensor-core instructions.",
        "",
        "| kernel | configuration | chip | registers | spills | shared B | loads | stores | MMA | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mix = [" + ".join(f"{width}x{n}" for width, n in w.items()) or "-" for w in (r.loads, r.stores)]
        numbers = [r.registers, r.stack, r.shared, *mix, r.tensor_core]
        cells = [f"{r.module}: `{r.kernel}`", r.title, f"sm_{r.arch}", *map(str, numbers), r.note]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ijepa_kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--module", nargs="+", help="only these, as in `loss ema`")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=ARCHS)
    parser.add_argument("--widest", action="store_true", help="of configurations that differ in sizes alone, only one")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if not HAS_TRITON:
        sys.exit("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled in the same process")
    only = args.module and {f"ijepa_kernels.{name}" for name in args.module}
    shipped = [(name, i) for name, i in configurations() if not only or name in only]
    work = [
        (name, i, arch)
        for name, i in (widest(shipped) if args.widest else shipped)
        for arch in args.arch
        if arch >= importlib.import_module(name).shipped()[i].first_arch
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(compile_one, *zip(*work, strict=True)))
    if args.json:
        args.json.write_text(json.dumps([vars(row) | {"faults": row.faults()} for row in rows], indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if not (args.json or args.markdown):
        print(markdown(rows))
    faulty = [f"{r.module}: {r.kernel} ({r.title}) on sm_{r.arch}: {'; '.join(r.faults())}" for r in rows if r.faults()]
    print(*faulty, f"{len(rows)} compiled, {len(faulty)} with faults", sep="\n", file=sys.stderr)
    return bool(faulty)


if __name__ == "__main__":
    if not WANTED:  # the package, imported before this file, has left triton out
        os.environ["IJEPA_KERNELS"] = "triton"
        os.execv(sys.executable, [sys.executable, "-m", "ijepa_kernels.aot", *sys.argv[1:]])
    sys.exit(main())
