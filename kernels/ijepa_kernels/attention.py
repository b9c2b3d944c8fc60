"""Attention inside each of many packed sequences, never across them.

    out[i, h] = sum_j softmax_j(scale * <q[i, h], k[j, h]>) v[j, h],    j over the sequence that holds token i

Softmax attention (arXiv 1706.03762, eq. 1) under a block-diagonal mask that is never built; no padding, no causal mask.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None) -> Tensor:
    """The formula above, one dense softmax a sequence, in the dtype of its inputs (tests give it float64)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    bounds = cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        weights = torch.einsum("ihd,jhd->hij", q[begin:end] * scale, k[begin:end]).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
    return torch.cat(out) if out else v.new_zeros(v.shape)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """One call for each run of neighbouring sequences of one length.

    `split`, not slices: the backward of every slice is a zero tensor of the full size. Sequences of one length that are
    not neighbours are not brought together: the gather and its way back cost more than the calls they save (16 to 64
    sequences of 60..196 tokens, forward+backward: 1.1 to 1.4 times the loop's time).
    """
    num_heads, head_dim = q.shape[1:]
    runs = [(length, len(list(group))) for length, group in groupby(cu_seqlens.diff().tolist()) if length]
    if not runs:
        return v + 0.0 * (q + k)  # no token: an empty result that still has its place in the graph
    sizes = [length * count for length, count in runs]
    out = []
    for run, *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        length, count = run
        dense = [x.view(count, length, num_heads, head_dim).transpose(1, 2) for x in qkv]
        out.append(F.scaled_dot_product_attention(*dense, scale=scale).transpose(1, 2).reshape(-1, num_heads, head_dim))
    return torch.cat(out) if len(out) > 1 else out[0]


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
    """Softmax attention inside each packed sequence.

    Args:
        q, k, v: [T, heads, head_dim], one floating dtype, any strides with a contiguous last dimension; views of one
            [T, 3, heads, head_dim] (its `unbind(1)`) are read in place. head_dim is a multiple of 8.
        cu_seqlens: int32 [S+1], on the device of q. Sequence s is tokens cu_seqlens[s] : cu_seqlens[s+1]; may be empty.
        max_seqlen: an upper bound of the sequence lengths, constant over a run (it is a compile guard).
        scale: of the logits; head_dim**-0.5 if None.
        backend: "auto", or the name of one.

    Returns:
        [T, heads, head_dim] in the dtype of q, differentiable in q, k and v.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _attention_cpu(q, k, v, cu_seqlens, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> None:
    if q.ndim != 3:
        raise ValueError(f"q is {list(q.shape)}; expected [tokens, heads, head_dim]")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {list(x.shape)} {x.dtype} on {x.device}; "
                f"expected as q: {list(q.shape)} {q.dtype} on {q.device}"
            )
    if not q.is_floating_point():
        raise ValueError(f"q, k and v are {q.dtype}; expected a floating dtype")
    if q.shape[-1] % 8:
        raise ValueError(f"q has head_dim {q.shape[-1]}; expected a multiple of 8")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.numel():
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; expected 1")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}; expected int32 [sequences + 1]")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; expected on q's device, {q.device}")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected at least 1")
    if backend != "auto":
        raise ValueError(f"backend is {backend!r}; expected 'auto'")
    if q.device.type == "cpu":
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(q) or (lengths < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to the {len(q)} tokens of q; it is {cu_seqlens.tolist()}")
        if lengths.numel() and int(lengths.max()) > max_seqlen:
            raise ValueError(f"cu_seqlens has a sequence of {int(lengths.max())} tokens; max_seqlen is {max_seqlen}")
