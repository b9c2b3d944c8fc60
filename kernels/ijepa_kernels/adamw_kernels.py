"""AdamWEMA's kernel, which updates all that belongs to a chunk of a weight; formulas and bytes stand in `adamw`."""
from __future__ import annotations

from .adamw_tables import CHUNK, Tables
from .dispatch import tl, triton
from .ema import _lerp
from .shipped import Shipped

NUM_WARPS = 4


@triton.jit
def _adamw(w, g, m, v, decay, rest1, beta2, rest2, eps, step_size, correction):
    """The new w, m and v. decay: 1 - lr * weight_decay; rest: 1 - beta; correction: 1 / sqrt(1 - beta2^t)."""
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    return w * decay - step_size * m / (tl.sqrt(v) * correction + eps), m, v


@triton.jit
def _adamw_ema_kernel(
    table_ptr,  # int64 [programs, 10]: addresses of a chunk of w, m, v, target, two copies; which weight, its first
    # element here, how many, group
    grads_ptr,  # int64 [weights]: addresses; odd where it is no multiple of 16
    rates_ptr,  # fp32 [groups, 12]: see `adamw_begin`
    GRAD: tl.constexpr,
    TARGET: tl.constexpr,  # whether there is one
    COPY: tl.constexpr,  # dtype of the copy of w, or None
    TARGET_COPY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 10
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    target_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    copy_ptr, target_copy_ptr = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    address = tl.load(grads_ptr + tl.load(row_ptr + 6))
    rates_ptr += tl.load(row_ptr + 9) * 12
    decay, rest1, beta2 = tl.load(rates_ptr), tl.load(rates_ptr + 1), tl.load(rates_ptr + 2)
    rest2, eps, weight = tl.load(rates_ptr + 3), tl.load(rates_ptr + 4), tl.load(rates_ptr + 5)  # 1 - momentum
    step_size, correction, scale = tl.load(rates_ptr + 6), tl.load(rates_ptr + 7), tl.load(rates_ptr + 8)
    count = tl.load(row_ptr + 8)  # negative: one of the tensors does not begin at a multiple of 16 bytes
    count = tl.where(tl.load(rates_ptr + 9) == 0, 0, count)  # a step to be skipped has no elements
    odd = address & 1
    g_ptr = (address - odd).to(tl.pointer_type(GRAD)) + tl.load(row_ptr + 7)
    at = tl.arange(0, CHUNK)
    if (count == CHUNK) & (odd == 0):  # without masks: masked loads from a table's pointers are scalar
        w_ptr, m_ptr, v_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        w, m, v = tl.load(w_ptr + at), tl.load(m_ptr + at), tl.load(v_ptr + at)  # [CHUNK]
        g = tl.load(g_ptr + at).to(tl.float32) * scale
        w, m, v = _adamw(w, g, m, v, decay, rest1, beta2, rest2, eps, step_size, correction)
        tl.store(w_ptr + at, w)
        tl.store(m_ptr + at, m)
        tl.store(v_ptr + at, v)
        if COPY is not None:
            tl.store(tl.multiple_of(copy_ptr.to(tl.pointer_type(COPY)), 16) + at, w.to(COPY))
        if TARGET:
            target_ptr = tl.multiple_of(target_ptr, 16)
            target = _lerp(tl.load(target_ptr + at), w, weight)
            tl.store(target_ptr + at, target)
            if TARGET_COPY is not None:
                low_ptr = tl.multiple_of(target_copy_ptr.to(tl.pointer_type(TARGET_COPY)), 16)
                tl.store(low_ptr + at, target.to(TARGET_COPY))
    else:
        inside = at < tl.abs(count)
        w, m = tl.load(w_ptr + at, mask=inside), tl.load(m_ptr + at, mask=inside)
        v, g = tl.load(v_ptr + at, mask=inside), tl.load(g_ptr + at, mask=inside).to(tl.float32) * scale
        w, m, v = _adamw(w, g, m, v, decay, rest1, beta2, rest2, eps, step_size, correction)
        tl.store(w_ptr + at, w, mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        if COPY is not None:
            tl.store(copy_ptr.to(tl.pointer_type(COPY)) + at, w.to(COPY), mask=inside)
        if TARGET:
            target = _lerp(tl.load(target_ptr + at, mask=inside), w, weight)
            tl.store(target_ptr + at, target, mask=inside)
            if TARGET_COPY is not None:
                tl.store(target_copy_ptr.to(tl.pointer_type(TARGET_COPY)) + at, target.to(TARGET_COPY), mask=inside)


def shipped() -> list[Shipped]:
    """Weights with and without a target and copies; gradients in fp32, and in bf16; a target that is read in e4m3."""
    types = {"table_ptr": "i64", "grads_ptr": "i64", "rates_ptr": "fp32"}
    fp32, bf16 = tl.float32, tl.bfloat16
    rows = []
    for grad, target, copy, target_copy in (
        *((fp32, False, None, None), (fp32, False, bf16, None), (fp32, True, None, None), (fp32, True, bf16, bf16)),
        *((fp32, True, bf16, None), (bf16, True, bf16, bf16)),
    ):
        constexprs = dict(GRAD=grad, TARGET=target, COPY=copy, TARGET_COPY=target_copy, CHUNK=CHUNK)
        rows.append(Shipped(_adamw_ema_kernel, types, constexprs, NUM_WARPS))
    return rows


def update(tables: Tables) -> None:
    """Launch it for each kind of weight, on the device that is current."""
    for table, constexprs in tables.launches:
        _adamw_ema_kernel[(len(table),)](
            table, tables.grads, tables.rates, **constexprs, CHUNK=CHUNK, num_warps=NUM_WARPS
        )
