"""Attention inside each of many packed sequences, never across them.

    out[i, h] = sum_j softmax_j(scale * <q[i, h], k[j, h]>) v[j, h],    j over the sequence that holds token i

Softmax attention (arXiv 1706.03762, eq. 1) under a block-diagonal mask that is never built: no padding, no boolean
mask, no causal mask. The fewest bytes move 4 * T * heads * head_dim elements forward; the [length, length] weights stay
on the chip.

The code is in `attention_torch` (CPU), `attention_triton` (our kernel) and `attention_backends` (libraries, and who is
taken). Where sequences are long and all of one length, `F.scaled_dot_product_attention` on a batch is as good.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention_backends, attention_torch, attention_triton
from .attention_backends import explain_backends
from .checks import can_read, check_int, check_tensor, describe, is_number
from .registration import is_plain_eager, register

__all__ = ["explain_backends", "varlen_attention", "varlen_attention_qkv", "varlen_attention_ref"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def varlen_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> Tensor:
    """The formula, one dense softmax a sequence, in the dtype of its inputs (tests give it float64)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        weights = torch.einsum("ihd,jhd->hij", q[begin:end] * scale, k[begin:end]).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
    return torch.cat(out)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return attention_triton.forward(q, k, v, cu_seqlens, max_seqlen, scale)
    return attention_torch.forward_with_lse(q, k, v, cu_seqlens, scale)


def _forward_fake(q, k, v, cu_seqlens, max_seqlen, scale, backend):
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse)


def _backward(grad: Tensor, q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    _fill((dq, dk, dv), grad, q, *rest)
    return dq, dk, dv


def _fill(
    grads: Sequence[Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    backend: str,
) -> None:
    """Write the gradients of q, k and v into `grads`, contiguous tensors or views of one [T, 3, heads, head_dim]."""
    if backend == "triton":
        attention_triton.backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, grads)
    else:
        attention_torch.backward_with_lse(grad.contiguous(), q, k, v, out, lse, cu_seqlens, scale, grads)


def _backward_fake(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backward_op = register(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "SymInt max_seqlen, float scale, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.arguments = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _autograd(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 7
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


_forward_op = register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, str backend) "
    "-> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


# Eager code is spared the cost of registration, and PyTorch's form may keep weights, not only the log-sum-exp.


def _forward_eager(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, backend: str
) -> tuple[Tensor, list[Tensor]]:
    if backend == "triton":
        out, lse = attention_triton.forward(q, k, v, cu_seqlens, max_seqlen, scale)
        return out, [lse]
    return attention_torch.forward(q, k, v, cu_seqlens, scale)


def _backward_eager(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    kept: list[Tensor],
    max_seqlen: int,
    scale: float,
    backend: str,
    grads: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    if backend == "triton":
        return attention_triton.backward(grad, q, k, v, out, *kept, cu_seqlens, max_seqlen, scale, grads)
    return attention_torch.backward(grad.contiguous(), q, k, v, out, kept, cu_seqlens, scale, grads=grads)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, *arguments):
        out, kept = _forward_eager(q, k, v, cu_seqlens, *arguments)
        ctx.save_for_backward(q, k, v, out, cu_seqlens, *kept)
        ctx.arguments = arguments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, cu_seqlens, *kept = ctx.saved_tensors
        return *_backward_eager(grad, q, k, v, out, cu_seqlens, kept, *ctx.arguments), None, None, None, None


class _EagerQkv(torch.autograd.Function):
    """As `_Eager`, with one gradient for all three."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, *arguments):
        out, kept = _forward_eager(*qkv.unbind(1), cu_seqlens, *arguments)
        ctx.save_for_backward(qkv, out, cu_seqlens, *kept)
        ctx.arguments = arguments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, out, cu_seqlens, *kept = ctx.saved_tensors
        grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        _backward_eager(grad, *qkv.unbind(1), out, cu_seqlens, kept, *ctx.arguments, grad_qkv.unbind(1))
        return grad_qkv, None, None, None, None


def _forward_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(1), cu_seqlens, max_seqlen, scale, backend)


def _forward_qkv_fake(qkv, cu_seqlens, max_seqlen, scale, backend):
    return _forward_fake(*qkv.unbind(1), cu_seqlens, max_seqlen, scale, backend)


def _backward_qkv(grad: Tensor, qkv: Tensor, *rest) -> Tensor:
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _fill(grad_qkv.unbind(1), grad, *qkv.unbind(1), *rest)
    return grad_qkv


_backward_qkv_op = register(
    "varlen_attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "SymInt max_seqlen, float scale, str backend) -> Tensor",
    _backward_qkv,
    lambda grad, qkv, *_: qkv.new_empty(qkv.shape),
)


def _setup_context_qkv(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.arguments = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)


def _autograd_qkv(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 5
    return _backward_qkv_op(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


_forward_qkv_op = register(
    "varlen_attention_qkv(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, str backend) "
    "-> (Tensor out, Tensor lse)",
    _forward_qkv,
    _forward_qkv_fake,
    setup_context=_setup_context_qkv,
    backward=_autograd_qkv,
)


def varlen_attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`varlen_attention(*qkv.unbind(1), ...)` of `qkv` [T, 3, heads, head_dim], with one gradient for all three.

    It is written where it belongs; the gradients of three views would be copied into one. All else is as in
    `varlen_attention`.
    """
    check_tensor("qkv", qkv, "T, 3, heads, head_dim", DTYPES)
    q, k, v = qkv.unbind(1)
    if torch.is_grad_enabled() and qkv.requires_grad:
        _check(q, k, v, cu_seqlens, max_seqlen, scale)
        head_dim = len(range(q.shape[2]))  # as in varlen_attention
        backend = attention_backends.choose(head_dim, q.dtype, q.device, backend)
        if attention_backends.BACKENDS[backend].call is None:  # ours
            arguments = qkv, cu_seqlens, max_seqlen, head_dim**-0.5 if scale is None else float(scale), backend
            eager = is_plain_eager() and type(qkv) is Tensor
            return _EagerQkv.apply(*arguments) if eager else _forward_qkv_op(*arguments)[0]
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale=scale, backend=backend)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside each packed sequence; differentiable in q, k and v (once).

    q, k, v:    [T, heads, head_dim] fp32, bf16 or fp16 (fp64 on a CPU), head_dim a multiple of 8; any strides with a
                contiguous last dimension: the three of `qkv.unbind(1)`, qkv [T, 3, heads, head_dim], are read in place.
    cu_seqlens: int32 [S + 1] on the device of q; sequence s is the rows cu_seqlens[s] : cu_seqlens[s + 1], and may be
                empty. Rises from 0 to T. Checked on a CPU; elsewhere under IJEPA_KERNELS_CHECK=1.
    max_seqlen: an upper bound of the lengths, constant over a run: as a Python int it is a guard of `torch.compile`.
    scale:      of the logits; head_dim ** -0.5 if None.
    backend:    "auto", or a name that `explain_backends` prints: fa3, fa4, torch_varlen, flash_attn, xformers, triton
                (our kernel), torch. On CUDA, in 16 bits and without gradients, auto makes one batched call where all
                lengths are `max_seqlen`.

    Returns [T, heads, head_dim], contiguous, in the dtype of q. Sums are fp32. On a CPU and with our kernel two runs
    are bitwise equal; the flash_attn family needs torch.use_deterministic_algorithms for that.
    Raises ValueError.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, scale)
    head_dim = len(range(q.shape[2]))  # an int to a compiler too, to which a shape may be a symbol
    scale = head_dim**-0.5 if scale is None else float(scale)
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "auto" and not gradients and not torch.compiler.is_compiling():
        sizes = q.shape[0], cu_seqlens.shape[0] - 1, max_seqlen
        if attention_backends.takes_one_call(head_dim, q.dtype, q.device, *sizes):
            return attention_backends.one_call(q, k, v, max_seqlen, scale)
    backend = attention_backends.choose(head_dim, q.dtype, q.device, backend)
    call = attention_backends.BACKENDS[backend].call
    if call is not None:
        # Libraries differ on what they do with no token at all.
        return call(q, k, v, cu_seqlens, max_seqlen, scale) if q.shape[0] else q + k + v
    arguments = (q, k, v, cu_seqlens, max_seqlen, scale, backend)
    if not is_plain_eager() or not type(q) is type(k) is type(v) is Tensor:
        return _forward_op(*arguments)[0]
    if gradients:
        return _Eager.apply(*arguments)
    if backend == "triton":
        return attention_triton.forward(*arguments[:-1])[0]
    return attention_torch.forward(q, k, v, cu_seqlens, scale, keep=False)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None) -> None:
    check_tensor("q", q, "T, heads, head_dim", DTYPES)
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: want what q is, {describe(q)}, got {describe(x)}")
    if q.shape[2] == 0 or q.shape[2] % 8:
        raise ValueError(f"q: want a head_dim that is a multiple of 8, got {q.shape[2]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"{name}: want a contiguous last dimension, got strides {x.stride()}")
    check_tensor("cu_seqlens", cu_seqlens, "S+1", (torch.int32,), q.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: want one entry more than there are sequences, got none")
    check_int("max_seqlen", max_seqlen)
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen: want an upper bound of the lengths, at least 1, got {max_seqlen}")
    if scale is not None and not (is_number(scale) and scale > 0):
        raise ValueError(f"scale: want a number > 0 or None, got {describe(scale)}")
    if can_read(cu_seqlens):
        ends, total = cu_seqlens.tolist(), q.shape[0]
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"cu_seqlens: want it to go from 0 to {total}, the tokens, got {ends[0]} to {ends[-1]}")
        for s, (begin, end) in enumerate(pairwise(ends)):
            if not 0 <= end - begin <= max_seqlen:
                raise ValueError(
                    f"cu_seqlens: want lengths of 0 to max_seqlen = {max_seqlen}, got {end - begin} for sequence {s}"
                )
