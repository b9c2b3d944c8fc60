"""What a CUDA graph does, on a CPU: record operators without effect, and run them again on the same memory.

Python between the operators is not run again, and a number that it gave to one stays what it was, as in a graph. Of
what no capture allows only reads of the host are noticed: what an op's kernel does inside is not seen.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written over, and what it held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function._schema.name != "aten::_local_scalar_dense", "the host reads a tensor: no graph captures that"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    self.before.setdefault(x.data_ptr(), (x, x.clone()))
        out = function(*args, **kwargs)
        if not function.is_view:
            self.calls.append((function, args, kwargs, out))
        return out


@torch.no_grad()
def _write(to: Tensor, of: Tensor) -> None:
    to.copy_(of)


def capture(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """The function's result, whose value is not there yet, and what computes it."""
    with _Recorder() as recorder:
        result = function()
    for written, held in recorder.before.values():
        _write(written, held)

    @torch.no_grad()
    def replay() -> None:
        for called, args, kwargs, out in recorder.calls:
            again = called(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    _write(old, new)

    return result, replay
