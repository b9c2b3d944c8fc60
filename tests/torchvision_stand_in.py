"""Import timm where torchvision cannot be: beside a torch for CPUs, since torchvision's wheel is linked to CUDA's.

timm imports torchvision for its transforms and data sets, which no test uses; its models need one class of it to exist.
"""
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


class _Named(type):
    """A class whose missing attributes are strings: `InterpolationMode.BILINEAR` at import."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Named(name, (), {})

        module.__getattr__ = missing


@contextmanager
def _stand_in() -> Iterator[None]:
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:  # or transformers would believe that torchvision is there
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_timm() -> ModuleType:
    """timm, or the test is skipped where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm")
    with _stand_in():
        return pytest.importorskip("timm")
