"""The plain PyTorch form of varlen_attention: what a CPU runs, and IJEPA_KERNELS=torch anywhere.

Neighbouring sequences of one length are computed together, in one of two ways: the fused call, which keeps no weights,
or matrix products over a group of sequences whose weights fit the cache. Time of the products over that of the fused,
fp32, torch 2.13, two cores of an AVX2 EPYC, 3000 tokens, forward and backward at 3 to 16 heads of 24 to 80 (one thread:
0.1 more):

    tokens a sequence           8 to 32        48         64         90        128        196
    neighbours of one length  0.2 to 0.8  0.6 to 0.9 0.7 to 0.9 0.7 to 0.9 0.7 to 0.9 0.8 to 1.0
    a single sequence         0.9 to 1.4  0.8 to 1.1 0.8 to 1.1 0.8 to 1.0 0.8 to 0.9 0.8 to 0.9

Forward alone the two are equal between 64 and 160 tokens, and the fused call is faster above.

Sequences of one length that are not neighbours are left apart: gathering them and scattering the result costs more than
the calls it saves (16 to 64 sequences of 60 to 196 tokens, forward and backward: 1.1 to 1.4 times the time).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .compat import flash_attention_cpu, flash_attention_cpu_backward, softmax_backward

LONGEST_PRODUCT = 256  # tokens; above, the fused call is nearly as fast, without the memory that weights take
LONGEST_PRODUCT_INFERENCE = 128
SHORTEST_SINGLE = 48  # tokens of a sequence between others of another length; below, calls cost more than work
GROUP_BYTES = 1_000_000  # of a group's weights


def _can_fuse(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _is_wide(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


class _Run(NamedTuple):
    count: int  # sequences
    length: int  # of each
    fused: bool  # one call; else the weights are materialised

    def tokens(self) -> int:
        return self.count * self.length

    def view(self, x: Tensor) -> Tensor:
        """This run's rows [tokens, heads, head_dim] with the heads in front: [count, heads, length, head_dim]."""
        return x.unflatten(0, self[:2]).transpose(1, 2)


def _runs(q: Tensor, cu_seqlens: Tensor, *, save_memory: bool, keep: bool) -> list[_Run]:
    """The runs of equal-length neighbours, less the empty sequences; those to materialise in groups."""
    runs, element = [], q.element_size()
    longest = LONGEST_PRODUCT if keep else LONGEST_PRODUCT_INFERENCE
    for length, run in groupby(n for n in cu_seqlens.diff().tolist() if n):
        count = len(list(run))
        slow = length > longest or (count == 1 and length < SHORTEST_SINGLE)
        if _can_fuse(q) and (save_memory or slow):
            runs.append(_Run(count, length, True))
            continue
        most = max(1, GROUP_BYTES // (element * q.shape[1] * length**2))
        runs += [_Run(min(most, count - first), length, False) for first in range(0, count, most)]
    return runs


def _parts(runs: list[_Run], *tensors: Tensor) -> Iterator[tuple[_Run, list[Tensor]]]:
    """Each run with its views of [T, heads, head_dim] tensors; what is written to a view is written to the tensor."""
    sizes = [run.tokens() for run in runs]
    for run, *parts in zip(runs, *(x.split(sizes) for x in tensors), strict=True):
        yield run, [run.view(part) for part in parts]


def _stack(x: Tensor) -> Tensor:
    """[count, heads, ...] as the batch of `bmm`: a view of a single sequence, a copy of several."""
    return x.flatten(0, 1)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T), [count * heads, length, length]."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """out [count, heads, m, n] = scale * a b, of `_stack`s. `out=` would be slow: the rows of `out` lie apart."""
    out.copy_(torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale).view(out.shape))


def forward(
    q: Tensor,  # [T, heads, head_dim], as are k and v
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,  # int32 [S+1]
    scale: float,
    *,
    save_memory: bool = False,
    keep: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The output and, for each run, what its backward needs: the log-sum-exp of a fused one, the weights of another.

    `save_memory` keeps the weights of none: on a CPU every run is fused, elsewhere `backward` computes them again.
    Without `keep` there is to be no backward.
    """
    if not _is_wide(q):  # in 16 bits the weights and their gradients would be rounded, and a CPU is slower
        wide = (x.float() for x in (q, k, v))
        out, kept = forward(*wide, cu_seqlens, scale, save_memory=save_memory, keep=keep)
        return out.to(q.dtype), kept
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    runs, kept = _runs(q, cu_seqlens, save_memory=save_memory, keep=keep), []
    with torch.autocast(q.device.type, enabled=False):  # the dtype is the caller's choice, and `out=` takes no other
        for run, (run_q, run_k, run_v, run_out) in _parts(runs, q, k, v, out):
            if run.fused:
                result, lse = flash_attention_cpu(run_q, run_k, run_v, 0.0, False, attn_mask=None, scale=scale)
                run_out.copy_(result)
                if keep:
                    kept.append(lse)
            else:
                weights = _weights(_stack(run_q), _stack(run_k), scale)
                _multiply_into(run_out, weights, _stack(run_v))
                if keep and not save_memory:
                    kept.append(weights)
    return out, kept


def backward(
    grad: Tensor,  # [T, heads, head_dim], as are q, k, v and out
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: list[Tensor],
    cu_seqlens: Tensor,  # int32 [S+1]
    scale: float,
    *,
    save_memory: bool = False,
    grads: Sequence[Tensor] | None = None,  # [T, heads, head_dim] of any strides, to be filled
) -> Sequence[Tensor]:
    """The gradients of q, k and v, given what `forward` kept under the same `save_memory`."""
    if grads is None:
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    if not _is_wide(q):
        wide = (x.float() for x in (grad, q, k, v, out))
        for to, value in zip(grads, backward(*wide, kept, cu_seqlens, scale, save_memory=save_memory), strict=True):
            to.copy_(value)
        return grads
    runs, kept = _runs(q, cu_seqlens, save_memory=save_memory, keep=True), iter(kept)
    with torch.autocast(q.device.type, enabled=False):
        for run, (run_grad, *qkv, run_out, dq, dk, dv) in _parts(runs, grad, q, k, v, out, *grads):
            if run.fused:
                lse = next(kept)
                results = flash_attention_cpu_backward(
                    run_grad, *qkv, run_out, lse, 0.0, False, attn_mask=None, scale=scale
                )
                for to, value in zip((dq, dk, dv), results, strict=True):
                    to.copy_(value)
            else:
                run_grad, run_q, run_k, run_v = map(_stack, (run_grad, *qkv))
                weights = _weights(run_q, run_k, scale) if save_memory else next(kept)
                _multiply_into(dv, weights.transpose(1, 2), run_grad)
                grad_weights = torch.bmm(run_grad, run_v.transpose(1, 2))
                grad_logits = softmax_backward(grad_weights, weights)
                _multiply_into(dq, grad_logits, run_k, scale)
                _multiply_into(dk, grad_logits.transpose(1, 2), run_q, scale)
    return grads


def forward_with_lse(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `forward`, keeping one tensor of a shape known beforehand, [heads, T]: the runs' log-sum-exps in a row."""
    out, kept = forward(q, k, v, cu_seqlens, scale, save_memory=True)
    lse = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    if kept:
        torch.cat([x.reshape(-1) for x in kept], out=lse.view(-1))
    return out, lse


def backward_with_lse(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    grads: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """As `backward`, given what `forward_with_lse` kept."""
    heads = q.shape[1]
    runs = [run for run in _runs(q, cu_seqlens, save_memory=True, keep=True) if run.fused]
    rows = lse.view(-1).split([run.tokens() * heads for run in runs]) if runs else ()
    kept = [x.view(run.count, heads, run.length) for run, x in zip(runs, rows, strict=True)]
    return backward(grad, q, k, v, out, kept, cu_seqlens, scale, save_memory=True, grads=grads)
