"""Our attention kernels: many short sequences, no mask but the sequences' ends, head dims as they are.

Libraries pad a head dim to the next size they were built for, and are laid out for long sequences. Here a head is cut
into two parts, powers of two as `tl.arange` wants them, of which 8 columns at most are masked: 80 = 64 + 16,
88 = 64 + 32, 24 = 32 (80 in fp32 = 64 + 32, see `attention_parts`). Cutting further, 88 = 64 + 16 + 16 or 24 = 16 + 8,
leaves the width as it is, or would take an instruction more for each product. Masked columns cost no memory traffic.

Forward: a program is a tile of queries of one sequence and head, and walks over its tiles of keys with the online
softmax of FlashAttention (arXiv 2205.14135) in fp32. Logarithms are base 2, the hardware's own.

Backward: D_i = <out_i, grad_i> in a kernel of its own; then one launch in which tiles of keys (dk, dv) and tiles of
queries (dq) are programs side by side. It computes the weights twice and needs no atomics, so it is bitwise
reproducible; and since both kinds read the same sequence at the same time, the second read comes from the L2 cache.
For short sequences there is a second backward, in `attention_short`.

    P_ij  = exp2(c <q_i, k_j> - lse_i)         dv_j = sum_i P_ij grad_i                   c = scale * log2(e)
    dS_ij = P_ij (<grad_i, v_j> - D_i)         dk_j = scale * sum_i dS_ij q_i             dq_i = scale * sum_j dS_ij k_j

Elements moved for each of a token's heads * head_dim: forward 4 (q, k, v, out), backward 9 (out, grad; q, k, v, grad;
dq, dk, dv). At 256 tokens and bf16 a forward does 128 FLOPs a byte where an H100 can do 300: memory sets the pace.

Several short sequences in one tile of 128 rows under a block-diagonal mask would lower the tensor cores' work for no
model: each key would meet 128 queries, and alone it meets the 64 or 128 of its own sequence. `python
bench/attention_waste.py` counts it; docs/attention_waste.md is its table.

No length is known on the host: the grid has room for `max_seqlen`, and programs beyond a sequence's end leave at once.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import attention_short
from .attention_parts import (
    GRADS_STRIDE,
    STRIDES,
    accumulate,
    inner,
    load_rows,
    parts,
    readable,
    store_rows,
    strides,
)
from .dispatch import INTERPRETED, tl, triton
from .shipped import Shipped

HEAD_DIMS = (24, 32, 64, 80, 88)  # of I-JEPA's encoders (64, 80, 88) and predictors (24, 32)
# By the bits of the dtype. In fp32 the tiles below hold 64 + 32 columns; at 104 to 128 the backward spills on sm_90.
LARGEST_HEAD_DIM = {16: 128, 32: 96}


class Config(NamedTuple):
    block: int  # rows that a program owns: queries; in the backward queries or keys
    block_inner: int  # rows of the tiles that it walks over
    num_warps: int
    num_stages: int


# Keyed by the bits of the dtype; every head dim takes the same row. Chosen from registers, spills and shared memory as
# compiled for sm_80, sm_90 and sm_100, and in 16 bits from the times of nineteen kinds of tile on an H100, at the
# lengths that the real sampler draws: bench/results/nvidia-h100-80gb-hbm3/sweeps/attention_tiles.json, 2026-11-26.
#
# 64 rows: a warp group's wgmma has 64, and what lies past a sequence's end is wasted: of 135 tokens 57 rows in tiles of
# 64, 121 in tiles of 128, which took up to 1.6 times as long. 4 warps, so that two or three programs share an SM and
# hide each other's loads: with 8 the backward took two to four times as long. A third stage gained up to a tenth.
# Backward, 16 bits: 64 x 64 spills on sm_80 from head dim 64 on, and at 88 on sm_90.
# fp32 is tf32x3, three products on the tensor cores with the error of fp32 (plain tf32 keeps 10 bits; "ieee" runs on
# the other cores, at 67 instead of 165 dense TFLOP/s of an H100). Both halves of each operand lie in registers, so the
# tiles are small: above 16 x 32 backward and forward spill at head dim 88. AND NO WGMMA: with 8 warps and 64 x 16,
# which triton 3.6 makes wgmma of, an H100 gave wrong results and wrote out of bounds.
FORWARD = {16: Config(64, 64, 4, 3), 32: Config(16, 32, 4, 2)}
BACKWARD = {16: Config(64, 32, 4, 3), 32: Config(16, 32, 4, 1)}
BLOCK_ROWS = 64  # of the D kernel: heads of tokens
# The head dims whose backward is `attention_short`'s, where it fits. Empty until a GPU has timed it beside ours:
#     python bench/record.py --out bench/results --part attention --only predictor && python bench/attention_choice.py
SHORT_BACKWARD: frozenset[int] = frozenset()

INTEGERS = ["tiles", "heads", "num_tokens", *STRIDES]  # one compiled kernel, whatever the number of tokens


@triton.jit(do_not_specialize=INTEGERS)
def _attention_fwd_kernel(
    q_ptr,  # [T, heads, HEAD_DIM], as are k and v
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,  # [S+1]
    out_ptr,  # [T, heads, HEAD_DIM], contiguous
    lse_ptr,  # [heads, T], contiguous, base 2
    tiles,  # of queries of the longest sequence
    heads,
    num_tokens,
    log2_scale,  # scale * log2(e)
    stride_q_token,  # this and the other strides in units of 8 elements: the compiler then knows that a head begins
    stride_q_head,  # at 16 bytes, which it could not tell from a head dim of 24 or 88
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK: tl.constexpr,  # queries that a program owns
    BLOCK_INNER: tl.constexpr,  # keys that it walks over
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Heads fastest: programs that run side by side read the same tokens' rows, whole, while these are in the L2.
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    sequence = tile // tiles
    first = tile % tiles * BLOCK
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - begin).to(tl.int32)
    if first >= length:
        return
    q_base = q_ptr + (begin * stride_q_token + head * stride_q_head) * 8
    k_base = k_ptr + (begin * stride_k_token + head * stride_k_head) * 8
    v_base = v_ptr + (begin * stride_v_token + head * stride_v_head) * 8

    query = first + tl.arange(0, BLOCK)
    q0, q1 = load_rows(q_base, query, stride_q_token * 8, query < length, HEAD_DIM, PART_0, PART_1, UPCAST)
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc0 = tl.zeros([BLOCK, PART_0], tl.float32)
    acc1 = tl.zeros([BLOCK, PART_1 if PART_1 > 0 else 16], tl.float32)
    for start in range(0, length, BLOCK_INNER):
        key = start + tl.arange(0, BLOCK_INNER)
        inside = key < length
        k0, k1 = load_rows(k_base, key, stride_k_token * 8, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        v0, v1 = load_rows(v_base, key, stride_v_token * 8, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        logits = inner(q0, q1, k0, k1, PART_1, PRECISION)  # [BLOCK, BLOCK_INNER], still to be scaled
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))  # finite: every tile has a key inside
        rescale = tl.exp2((row_max - new_max) * log2_scale)
        weights = tl.exp2(logits * log2_scale - (new_max * log2_scale)[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        acc0 *= rescale[:, None]
        acc1 *= rescale[:, None]
        acc0, acc1 = accumulate(acc0, acc1, weights, v0, v1, PART_1, PRECISION)

    tl.store(
        lse_ptr + head * num_tokens + begin + query, row_max * log2_scale + tl.log2(row_sum), mask=query < length
    )
    stride_out = heads * HEAD_DIM
    out_base = out_ptr + begin * stride_out + head * HEAD_DIM
    acc0 /= row_sum[:, None]
    acc1 /= row_sum[:, None]
    store_rows(out_base, query, stride_out, query < length, acc0, acc1, HEAD_DIM, PART_0, PART_1)


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def _attention_dot_kernel(
    out_ptr,  # [T, heads, HEAD_DIM], contiguous
    grad_ptr,  # [T, heads, HEAD_DIM], contiguous
    dot_ptr,  # [heads, T], contiguous
    num_tokens,
    heads,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R], a head of a token
    inside = row < num_tokens * heads
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
    mask = inside[:, None]
    if COLUMNS > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dot_ptr + (row % heads).to(tl.int64) * num_tokens + row // heads, tl.sum(out * grad, 1), mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, GRADS_STRIDE])
def _attention_bwd_kernel(
    q_ptr,  # [T, heads, HEAD_DIM], as are k and v
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,  # [S+1]
    grad_ptr,  # [T, heads, HEAD_DIM], contiguous
    lse_ptr,  # [heads, T], contiguous, base 2
    dot_ptr,  # [heads, T], contiguous: D
    dq_ptr,  # [T, heads, HEAD_DIM], as are dk and dv, a token's heads side by side
    dk_ptr,
    dv_ptr,
    tiles,  # of the longest sequence
    heads,
    num_tokens,
    log2_scale,  # scale * log2(e)
    scale,
    stride_q_token,  # strides in units of 8 elements, as in the forward
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_grads_token,  # of dq, dk and dv
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK: tl.constexpr,  # keys or queries that a program owns
    BLOCK_INNER: tl.constexpr,  # queries or keys that it walks over
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)  # fastest, as in the forward
    tile = tl.program_id(0) // heads
    sequence = tile // (2 * tiles)
    tile = tile % (2 * tiles)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - begin).to(tl.int32)
    first = tile % tiles * BLOCK
    if first >= length:
        return
    q_base = q_ptr + (begin * stride_q_token + head * stride_q_head) * 8
    k_base = k_ptr + (begin * stride_k_token + head * stride_k_head) * 8
    v_base = v_ptr + (begin * stride_v_token + head * stride_v_head) * 8
    stride = heads * HEAD_DIM  # of a token in the contiguous ones
    offset = begin * stride + head * HEAD_DIM
    offset_grads = begin * stride_grads_token * 8 + head * HEAD_DIM
    lse_base = lse_ptr + head * num_tokens + begin
    dot_base = dot_ptr + head * num_tokens + begin
    own = first + tl.arange(0, BLOCK)
    own_inside = own < length
    acc0 = tl.zeros([BLOCK, PART_0], tl.float32)
    acc1 = tl.zeros([BLOCK, PART_1 if PART_1 > 0 else 16], tl.float32)

    if tile < tiles:  # own keys: dk and dv; the matrices are transposed, [BLOCK keys, BLOCK_INNER queries]
        k0, k1 = load_rows(k_base, own, stride_k_token * 8, own_inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        v0, v1 = load_rows(v_base, own, stride_v_token * 8, own_inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        dv0 = tl.zeros([BLOCK, PART_0], tl.float32)
        dv1 = tl.zeros([BLOCK, PART_1 if PART_1 > 0 else 16], tl.float32)
        for start in range(0, length, BLOCK_INNER):
            query = start + tl.arange(0, BLOCK_INNER)
            inside = query < length
            q0, q1 = load_rows(q_base, query, stride_q_token * 8, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
            g0, g1 = load_rows(grad_ptr + offset, query, stride, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
            lse = tl.load(lse_base + query, mask=inside, other=0.0)  # past the end q and grad are 0, and add nothing
            dot = tl.load(dot_base + query, mask=inside, other=0.0)
            weights = tl.exp2(inner(k0, k1, q0, q1, PART_1, PRECISION) * log2_scale - lse[None, :])
            dv0, dv1 = accumulate(dv0, dv1, weights, g0, g1, PART_1, PRECISION)
            grad_logits = weights * (inner(v0, v1, g0, g1, PART_1, PRECISION) - dot[None, :])
            acc0, acc1 = accumulate(acc0, acc1, grad_logits, q0, q1, PART_1, PRECISION)
        # Rows past the end had logit 0 and may hold infinities: they are not stored.
        dk_base, dv_base, row = dk_ptr + offset_grads, dv_ptr + offset_grads, stride_grads_token * 8
        store_rows(dk_base, own, row, own_inside, acc0 * scale, acc1 * scale, HEAD_DIM, PART_0, PART_1)
        store_rows(dv_base, own, row, own_inside, dv0, dv1, HEAD_DIM, PART_0, PART_1)
    else:  # own queries: dq; [BLOCK queries, BLOCK_INNER keys]
        q0, q1 = load_rows(q_base, own, stride_q_token * 8, own_inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        g0, g1 = load_rows(grad_ptr + offset, own, stride, own_inside, HEAD_DIM, PART_0, PART_1, UPCAST)
        lse = tl.load(lse_base + own, mask=own_inside, other=0.0)
        dot = tl.load(dot_base + own, mask=own_inside, other=0.0)
        for start in range(0, length, BLOCK_INNER):
            key = start + tl.arange(0, BLOCK_INNER)
            inside = key < length
            k0, k1 = load_rows(k_base, key, stride_k_token * 8, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
            v0, v1 = load_rows(v_base, key, stride_v_token * 8, inside, HEAD_DIM, PART_0, PART_1, UPCAST)
            logits = inner(q0, q1, k0, k1, PART_1, PRECISION)
            # A key past the end has logit 0, and exp2(0 - lse) may overflow: inf times its k of 0 is no 0.
            logits = tl.where(inside[None, :], logits, float("-inf"))
            weights = tl.exp2(logits * log2_scale - lse[:, None])
            grad_logits = weights * (inner(g0, g1, v0, v1, PART_1, PRECISION) - dot[:, None])
            acc0, acc1 = accumulate(acc0, acc1, grad_logits, k0, k1, PART_1, PRECISION)
        dq_base, row = dq_ptr + offset_grads, stride_grads_token * 8
        store_rows(dq_base, own, row, own_inside, acc0 * scale, acc1 * scale, HEAD_DIM, PART_0, PART_1)


def _config(table: dict[int, Config], x: Tensor) -> Config:
    return table[x.element_size() * 8]


def _constants(head_dim: int, dtype: torch.dtype, config: Config) -> dict[str, int | str | bool]:
    part_0, part_1 = parts(head_dim, dtype)
    return {
        "HEAD_DIM": head_dim,
        "PART_0": part_0,
        "PART_1": part_1,
        "BLOCK": config.block,
        "BLOCK_INNER": config.block_inner,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",  # 16-bit products are exact in either
        "UPCAST": INTERPRETED,  # the interpreter's bf16 arithmetic is wrong
    }


def _columns(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def forward(
    q: Tensor,  # [T, heads, head_dim], as are k and v
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,  # int32 [S+1]
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of every row in base 2, fp32 [heads, T]."""
    num_tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, num_tokens), dtype=torch.float32, device=q.device)
    if num_tokens:
        q, k, v = readable(q), readable(k), readable(v)
        config = _config(FORWARD, q)
        tiles = triton.cdiv(max_seqlen, config.block)
        grid = ((cu_seqlens.numel() - 1) * tiles * heads,)
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[grid](
                q,
                k,
                v,
                cu_seqlens.contiguous(),
                out,
                lse,
                tiles,
                heads,
                num_tokens,
                scale * math.log2(math.e),
                *strides(q, k, v),
                **_constants(head_dim, q.dtype, config),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return out, lse


def backward(
    grad: Tensor,  # [T, heads, head_dim], as are q, k, v and out
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # fp32 [heads, T], from `forward`
    cu_seqlens: Tensor,  # int32 [S+1]
    max_seqlen: int,
    scale: float,
    grads: Sequence[Tensor] | None = None,  # views of one [T, 3, heads, head_dim], to be filled
) -> Sequence[Tensor]:
    """The gradients of q, k and v; contiguous where no `grads` are given."""
    num_tokens, heads, head_dim = q.shape
    if head_dim in SHORT_BACKWARD and attention_short.fits(head_dim, q.dtype, max_seqlen):
        return attention_short.backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, grads)
    if grads is None:
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    if num_tokens:
        grad, out = grad.contiguous(), out.contiguous()
        q, k, v = readable(q), readable(k), readable(v)
        dot = torch.empty((heads, num_tokens), dtype=torch.float32, device=q.device)
        config = _config(BACKWARD, q)
        tiles = triton.cdiv(max_seqlen, config.block)
        grid = ((cu_seqlens.numel() - 1) * 2 * tiles * heads,)
        with torch.cuda.device_of(q):
            _attention_dot_kernel[(triton.cdiv(num_tokens * heads, BLOCK_ROWS),)](
                out,
                grad,
                dot,
                num_tokens,
                heads,
                HEAD_DIM=head_dim,
                COLUMNS=_columns(head_dim),
                BLOCK_R=BLOCK_ROWS,
                num_warps=4,
            )
            _attention_bwd_kernel[grid](
                q,
                k,
                v,
                cu_seqlens.contiguous(),
                grad,
                lse,
                dot,
                *grads,
                tiles,
                heads,
                num_tokens,
                scale * math.log2(math.e),
                scale,
                *strides(q, k, v),
                grads[0].stride(0) // 8,
                **_constants(head_dim, q.dtype, config),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return grads


def shipped() -> list[Shipped]:
    """Every head dim in bf16, whose code fp16 shares, and fp32."""
    rows = []
    for head_dim in HEAD_DIMS:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            bits = torch.finfo(dtype).bits
            inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), name) | {"lse_ptr": "fp32", "log2_scale": "fp32"}
            forward = inputs | {"out_ptr": name}
            backward = inputs | {"dot_ptr": "fp32", "scale": "fp32"}
            backward |= dict.fromkeys(("grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), name)
            for kernel, types, table in (
                (_attention_fwd_kernel, forward, FORWARD),
                (_attention_bwd_kernel, backward, BACKWARD),
            ):
                config = table[bits]
                constants = _constants(head_dim, dtype, config) | {"UPCAST": False}
                rows.append(Shipped(kernel, types, constants, config.num_warps, config.num_stages, dot=True))
            dot = {"out_ptr": name, "grad_ptr": name, "dot_ptr": "fp32"}
            constants = {"HEAD_DIM": head_dim, "COLUMNS": _columns(head_dim), "BLOCK_R": BLOCK_ROWS}
            # It loads 16 bytes at once, but stores one number a row.
            rows.append(Shipped(_attention_dot_kernel, dot, constants, vector_bytes=4))
    return rows
