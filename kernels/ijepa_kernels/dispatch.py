"""Dispatch: whether an op runs its Triton kernel or its PyTorch form.

`IJEPA_KERNELS` overrides the choice, for debugging. It is read at every call:

    auto       Triton for CUDA tensors where Triton is installed, plain PyTorch elsewhere
    torch      plain PyTorch everywhere
    triton     Triton, and an error where it cannot run
    interpret  Triton's interpreter, on CPU tensors (tests; set it before the first import of this package)

`IJEPA_KERNELS_CHECK=1` is read in `checks.can_read`.
"""
from __future__ import annotations

import contextlib
import os
import sys

import torch
from torch import Tensor

if os.environ.get("IJEPA_KERNELS") == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, also those of triton's library

# A PyTorch built for CPUs alone has no tensors for a kernel: then triton, whose import takes longer than all the rest
# (0.2 of 0.26 CPU-seconds), is left out unless it is asked for.
WANTED = bool(
    torch.version.cuda
    or torch.version.hip
    or os.environ.get("IJEPA_KERNELS") in ("triton", "interpret")
    or os.environ.get("TRITON_INTERPRET") == "1"
)
HAS_TRITON = False
if WANTED:
    with contextlib.suppress(ImportError):  # Windows, macOS: the PyTorch forms are all there is
        import triton
        import triton.language as tl

        HAS_TRITON = True


class _Missing:
    """Stands for `triton` and `triton.language` where kernels are defined. None is ever launched."""

    def jit(self, fn=None, **_options):
        return fn if fn is not None else lambda fn: fn

    def __getattr__(self, name):
        return None


if not HAS_TRITON:
    triton = tl = _Missing()

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
MODES = ("auto", "torch", "triton", "interpret")


def use_triton(x: Tensor) -> bool:
    """Whether an op whose tensors live where `x` does runs its Triton kernel (else: its PyTorch form)."""
    mode = os.environ.get("IJEPA_KERNELS", "auto")
    if mode == "auto":
        return x.is_cuda and HAS_TRITON and not INTERPRETED
    if mode == "torch":
        return False
    if mode not in MODES:
        raise ValueError(f"IJEPA_KERNELS must be one of {', '.join(MODES)}, got {mode!r}")
    if WANTED and not HAS_TRITON:
        raise ValueError(f"IJEPA_KERNELS={mode}, but triton is not installed")
    if mode == "triton":
        if not x.is_cuda or INTERPRETED:
            where = "under TRITON_INTERPRET=1" if INTERPRETED else f"to tensors on {x.device}"
            raise ValueError(f"IJEPA_KERNELS=triton needs CUDA tensors and compiled kernels, but it came {where}")
    elif x.is_cuda or not INTERPRETED:
        raise ValueError("IJEPA_KERNELS=interpret needs CPU tensors and must be set before ijepa_kernels and triton "
                         f"are imported, got tensors on {x.device}, "
                         f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}")
    return True
