"""The plain PyTorch form of varlen_attention: what a CPU runs, and IJEPA_KERNELS=torch anywhere.

There are two ways through a run of neighbouring sequences of one length. Measured in fp32 with torch 2.13 on one thread
of an AVX-512 Xeon, forward and backward, head dims 24 to 80, each against the other:

    one fused call for the run       equal lengths on several threads; more than 128 tokens
    matrix products, one sequence    up to 128 tokens, for a single sequence or on a single thread: in 0.6 to 0.8 of
    at a time                        the time at head dims 64 and 80, 0.7 to 1.0 at 24 and 32 (1.1 at 24 and 128 tokens)

The products copy nothing (one head of one sequence is a strided matrix) and are spared the flash kernel's poor
remainders (lengths that are no multiple of 16); but each is a parallel region over the heads of one sequence alone, so
that several threads get through a run of many sequences better in one call.

Sequences of one length that are not neighbours are not brought together: the gather and its way back cost more than
the calls they save (16 to 64 sequences of 60 to 196 tokens, forward and backward: 1.1 to 1.4 times the time).
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_PRODUCT = 128  # tokens; above it the fused call wins on one thread too

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _can_fuse(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _is_wide(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


class _Run(NamedTuple):
    count: int  # sequences
    length: int  # of each
    fused: bool  # one call for all; else `count` is 1 and the weights are materialised

    def tokens(self) -> int:
        return self.count * self.length

    def view(self, x: Tensor) -> Tensor:
        """This run's rows [tokens, heads, head_dim] with the heads in front: [(count,) heads, length, head_dim]."""
        return x.unflatten(0, self[:2]).transpose(1, 2) if self.fused else x.transpose(0, 1)


def _runs(q: Tensor, cu_seqlens: Tensor, save_memory: bool) -> list[_Run]:
    """The runs of equal-length neighbours, less the empty sequences."""
    runs = []
    for length, group in groupby(n for n in cu_seqlens.diff().tolist() if n):
        count = len(list(group))
        few = count == 1 or torch.get_num_threads() == 1
        # Products of 16-bit matrices are slow on a CPU, and round the weights.
        if _can_fuse(q) and (save_memory or not (few and _is_wide(q) and length <= LONGEST_PRODUCT)):
            runs.append(_Run(count, length, True))
        else:
            runs += [_Run(1, length, False)] * count
    return runs


def _parts(runs: list[_Run], *tensors: Tensor) -> Iterator[tuple[_Run, list[Tensor]]]:
    """Each run with its views of [T, heads, head_dim] tensors; what is written to a view is written to the tensor."""
    sizes = [run.tokens() for run in runs]
    for run, *parts in zip(runs, *(x.split(sizes) for x in tensors), strict=True):
        yield run, [run.view(part) for part in parts]


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T), [heads, length, length]."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


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
    if not _can_fuse(q) and not _is_wide(q):  # in 16 bits the weights and their gradients would be rounded
        wide = (x.float() for x in (q, k, v))
        out, kept = forward(*wide, cu_seqlens, scale, save_memory=save_memory, keep=keep)
        return out.to(q.dtype), kept
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kept = []
    with torch.autocast(q.device.type, enabled=False):  # the dtype is the caller's choice, and `out=` takes no other
        for run, (run_q, run_k, run_v, run_out) in _parts(_runs(q, cu_seqlens, save_memory), q, k, v, out):
            if run.fused:
                result, lse = _flash(run_q, run_k, run_v, 0.0, False, attn_mask=None, scale=scale)
                run_out.copy_(result)
                if keep:
                    kept.append(lse)
            else:
                weights = _weights(run_q, run_k, scale)
                torch.bmm(weights, run_v, out=run_out)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given what `forward` kept under the same `save_memory`."""
    if not _can_fuse(q) and not _is_wide(q):
        wide = (x.float() for x in (grad, q, k, v, out))
        return tuple(x.to(q.dtype) for x in backward(*wide, kept, cu_seqlens, scale, save_memory=save_memory))
    grads = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    kept = iter(kept)
    with torch.autocast(q.device.type, enabled=False):
        for run, (run_grad, *qkv, run_out, dq, dk, dv) in _parts(
            _runs(q, cu_seqlens, save_memory), grad, q, k, v, out, *grads
        ):
            run_q, run_k, run_v = qkv
            if run.fused:
                lse = next(kept)
                results = _flash_backward(run_grad, *qkv, run_out, lse, 0.0, False, attn_mask=None, scale=scale)
                for to, value in zip((dq, dk, dv), results, strict=True):
                    to.copy_(value)
            else:
                weights = _weights(run_q, run_k, scale) if save_memory else next(kept)
                torch.bmm(weights.transpose(1, 2), run_grad, out=dv)
                grad_weights = torch.bmm(run_grad, run_v.transpose(1, 2))
                grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                torch.baddbmm(dq, grad_logits, run_k, beta=0, alpha=scale, out=dq)
                torch.baddbmm(dk, grad_logits.transpose(1, 2), run_q, beta=0, alpha=scale, out=dk)
    return grads


def forward_with_lse(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `forward`, keeping one tensor of a shape known beforehand, [heads, T]: the runs' log-sum-exps in a row."""
    out, kept = forward(q, k, v, cu_seqlens, scale, save_memory=True)
    lse = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    if kept:
        torch.cat([x.reshape(-1) for x in kept], out=lse.view(-1))
    return out, lse


def backward_with_lse(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, given what `forward_with_lse` kept."""
    heads = q.shape[1]
    runs = [run for run in _runs(q, cu_seqlens, True) if run.fused]
    rows = lse.view(-1).split([run.tokens() * heads for run in runs]) if runs else ()
    kept = [x.view(run.count, heads, run.length) for run, x in zip(runs, rows, strict=True)]
    return backward(grad, q, k, v, out, kept, cu_seqlens, scale, save_memory=True)
