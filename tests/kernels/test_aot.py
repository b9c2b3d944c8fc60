"""What the compiler makes of each kernel's widest configurations on sm_90, and of all on three chips (`slow`).

No GPU is needed. Compiled in a process of its own, because this one interprets its kernels.
"""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ijepa_kernels import aot
from ijepa_kernels.aot import Compiled
from ijepa_kernels.dispatch import tl, triton
from ijepa_kernels.shipped import Shipped

pytestmark = pytest.mark.long  # compiles every kernel

TABLE = Path(__file__).parents[2] / "docs/kernels_compiled.md"


SLOW = [pytest.param(["--arch", arch], marks=pytest.mark.slow, id=arch) for arch in ("80", "90", "100")]


@pytest.fixture(scope="module", params=[pytest.param(["--arch", "90", "--widest"], id="90-widest"), *SLOW])
def rows(request, tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "IJEPA_KERNELS")}
    command = [sys.executable, "-m", "ijepa_kernels.aot", *request.param, "--json", str(file)]
    # An oversized tile keeps ptxas busy for minutes: the limit is what tells.
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert file.exists(), result.stderr
    rows = json.loads(file.read_text())
    assert {str(row["arch"]) for row in rows} == {request.param[1]}
    return rows


def name(row: dict) -> str:
    return f"{row['module']}: {row['kernel']} ({row['title']}) on sm_{row['arch']}"


def test_every_configuration_compiles_and_has_no_fault(rows):
    """No spills, 16-byte loads and stores, tensor cores where there is a dot, shared memory within the chip's."""
    assert {name(row): row["faults"] for row in rows if row["faults"]} == {}


def test_every_kernel_is_shipped(rows):
    """A kernel that no `shipped()` lists would be compiled for the first time on a user's machine."""
    shipped = {(row["module"], row["kernel"]) for row in rows}
    for module, position in aot.configurations():
        ship = importlib.import_module(module).shipped()[position]
        if ship.first_arch > rows[0]["arch"]:
            shipped.add((module.rpartition(".")[2], ship.kernel.__name__.strip("_")))
    for file in Path(aot.__file__).parent.glob("*.py"):
        for kernel in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def _?(\w+_kernel)\(", file.read_text(), re.MULTILINE):
            assert (file.stem, kernel) in shipped


def test_the_table_in_the_docs_lists_what_is_shipped():
    """Else: `python -m ijepa_kernels.aot --markdown docs/kernels_compiled.md`. Its numbers are its triton's."""
    table = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in TABLE.read_text().splitlines()]
    listed = [cells for cells in table if len(cells) == 3 and cells[2].startswith("sm_")]
    want = []
    for module, position in aot.configurations():
        ship = importlib.import_module(module).shipped()[position]
        kernel = f"{module.rpartition('.')[2]}: `{ship.kernel.__name__.strip('_')}`"
        want += [(kernel, ship.title(), f"sm_{arch}") for arch in aot.ARCHS if arch >= ship.first_arch]
    assert listed == want


def test_ema_moves_a_full_chunk_without_masks(rows):
    """Four 16-byte loads a list of fp32: the branch for full chunks stays vectorised (a masked one is scalar)."""
    fp32 = [row for row in rows if row["module"] == "ema" and "SOURCE=fp32" in row["title"]]
    assert fp32
    for row in fp32:
        assert row["loads"]["16"] == 8, name(row)
        assert row["stores"]["16"] >= 4, name(row)


def test_loss_touches_its_tensors_in_16_byte_pieces_alone(rows):
    """The narrower accesses are its scalars: a search step, image, index and lengths; one partial sum a row."""
    forward = [row for row in rows if row["kernel"] == "loss_fwd_kernel"]
    assert forward
    for row in forward:
        assert set(row["loads"]) == {"16", "4"}, name(row)
        scalars = 13 if "PADDED=True" in row["title"] else 10  # where the padding begins, and the denominator
        assert row["loads"]["4"] <= scalars, name(row)
        assert row["stores"]["4"] == 1, name(row)


def test_column_sum_reads_in_16_byte_pieces_alone(rows):
    """Its stores are narrow, a row of sums a program, so that the check for both does not look at the loads."""
    sums = [row for row in rows if row["module"] == "sums"]
    assert sums
    for row in sums:
        assert set(row["loads"]) == {"16"}, name(row)
        assert (row["spills"], row["stack"]) == (0, 0), name(row)


SIZES = dict(registers=32, stack=0, shared=0, spills=0, tensor_core=4, loads={"16": 2}, stores={"16": 1})
GOOD = dict(module="m", kernel="k", title="", arch=90, vector_bytes=16, dot=True) | SIZES


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"spills": 3}, "3 instructions"),
        ({"spills": 3, "note": "faster all the same"}, None),
        ({"shared": 228 * 1024}, "shared memory: 233472 of 232448 bytes"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"tensor_core": 0, "dot": False}, None),
        ({"loads": {"8": 4, "4": 1}}, "widest global load is 8 bytes, wanted 16"),
        ({"stores": {}}, "widest global store is None bytes, wanted 16"),
        ({"stores": {"4": 1}, "vector_bytes": 4}, None),
    ],
)
def test_faults(change, fault):
    faults = Compiled(**GOOD | change).faults()
    assert [fault in f for f in faults] == ([True] if fault else [])


@triton.jit
def _some_kernel(x_ptr, packed_indices_ptr, scale, num_rows, stride, BLOCK: tl.constexpr):
    pass


def test_a_signature_comes_from_the_kernel_s_own_arguments():
    ship = Shipped(_some_kernel, {"scale": "fp32", "x_ptr": "bf16"}, {"BLOCK": 8, "stride": 1})
    want = {"x_ptr": "*bf16", "packed_indices_ptr": "*i32", "scale": "fp32", "num_rows": "i32"}
    assert list(ship.signature.items()) == list(want.items())
    assert ship.title() == "bf16 i32, BLOCK=8, stride=1, warps=4"


@pytest.mark.parametrize(
    ("types", "constexprs", "says"),
    [
        ({}, {"BLOCK": 8}, "the pointer x_ptr has no type"),
        ({"x_ptr": "bf16"}, {}, "the constexpr BLOCK has no value"),
        ({"x_ptr": "bf16", "y_ptr": "bf16"}, {"BLOCK": 8}, "_some_kernel has no argument y_ptr"),
    ],
)
def test_a_signature_that_does_not_fit_its_kernel_says_so(types, constexprs, says):
    with pytest.raises(ValueError, match=says):
        _ = Shipped(_some_kernel, types, constexprs).signature


def test_widths_of_instructions():
    sass = ["LDG.E.128.CONSTANT", "LDG.E.U16", "LDG.E", "LDG.E.64", "LDG.E.U8.CONSTANT", "LDGSTS.E.BYPASS.128"]
    assert aot._widths(sass) == {"16": 2, "8": 1, "4": 1, "2": 1, "1": 1}
