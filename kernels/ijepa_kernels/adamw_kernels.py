"""AdamWEMA's kernels, which find their tensors through tables of addresses; formulas and bytes stand in `adamw`.

One updates a chunk of a weight and what belongs to it, another whole rows of those whose target has a copy in e4m3: the
scale of a row is known when all of it is updated. It then reads the new target again, which it has just written, from
the cache: a program's rows are 4 to 44 KB of it at the models' widths.
"""
from __future__ import annotations

from .adamw_tables import CHUNK, Tables, tile_of
from .dispatch import INTERPRETED, tl, triton
from .ema import _lerp
from .fp8 import FIRST_ARCH, store_e4m3
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


@triton.jit
def _update_rows(
    w_ptr,  # each of the first row
    m_ptr,
    v_ptr,
    g_ptr,
    target_ptr,
    copy_ptr,  # or None
    values_ptr,
    scale_ptr,
    rates_ptr,
    inside,  # [ROWS], or None: all rows are there
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Update ROWS rows, BLOCK columns at a time, and round their targets. BLOCK divides DIM."""
    decay, rest1, beta2 = tl.load(rates_ptr), tl.load(rates_ptr + 1), tl.load(rates_ptr + 2)
    rest2, eps, weight = tl.load(rates_ptr + 3), tl.load(rates_ptr + 4), tl.load(rates_ptr + 5)  # 1 - momentum
    step_size, correction, scale = tl.load(rates_ptr + 6), tl.load(rates_ptr + 7), tl.load(rates_ptr + 8)
    row = tl.arange(0, ROWS)
    begin = (row * DIM)[:, None] + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    mask = None if inside is None else tl.broadcast_to(inside[:, None], [ROWS, BLOCK])
    most = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, DIM, BLOCK):  # `tl.static_range` takes 112 registers at 1,408 columns, and this 96
        at = begin + first
        w, m, v = tl.load(w_ptr + at, mask=mask), tl.load(m_ptr + at, mask=mask), tl.load(v_ptr + at, mask=mask)
        g = tl.load(g_ptr + at, mask=mask).to(tl.float32) * scale
        w, m, v = _adamw(w, g, m, v, decay, rest1, beta2, rest2, eps, step_size, correction)
        tl.store(w_ptr + at, w, mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=mask)
        target = _lerp(tl.load(target_ptr + at, mask=mask), w, weight)
        tl.store(target_ptr + at, target, mask=mask)
        most = tl.maximum(most, tl.abs(target))
    largest = tl.max(most, 1)  # [ROWS]
    tl.debug_barrier()  # a thread may read below what another one wrote above: the compiler lays out each by itself
    for first in range(0, DIM, BLOCK):
        at = begin + first
        target = tl.load(target_ptr + at, mask=mask)
        once = first == 0 if inside is None else inside & (first == 0)
        store_e4m3(values_ptr, scale_ptr, row, at, mask, once, target, largest, EXACT)


@triton.jit
def _adamw_ema_rows_kernel(
    table_ptr,  # int64 [programs, 11]: addresses of some rows of w, m, v, target, w's copy, e4m3 values; which weight,
    # its first element here, how many rows, group; address of the scales
    grads_ptr,  # as above
    rates_ptr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,  # dtype of the copy of w, or None
    DIM: tl.constexpr,  # columns
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    NARROW: tl.constexpr = min(BLOCK, 256)
    FEW: tl.constexpr = 256 // NARROW
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 11
    w, m, v, target = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    copy, values, scale = tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 10)
    address, start = tl.load(grads_ptr + tl.load(row_ptr + 6)), tl.load(row_ptr + 7)
    rates_ptr += tl.load(row_ptr + 9) * 12
    count = tl.load(row_ptr + 8)  # negative: one of the tensors does not begin at a multiple of 16 bytes
    count = tl.where(tl.load(rates_ptr + 9) == 0, 0, count)  # a step to be skipped has no rows
    odd = address & 1
    # Pointers are made in each branch: a hint on one that both share would hold for both, and be a lie.
    if (count == ROWS) & (odd == 0):
        _update_rows(
            tl.multiple_of(w.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(m.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(v.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(address.to(tl.pointer_type(GRAD)) + start, 16),
            tl.multiple_of(target.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(copy.to(tl.pointer_type(COPY)), 16) if COPY is not None else None,
            tl.multiple_of(values.to(tl.pointer_type(tl.float8e4nv)), 16),
            scale.to(tl.pointer_type(tl.float32)),
            rates_ptr,
            None,
            DIM,
            BLOCK,
            ROWS,
            EXACT,
        )
    else:
        for row in range(0, tl.abs(count), FEW):  # two elements a thread, for their accesses are scalar: registers
            at = row * DIM
            _update_rows(
                w.to(tl.pointer_type(tl.float32)) + at,
                m.to(tl.pointer_type(tl.float32)) + at,
                v.to(tl.pointer_type(tl.float32)) + at,
                (address - odd).to(tl.pointer_type(GRAD)) + start + at,
                target.to(tl.pointer_type(tl.float32)) + at,
                copy.to(tl.pointer_type(COPY)) + at if COPY is not None else None,
                values.to(tl.pointer_type(tl.float8e4nv)) + at,
                scale.to(tl.pointer_type(tl.float32)) + row,
                rates_ptr,
                row + tl.arange(0, FEW) < tl.abs(count),
                DIM,
                NARROW,
                FEW,
                EXACT,
            )


def shipped() -> list[Shipped]:
    """Weights with and without a target and copies; gradients in fp32, and in bf16; a target that is read in e4m3, also
    of every model's widths whose scales are written as well."""
    types = {"table_ptr": "i64", "grads_ptr": "i64", "rates_ptr": "fp32"}
    fp32, bf16 = tl.float32, tl.bfloat16
    rows = []
    for grad, target, copy, target_copy in (
        *((fp32, False, None, None), (fp32, False, bf16, None), (fp32, True, None, None), (fp32, True, bf16, bf16)),
        *((fp32, True, bf16, None), (bf16, True, bf16, bf16)),
    ):
        constexprs = dict(GRAD=grad, TARGET=target, COPY=copy, TARGET_COPY=target_copy, CHUNK=CHUNK)
        rows.append(Shipped(_adamw_ema_kernel, types, constexprs, NUM_WARPS))
    for grad, copy, dim in (
        *((fp32, bf16, dim) for dim in (192, 384, 768, 1024, 1280, 1408, 1536, 3072, 4096, 5120, 6144)),
        *((fp32, None, 1280), (bf16, bf16, 1280)),
    ):
        constexprs = dict(GRAD=grad, COPY=copy, **tile_of(dim), EXACT=False)
        rows.append(Shipped(_adamw_ema_rows_kernel, types, constexprs, NUM_WARPS, first_arch=FIRST_ARCH))
    return rows


def update(tables: Tables) -> None:
    """Launch one of them for each kind of weight, on the device that is current."""
    for table, constexprs in tables.launches:
        arguments = table, tables.grads, tables.rates
        if "DIM" in constexprs:  # a table of rows
            _adamw_ema_rows_kernel[(len(table),)](*arguments, **constexprs, EXACT=INTERPRETED, num_warps=NUM_WARPS)
        else:
            _adamw_ema_kernel[(len(table),)](*arguments, **constexprs, CHUNK=CHUNK, num_warps=NUM_WARPS)
