"""Private parts of other libraries that ijepa_fast depends on: what each does, and what to do when it moves."""
import contextlib
import logging
import shlex
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def mark_dynamic(x: "Tensor") -> None:
    """Make the first dimension of `x` a symbol to the compiler, not a number to compile for.

    `torch._dynamo.maybe_mark_dynamic` (torch 2.11 to 2.13), unlike the public `mark_dynamic`, is no error where the
    length turns out to be constant. Without it: `torch.compile(dynamic=True)`, which makes widths symbols too.
    """
    import torch

    torch._dynamo.maybe_mark_dynamic(x, 0)


def foreach_copy_(to: "list[Tensor]", of: "list[Tensor]") -> None:
    """`copy_` over lists, in a few launches; casts on the way.

    `torch._foreach_copy_` (torch 2.11 to 2.13). Without it: a loop over `copy_`, a launch for each tensor.
    """
    import torch

    torch._foreach_copy_(to, of)


def foreach_add_(to: "list[Tensor]", of: "Sequence[Tensor]") -> None:
    """`add_` over lists. `torch._foreach_add_` (torch 2.11 to 2.13). Without it: a loop, a launch each."""
    import torch

    torch._foreach_add_(to, list(of))


def foreach_zero_(of: "list[Tensor]") -> None:
    """`zero_` over a list. `torch._foreach_zero_` (torch 2.11 to 2.13). Without it: a loop, a launch each."""
    import torch

    torch._foreach_zero_(of)


def has_onednn_linear() -> bool:
    """Whether `onednn_linear` is there: the operator `mkldnn::_linear_pointwise` (torch 2.11 to 2.13).

    The compiler makes it of linear layers on a CPU. Without it: `F.linear`, by MKL.
    """
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: "Tensor", weight: "Tensor", bias: "Tensor | None" = None, activation: Literal["none", "gelu"] = "none"
) -> "Tensor":
    """`F.linear`, and the exact GELU of it, in fp32 on a CPU; of matrices of any strides, without a gradient."""
    import torch

    algorithm = "none" if activation == "gelu" else ""  # the exact one: the other is "tanh"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def changes(x: "Tensor") -> int:
    """How often `x` was changed in place, by which autograd notices that what it saved is no longer there.

    The attribute `_version` (torch 2.11 to 2.13). Without it: a number that is new at every call, so that copies of
    weights are made at every forward.
    """
    return x._version


def allow_graphs(number: int) -> None:
    """Let one function be compiled so often, for other dtypes, widths or arguments; more is an error.

    `torch._dynamo.config.recompile_limit` (torch 2.11 to 2.13), 8 unless set. Without it: that default.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)


def silence_checkpointed_compile() -> None:
    """Compiled blocks with activation checkpointing warn, on every rank, of operations in place; ours have none.

    The warning comes from the logger of the module `torch._higher_order_ops.wrap`. If that is renamed it is seen again,
    and no more.
    """
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


@contextlib.contextmanager
def single_process_checkpoints() -> Iterator[None]:
    """Inside, torch.distributed.checkpoint does not warn that it runs in a single process, which it is made for.

    Only the words of the warning identify it. It acts on all threads, so enter it in the main one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def silence_board_thread() -> None:
    """TensorBoard's writer thread prints a traceback when the disk is full; its next flush raises the same error here.

    `_AsyncWriterThread` of tensorboard's event_file_writer. If it is renamed the traceback is seen again, and no more.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook


def sbatch_script(folder: Path, **options: Any) -> str:
    """The script that submitit's SlurmExecutor would submit from `folder`.

    `_make_sbatch_string` and the module that its job runs, `submitit.core._submit` (submitit 1.5). If they move, only
    `launch --print` fails.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **options)
