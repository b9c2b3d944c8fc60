"""The backends of varlen_attention, and which of them `auto` takes.

A library is imported when it is first needed, and called through its own public function, which has its own autograd.
To add one: a function that calls it, a function that says why it cannot be used, a line in BACKENDS.
"""
from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_triton
from .compat import assume_constant_result
from .dispatch import HAS_TRITON, INTERPRETED, MODES, WANTED

# Where our kernel was measured to be faster than every usable library, forward and backward together, at the lengths of
# contexts and predictor sequences: (head_dim, dtype, sm major). Elsewhere `auto` takes it only where no library before
# it in the order can be used. Whole images without gradients: see `takes_one_call`. Not by hand: written by
# `python bench/attention_choice.py --write` from the records in bench/results.
MEASURED_FASTER = frozenset(
    (head_dim, torch.bfloat16, major)
    for major, head_dims in (  # major compute capability
        # NVIDIA H100 80GB HBM3, 2026-11-26, beside torch_varlen: 1.4 to 2.9 times as fast
        (9, (24, 32, 64, 80, 88)),
    )
    for head_dim in head_dims
)

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _call_fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _call_varlen_func(flash_attn_varlen_func, q, k, v, cu_seqlens, max_seqlen, scale)


def _call_fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return _call_varlen_func(flash_attn_varlen_func, q, k, v, cu_seqlens, max_seqlen, scale)


def _call_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _call_varlen_func(flash_attn_varlen_func, q, k, v, cu_seqlens, max_seqlen, scale)


def _call_varlen_func(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp


def _call_torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The other keyword arguments are not the same in torch 2.11 and 2.13.
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)


def _call_xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from xformers.ops import fmha

    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist())
    return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]


class _Case(NamedTuple):
    """The head dim, dtype and device that a backend is asked to serve."""

    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device)

    def why_not_library(self, module: str, dtypes: tuple[torch.dtype, ...], largest_head_dim: int) -> str | None:
        """Why a CUDA library cannot be used, or None."""
        if self.device.type != "cuda":
            return "runs on CUDA devices only"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if self.dtype not in dtypes:
            return f"takes {_names(dtypes)} only"
        if self.head_dim > largest_head_dim:
            return f"takes head dims up to {largest_head_dim}"
        if self.capability() < (8, 0):
            return "needs sm_80 or later"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or module
            return f"{module} is not installed" if module.startswith(missing) else f"{module} needs {missing}"
        except Exception as error:  # built for another torch or CUDA; whatever it raises, the others still work
            return f"{module} does not import: {error}"
        return None


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _why_not_fa3(case: _Case) -> str | None:
    why = case.why_not_library("flash_attn_interface", SIXTEEN_BIT, 256)
    return why or (None if case.capability()[0] == 9 else "is built for sm_90")


def _why_not_fa4(case: _Case) -> str | None:
    why = case.why_not_library("flash_attn.cute", SIXTEEN_BIT, 128)
    if why or case.capability()[0] >= 10:
        return why
    if case.capability()[0] != 9:
        return "is built for sm_90 and later"
    # flash-attention's open pull request 2896 doubts its backward on Hopper. Not tested here.
    return "its sm_90 backward is in doubt where head_dim is no multiple of 32" if case.head_dim % 32 else None


def _why_not_triton(case: _Case) -> str | None:
    if WANTED and not HAS_TRITON:
        return "triton is not installed"
    if case.dtype not in (*SIXTEEN_BIT, torch.float32):
        return f"takes {_names((*SIXTEEN_BIT, torch.float32))} only"
    largest = attention_triton.LARGEST_HEAD_DIM[torch.finfo(case.dtype).bits]
    if case.head_dim > largest:
        return f"takes head dims up to {largest} in {_names((case.dtype,))}"
    if case.device.type == "cpu" and INTERPRETED:
        return None
    if case.device.type != "cuda" or INTERPRETED:
        return "runs on CUDA devices, and on a CPU under IJEPA_KERNELS=interpret"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None if case.capability() >= (8, 0) else "needs sm_80 or later"


def _why_not_torch_varlen(case: _Case) -> str | None:
    return case.why_not_library("torch.nn.attention.varlen", SIXTEEN_BIT, 256)


def _why_not_flash_attn(case: _Case) -> str | None:
    return case.why_not_library("flash_attn", SIXTEEN_BIT, 256)


def _why_not_xformers(case: _Case) -> str | None:
    why = case.why_not_library("xformers.ops.fmha", (*SIXTEEN_BIT, torch.float32), 128)
    if why:
        return why
    from xformers.ops import fmha

    # A wheel for another torch imports, says that its operators are there, and fails when it is called.
    one = torch.zeros(1, 1, 1, case.head_dim, dtype=case.dtype, device=case.device)
    try:
        fmha.memory_efficient_attention(one, one, one)
    except NotImplementedError:
        return "it has no operators for this torch and device (`python -m xformers.info` lists them)"
    return None


class Backend(NamedTuple):
    what: str
    why_not: Callable[[_Case], str | None]  # a reason that it cannot be used, or None
    call: Callable[..., Tensor] | None = None  # a library; the other two are `ijepa::varlen_attention`


BACKENDS = {
    "fa3": Backend("FlashAttention-3", _why_not_fa3, _call_fa3),
    "fa4": Backend("FlashAttention-4", _why_not_fa4, _call_fa4),
    "torch_varlen": Backend("torch.nn.attention.varlen", _why_not_torch_varlen, _call_torch_varlen),
    "flash_attn": Backend("FlashAttention-2", _why_not_flash_attn, _call_flash_attn),
    "xformers": Backend("xformers; waits for the device to read the lengths", _why_not_xformers, _call_xformers),
    "triton": Backend("our kernel", _why_not_triton),
    "torch": Backend("plain PyTorch; reads the lengths on the host", lambda case: None),
}


def _order(case: _Case) -> list[str]:
    """The order in which `auto` asks."""
    major = case.capability()[0] if case.device.type == "cuda" and torch.cuda.is_available() else 0
    order = list(BACKENDS)
    if case.dtype == torch.float32 or (case.head_dim, case.dtype, major) in MEASURED_FASTER:
        order.remove("triton")
        order.insert(order.index("torch_varlen"), "triton")
    return order


@assume_constant_result  # a compiler calls it and does not trace it
def choose(head_dim: int, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """The name of the backend to use. Raises ValueError where the one that is named cannot be used."""
    mode = os.environ.get("IJEPA_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"IJEPA_KERNELS must be one of {', '.join(MODES)}, got {mode!r}")
    return _choose(_Case(head_dim, dtype, device), backend, mode)


def takes_one_call(
    head_dim: int, dtype: torch.dtype, device: torch.device, num_tokens: int, num_sequences: int, max_seqlen: int
) -> bool:
    """Whether `auto` without gradients batches the sequences: the target encoder's, which are whole images.

    On an H100, in bf16 at head dims 64, 80 and 88, `scaled_dot_product_attention` was then 1.23 to 1.45 times as fast
    as our kernel and 1.4 to 1.8 times as torch.nn.attention.varlen; FlashAttention 3 and 4 were not there to compare.
    With gradients ours was as fast or faster. That all lengths are equal the host must know from their number: none is
    longer than `max_seqlen`.
    """
    return (
        device.type == "cuda"
        and dtype in SIXTEEN_BIT
        and 0 < num_tokens == num_sequences * max_seqlen
        and os.environ.get("IJEPA_KERNELS", "auto") == "auto"
        and choose(head_dim, dtype, device) not in ("fa3", "fa4")
    )


def one_call(q: Tensor, k: Tensor, v: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Attention inside sequences that are all `max_seqlen` long, as `varlen_attention` returns it."""
    q, k, v = (x.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (q, k, v))  # [S, heads, max_seqlen, head_dim]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1).contiguous()


@functools.cache
def _choose(case: _Case, backend: str, mode: str) -> str:
    if backend == "auto" and mode != "auto":
        backend = "torch" if mode == "torch" else "triton"
    if backend == "auto":
        if case.device.type != "cuda":
            return "torch"
        return next(name for name in _order(case) if BACKENDS[name].why_not(case) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend: want auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    why = BACKENDS[backend].why_not(case)
    if why:
        raise ValueError(
            f"backend: {backend} ({BACKENDS[backend].what}) cannot be used for head_dim {case.head_dim}, "
            f"{_names((case.dtype,))} on {case.device}: {why}"
        )
    return backend


def explain_backends(
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> str:
    """Which backend `varlen_attention(backend="auto")` takes, and why not the others: a text to print.

    dtype:  bf16 on CUDA, fp32 elsewhere if None.
    device: the current CUDA device if None, or the CPU where there is none. May name a device that is not there.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    case = _Case(head_dim, dtype, device)
    where = str(device)
    if device.type == "cuda" and torch.cuda.is_available():
        where += " ({}, sm_{}{})".format(torch.cuda.get_device_name(device), *case.capability())
    elif device.type == "cuda":
        where += " (no such device here)"
    mode = os.environ.get("IJEPA_KERNELS", "auto")
    taken = choose(head_dim, dtype, device)
    because = "" if mode == "auto" else f" (IJEPA_KERNELS={mode})"
    lines = [f"head_dim {head_dim}, {_names((dtype,))}, {where}: auto takes {taken}{because}"]
    for name in _order(case):
        backend = BACKENDS[name]
        why = backend.why_not(case)
        if name == taken:
            verdict = "taken"
        elif why:
            verdict = f"cannot be used: {why}"
        elif name == "triton" and device.type == "cuda":
            verdict = "usable; no measurement says that it is the fastest here"
        else:
            verdict = "usable"
        lines.append(f"  {name:<13} {backend.what}: {verdict}")
    if takes_one_call(head_dim, dtype, device, 1, 1, 1):
        lines.append("without gradients, all sequences max_seqlen long: one call of scaled_dot_product_attention")
    return "\n".join(lines)
