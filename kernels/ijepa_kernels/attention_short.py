"""The backward of attention over short sequences, such as the predictor's: a program does a whole sequence and head.

It holds all queries of its sequence: q, grad, their log-sum-exp, D_i = <out_i, grad_i>, which it computes itself, and
the sums of dq. It walks once over the tiles of keys and writes dk and dv of each. The formulas are those of
`attention_triton`, whose backward takes seven products and a kernel for D. This one takes five, and needs no atomics
either: it is bitwise reproducible.

Elements moved for each of a token's heads * head_dim: 8 (q, k, v, out, grad; dq, dk, dv) instead of 9. Where sequences
are longer, or heads wider than 32, the sums do not fit into registers: see LAUNCHES.

Chosen from what the compiler makes of it, and not yet timed on a GPU: `attention_triton.SHORT_BACKWARD` says where it
is taken.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_parts import GRADS_STRIDE, STRIDES, load_rows, readable, store_rows, strides
from .dispatch import INTERPRETED, tl, triton
from .shipped import Shipped

LARGEST_HEAD_DIM = 32
HEAD_DIMS = (24, 32)  # of I-JEPA's predictors
ROWS = 64  # of a tile of queries: a length of 65 wastes 63 rows, and not the 191 of one tile of 256
KEYS = 16  # of a tile of keys


class Launch(NamedTuple):
    """Sequences of more than 64 * `beyond` and at most 64 * `most` tokens; programs of all others leave at once."""

    beyond: int
    most: int
    num_warps: int


# A program gets the registers that its longest sequence needs. So the common lengths, up to 128 where masks are
# truncated, have a launch of their own: four of its programs fit on an SM of an H100, and one of the other's.
# Registers as compiled for sm_80, sm_90 and sm_100 by triton 3.6, the most of head dims 24 and 32:
#   up to 128 tokens, 4 warps:  16 keys 168, 104, 78; 32 keys 168 and a spill, 178, 144; 64 keys 218 on sm_90
#   up to 320 tokens, 8 warps:  16 keys 255, 159, 104; 32 keys spill on sm_80 and sm_90; so do 16 with 4 warps on sm_80
# 320, because masks on a grid of 16 x 16 have a bound of 225 + 54 tokens.
# Not for the contexts of the encoders, whose bounds are 169 and 225 tokens: on sm_80 head dim 64 spills beyond 128, and
# 88 at any length. Not for fp32: see "NO WGMMA" in attention_triton; on sm_80 it lacks shared memory.
LAUNCHES = (Launch(0, 2, 4), Launch(2, 5, 8))


@triton.jit
def _walk(
    q_base,
    k_base,
    v_base,
    out_base,
    grad_base,
    lse_base,
    dq_base,
    dk_base,
    dv_base,
    length,
    log2_scale,
    scale,
    stride_q,  # of a token, in elements; as are the others
    stride_k,
    stride_v,
    stride,  # of out and grad
    stride_grads,
    TILES: tl.constexpr,  # of queries
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A sequence of at most TILES * ROWS tokens, for one head."""
    # A tuple has an entry for each tile of queries. One tile of TILES * ROWS would have to be a power of two.
    qs, gs, lses, dots, dqs = (), (), (), (), ()
    for t in tl.static_range(TILES):
        query = t * ROWS + tl.arange(0, ROWS)
        is_query = query < length
        q = load_rows(q_base, query, stride_q, is_query, HEAD_DIM, WIDTH, 0, UPCAST)[0]
        g = load_rows(grad_base, query, stride, is_query, HEAD_DIM, WIDTH, 0, UPCAST)[0]
        out = load_rows(out_base, query, stride, is_query, HEAD_DIM, WIDTH, 0, UPCAST)[0]
        qs += (q,)
        gs += (g,)
        # Past the end q and grad are 0, and add nothing.
        lses += (tl.load(lse_base + query, mask=is_query, other=0.0),)
        dots += (tl.sum(out.to(tl.float32) * g.to(tl.float32), 1),)
        dqs += (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < length
        k = load_rows(k_base, key, stride_k, inside, HEAD_DIM, WIDTH, 0, UPCAST)[0]
        v = load_rows(v_base, key, stride_v, inside, HEAD_DIM, WIDTH, 0, UPCAST)[0]
        dk = tl.zeros([KEYS, WIDTH], tl.float32)
        dv = tl.zeros([KEYS, WIDTH], tl.float32)
        sums = ()
        for t in tl.static_range(TILES):
            # A key past the end has logit 0, and exp2(0 - lse) may overflow: inf times its k of 0 is no 0.
            logits = tl.where(inside[None, :], tl.dot(qs[t], tl.trans(k)), float("-inf"))  # [ROWS, KEYS]
            weights = tl.exp2(logits * log2_scale - lses[t][:, None])
            grad_logits = weights * (tl.dot(gs[t], tl.trans(v)) - dots[t][:, None])
            weights, grad_logits = weights.to(k.dtype), grad_logits.to(k.dtype)
            dv = tl.dot(tl.trans(weights), gs[t], dv)
            dk = tl.dot(tl.trans(grad_logits), qs[t], dk)
            sums += (tl.dot(grad_logits, k, dqs[t]),)
        dqs = sums
        store_rows(dk_base, key, stride_grads, inside, dk * scale, dk, HEAD_DIM, WIDTH, 0)
        store_rows(dv_base, key, stride_grads, inside, dv, dv, HEAD_DIM, WIDTH, 0)
    for t in tl.static_range(TILES):
        query = t * ROWS + tl.arange(0, ROWS)
        store_rows(dq_base, query, stride_grads, query < length, dqs[t] * scale, dqs[t], HEAD_DIM, WIDTH, 0)


@triton.jit(do_not_specialize=["heads", "num_tokens", *STRIDES, GRADS_STRIDE])
def _attention_short_bwd_kernel(
    q_ptr,  # [T, heads, HEAD_DIM], as are k and v
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,  # [S+1]
    out_ptr,  # [T, heads, HEAD_DIM], contiguous, as is grad
    grad_ptr,
    lse_ptr,  # [heads, T], contiguous, base 2
    dq_ptr,  # [T, heads, HEAD_DIM], as are dk and dv, a token's heads side by side
    dk_ptr,
    dv_ptr,
    heads,
    num_tokens,
    log2_scale,  # scale * log2(e)
    scale,
    stride_q_token,  # strides in units of 8 elements, as in attention_triton
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_grads_token,  # of dq, dk and dv
    BEYOND: tl.constexpr,  # tiles of queries: shorter sequences are another launch's
    MOST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)  # fastest, as in the forward
    sequence = tl.program_id(0) // heads
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - begin).to(tl.int32)
    stride = heads * HEAD_DIM
    offset = begin * stride + head * HEAD_DIM
    offset_grads = begin * stride_grads_token * 8 + head * HEAD_DIM
    for t in tl.static_range(BEYOND, MOST):
        if (length > t * ROWS) & (length <= (t + 1) * ROWS):
            _walk(
                q_ptr + (begin * stride_q_token + head * stride_q_head) * 8,
                k_ptr + (begin * stride_k_token + head * stride_k_head) * 8,
                v_ptr + (begin * stride_v_token + head * stride_v_head) * 8,
                out_ptr + offset,
                grad_ptr + offset,
                lse_ptr + head * num_tokens + begin,
                dq_ptr + offset_grads,
                dk_ptr + offset_grads,
                dv_ptr + offset_grads,
                length,
                log2_scale,
                scale,
                stride_q_token * 8,
                stride_k_token * 8,
                stride_v_token * 8,
                stride,
                stride_grads_token * 8,
                t + 1,
                HEAD_DIM,
                WIDTH,
                ROWS,
                KEYS,
                UPCAST,
            )


def _constants(head_dim: int, launch: Launch) -> dict[str, int | bool]:
    return {
        "BEYOND": launch.beyond,
        "MOST": launch.most,
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": ROWS,
        "KEYS": KEYS,
        "UPCAST": INTERPRETED,  # as in attention_triton
    }


def fits(head_dim: int, dtype: torch.dtype, max_seqlen: int) -> bool:
    """Whether `backward` can serve a run: no length of it may be above 320."""
    return head_dim <= LARGEST_HEAD_DIM and dtype.itemsize == 2 and max_seqlen <= LAUNCHES[-1].most * ROWS


def backward(
    grad: Tensor,  # [T, heads, head_dim], as are q, k, v and out
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # fp32 [heads, T], from `attention_triton.forward`
    cu_seqlens: Tensor,  # int32 [S+1]
    max_seqlen: int,
    scale: float,
    grads: Sequence[Tensor] | None = None,  # views of one [T, 3, heads, head_dim], to be filled
) -> Sequence[Tensor]:
    """As `attention_triton.backward`, where it `fits`."""
    num_tokens, heads, head_dim = q.shape
    if grads is None:
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    if num_tokens:
        grad, out, cu_seqlens = grad.contiguous(), out.contiguous(), cu_seqlens.contiguous()
        q, k, v = readable(q), readable(k), readable(v)
        with torch.cuda.device_of(q):
            for launch in LAUNCHES:
                if max_seqlen > launch.beyond * ROWS:
                    _attention_short_bwd_kernel[((cu_seqlens.numel() - 1) * heads,)](
                        q,
                        k,
                        v,
                        cu_seqlens,
                        out,
                        grad,
                        lse,
                        *grads,
                        heads,
                        num_tokens,
                        scale * math.log2(math.e),
                        scale,
                        *strides(q, k, v),
                        grads[0].stride(0) // 8,
                        **_constants(head_dim, launch),
                        num_warps=launch.num_warps,
                        num_stages=1,
                    )
    return grads


def shipped() -> list[Shipped]:
    """Both head dims in bf16, whose code fp16 shares."""
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "bf16")
    types |= dict.fromkeys(("lse_ptr", "log2_scale", "scale"), "fp32")
    return [
        Shipped(
            _attention_short_bwd_kernel,
            types,
            _constants(head_dim, launch) | {"UPCAST": False},
            launch.num_warps,
            num_stages=1,
            dot=True,
        )
        for head_dim in HEAD_DIMS
        for launch in LAUNCHES
    ]
