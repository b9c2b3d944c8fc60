"""Which file may import which: no circle, not even one that a late import hides."""
import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {"ijepa_fast": "ijepa_fast", "ijepa_kernels": "kernels/ijepa_kernels"}
ROOT = Path(__file__).parents[1]


def imports(package: str) -> dict[str, set[str]]:
    """The modules of a package that each of them imports; for types alone does not count."""
    folder, graph = ROOT / PACKAGES[package], {}
    for path in folder.rglob("*.py"):
        module = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        aside = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        aside = [node for node in aside if ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")]
        left_out = {part for node in aside for part in ast.walk(node)}
        graph[module] = set()
        for node in set(ast.walk(tree)) - left_out:
            if isinstance(node, ast.ImportFrom) and node.module == package:
                graph[module] |= {f"{package}.{name.name}" for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package):
                graph[module].add(node.module)
            elif isinstance(node, ast.Import):
                graph[module] |= {name.name for name in node.names if name.name.startswith(package)}
    return graph


def test_no_circle():
    graph = imports("ijepa_fast")
    assert "ijepa_fast.model" in graph["ijepa_fast.run"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_ops_do_not_import_the_driver():
    for path in (ROOT / PACKAGES["ijepa_kernels"]).rglob("*.py"):
        assert "ijepa_fast" not in path.read_text(), path


def test_a_rank_is_told_without_the_model():
    """What checkpoints and evaluation need of the processes; also that a package imports nothing by itself."""
    graph = imports("ijepa_fast")
    seen, ahead = set(), {"ijepa_fast.checkpoint", "ijepa_fast.distributed"}
    while ahead:
        seen.add(module := ahead.pop())
        ahead |= graph.get(module, set()) - seen
    assert "ijepa_fast.model" not in seen


@pytest.mark.parametrize("module", ["torch", "numpy", "pydantic"])
def test_importing_the_package_alone_is_light(module):
    code = f"import sys, ijepa_fast; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
