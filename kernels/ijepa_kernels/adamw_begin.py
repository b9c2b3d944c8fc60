"""What begins an update of AdamWEMA: whether it is made at all, its number, and the rates that follow from that.

The host sends each group's rates in fp64. Adam's corrections depend on the number t of the update, which only the
device knows where it may skip some: 1 - beta^t, and what follows from it, is computed here in fp64 and rounded to fp32
once. Where `finite` says no, the rates say so to the kernel that updates, and t stays as it is.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw_tables import Tables
from .dispatch import tl, triton
from .shipped import Shipped

BLOCK, LANES = 1024, 32  # steps and groups that the one program takes at a time
NUM_WARPS = 4


@triton.jit
def _power(base, n):
    """base^n in fp64 by squaring: wrong by n * 2^-53 of itself at most."""
    result = base * 0 + 1
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit(do_not_specialize_on_alignment=["finite_ptr", "scale_ptr"])
def _begin_kernel(
    given_ptr,  # fp64 [groups, 8]: decay, rest1, beta2, rest2, eps, weight, lr, beta1
    steps_ptr,  # fp32 [weights]: updates of each so far, all the same
    finite_ptr,  # []: any float, or uint8 for a truth value; None: always go on
    scale_ptr,  # fp32 [] or None
    skipped_ptr,  # int64 []
    rates_ptr,  # fp32 [groups, 12], out: decay, rest1, beta2, rest2, eps, weight, step_size, correction, scale, go
    groups,
    weights,
    TRUTH: tl.constexpr,  # finite_ptr is one
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count the update, unless it is to be skipped, and say at what rates it is made; by one program."""
    go = 1.0
    if finite_ptr is not None:
        finite = tl.load(finite_ptr)
        if TRUTH:
            go = tl.where(finite != 0, 1.0, 0.0)
        else:
            go = tl.where(tl.abs(finite.to(tl.float64)) < float("inf"), 1.0, 0.0)
        tl.store(skipped_ptr, tl.load(skipped_ptr) + (1 - go.to(tl.int64)))
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    at = tl.arange(0, BLOCK)
    # Each thread loads its own counts and all take the maximum: one that loaded another's could find it raised already.
    update = (tl.max(tl.load(steps_ptr + at, mask=at < weights, other=0), 0) + 1).to(tl.int32)
    for start in range(0, weights, BLOCK):
        inside = start + at < weights
        steps = tl.load(steps_ptr + start + at, mask=inside)
        tl.store(steps_ptr + start + at, steps + go, mask=inside)
    for start in range(0, groups, LANES):
        group = start + tl.arange(0, LANES)
        inside = group < groups
        given, rates = given_ptr + group * 8, rates_ptr + group * 12
        for i in tl.static_range(6):
            tl.store(rates + i, tl.load(given + i, mask=inside).to(tl.float32), mask=inside)
        lr, beta1 = tl.load(given + 6, mask=inside, other=0), tl.load(given + 7, mask=inside, other=0)
        beta2 = tl.load(given + 2, mask=inside, other=0)
        step_size = lr / (1 - _power(beta1, update))
        correction = 1 / tl.sqrt(1 - _power(beta2, update))
        tl.store(rates + 6, step_size.to(tl.float32), mask=inside)
        tl.store(rates + 7, correction.to(tl.float32), mask=inside)
        tl.store(rates + 8, tl.zeros([LANES], tl.float32) + scale, mask=inside)
        tl.store(rates + 9, tl.zeros([LANES], tl.float32) + go, mask=inside)


def shipped() -> list[Shipped]:
    """With and without what may skip the step, and what scales its gradients."""
    rows = []
    fixed = {"given_ptr": "fp64", "steps_ptr": "fp32", "skipped_ptr": "i64", "rates_ptr": "fp32"}
    for finite, scale in ((None, None), ("fp32", None), ("u8", "fp32")):
        wanted = {"finite_ptr": finite, "scale_ptr": scale}
        types = fixed | {name: dtype for name, dtype in wanted.items() if dtype is not None}
        constexprs: dict[str, Any] = dict.fromkeys(wanted.keys() - types.keys())
        constexprs |= dict(TRUTH=finite == "u8", BLOCK=BLOCK, LANES=LANES)
        rows.append(Shipped(_begin_kernel, types, constexprs, NUM_WARPS, vector_bytes=0))
    return rows


def rates_of(groups: Sequence[dict[str, Any]], momentum: float) -> list[float]:
    """What the host sends: the kernel's `given_ptr`, group after group."""
    rates = []
    for group in groups:
        lr, beta1, beta2 = map(float, (group["lr"], *group["betas"]))
        decay = 1 - lr * float(group["weight_decay"])
        rates += [decay, 1 - beta1, beta2, 1 - beta2, float(group["eps"]), 1 - momentum, lr, beta1]
    return rates


def begin(tables: Tables, finite: Tensor | None, grad_scale: Tensor | None, skipped: Tensor) -> None:
    """Launch the kernel, on the device that is current. finite: bool or float []; grad_scale: fp32 []."""
    truth = finite is not None and finite.dtype == torch.bool
    _begin_kernel[(1,)](
        tables.given,
        tables.steps,
        finite.view(torch.uint8) if truth else finite,
        grad_scale,
        skipped,
        tables.rates,
        len(tables.given),
        len(tables.steps),
        TRUTH=truth,
        BLOCK=BLOCK,
        LANES=LANES,
        num_warps=NUM_WARPS,
    )
