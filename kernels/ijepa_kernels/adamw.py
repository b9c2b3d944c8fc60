"""AdamWEMA: AdamW, the target encoder's average and low-precision copies of both, in one pass over the state.

    m = m + (1 - beta1) (g - m);    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    target = target + (1 - momentum) (w - target)

AdamW after Loshchilov and Hutter (arXiv 1711.05101), in the order of `torch.optim.AdamW`; the average as `ema_update_`
computes it. Bytes a parameter in fp32: five reads, four writes and two 16-bit copies are 40, of a parameter without a
target 30. A fused AdamW (28), the average (12) and two casts (6 each) move 52.

The kernel finds its tensors through a table of addresses, made when they are first seen. Gradients are new ones at
every step, so their addresses are sent each time: one small copy, which nobody waits for.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, describe, is_number
from .compat import foreach_add_, foreach_copy_
from .dispatch import tl, triton, use_triton
from .ema import _lerp, ema_update_
from .shipped import Shipped

CHUNK, NUM_WARPS = 1024, 4  # elements a program. Chunks of 4,096 take twice the registers, and leave one program an SM
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = 9  # of a row of the table


@triton.jit
def _adamw(w, g, m, v, decay, rest1, beta2, rest2, eps, step_size, correction):
    """The new w, m and v. decay: 1 - lr * weight_decay; rest: 1 - beta; correction: 1 / sqrt(1 - beta2^t)."""
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    return w * decay - step_size * m / (tl.sqrt(v) * correction + eps), m, v


@triton.jit
def _adamw_ema_kernel(
    table_ptr,  # int64 [programs, 9]: addresses of a chunk of w, m, v, target, two copies; tensor, first element, count
    grads_ptr,  # int64 [tensors]: addresses; odd where it is no multiple of 16
    decay,
    rest1,
    beta2,
    rest2,
    eps,
    step_size,
    correction,
    weight,  # 1 - momentum
    GRAD: tl.constexpr,
    TARGET: tl.constexpr,  # whether there is one
    COPY: tl.constexpr,  # dtype of the copy of w, or None
    TARGET_COPY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 9
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    target_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    copy_ptr, target_copy_ptr = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    address = tl.load(grads_ptr + tl.load(row_ptr + 6))
    count = tl.load(row_ptr + 8)  # negative: one of the tensors does not begin at a multiple of 16 bytes
    odd = address & 1
    g_ptr = (address - odd).to(tl.pointer_type(GRAD)) + tl.load(row_ptr + 7)
    at = tl.arange(0, CHUNK)
    if (count == CHUNK) & (odd == 0):  # without masks: masked loads from a table's pointers are scalar
        w_ptr, m_ptr, v_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        w, m, v = tl.load(w_ptr + at), tl.load(m_ptr + at), tl.load(v_ptr + at)  # [CHUNK]
        g = tl.load(g_ptr + at).to(tl.float32)
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
        v, g = tl.load(v_ptr + at, mask=inside), tl.load(g_ptr + at, mask=inside).to(tl.float32)
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
    """Weights with and without a target and copies; gradients in fp32, and in bf16."""
    floats = ("decay", "rest1", "beta2", "rest2", "eps", "step_size", "correction", "weight")
    types = dict.fromkeys(floats, "fp32") | {"table_ptr": "i64", "grads_ptr": "i64"}
    fp32, bf16 = tl.float32, tl.bfloat16
    rows = []
    for grad, target, copy in ((fp32, False, None), (fp32, False, bf16), (fp32, True, None), (fp32, True, bf16),
                               (bf16, True, bf16)):
        constexprs = dict(GRAD=grad, TARGET=target, COPY=copy, TARGET_COPY=copy if target else None, CHUNK=CHUNK)
        rows.append(Shipped(_adamw_ema_kernel, types, constexprs, NUM_WARPS))
    return rows


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


class _Launch(NamedTuple):
    """Weights of one group that differ in nothing that the kernel is compiled for."""

    table: Tensor
    positions: list[int]  # of the weights whose gradients it reads, in the list of all
    group: int
    constexprs: dict[str, Any]


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step also moves a target encoder and writes low-precision copies.

    params:  as for AdamW, fp32: parameters or groups of them. DTensors are updated shard by shard.
    targets: of the parameters that have one, the tensor that averages it: fp32, of its shape.
    copies:  of parameters and targets that have one, the tensor that receives it rounded, 16 bits wide.
    lr, betas, eps, weight_decay: as for AdamW; `lr` and `weight_decay` of a group may be changed between steps.

    `state_dict` is AdamW's, both ways. On CUDA all weights are updated by one kernel (a launch for each group and
    kind); elsewhere by the fused AdamW, `ema_update_` and a copy, which compute the same. Raises ValueError.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        targets: Mapping[Any, Tensor] | None = None,
        copies: Mapping[Any, Tensor] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.targets, self.copies = dict(targets or {}), dict(copies or {})
        weights = [p for group in self.param_groups for p in group["params"]]
        for what, pairs, of, dtypes in (
            ("targets", self.targets, set(weights), (torch.float32,)),
            ("copies", self.copies, {*weights, *self.targets.values()}, FLOATS),
        ):
            for key, value in pairs.items():
                if key not in of:
                    raise ValueError(f"{what}: want parameters as keys, got {describe(key)}, which is none")
                if value.shape != key.shape or value.device != key.device or value.dtype not in dtypes:
                    raise ValueError(f"{what}: want a tensor of its parameter's shape and device, {describe(key)}, "
                                     f"got {describe(value)}")
        self._launches: tuple[list[int], list[_Launch]] | None = None  # the addresses that they hold for; they
        self._updates: int | None = None  # steps of every weight so far; None: to be read from the state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._launches = self._updates = None

    @torch.no_grad()
    def step(self, closure: None = None, *, momentum: float = 1.0) -> None:  # type: ignore[override]
        """One update. momentum: of the average, in [0, 1]; 1 leaves the targets as they are."""
        if closure is not None:
            raise ValueError("closure: want None, got a function")
        if not is_number(momentum) or not 0 <= momentum <= 1:
            raise ValueError(f"momentum: want a number in [0, 1], got {describe(momentum)}")
        weights = [p for group in self.param_groups for p in group["params"]]
        if not weights:
            return
        if not use_triton(_local(weights[0])) or any(
            p.grad is None or p.dtype != torch.float32 or p.grad.dtype not in FLOATS for p in weights
        ):
            self._updates = None
            super().step()
            torch.autograd.graph.increment_version([_local(p) for p in weights])  # a fused update does not count as one
            self._follow(weights, momentum)
            return
        self._step_kernel(weights, float(momentum))

    def _follow(self, weights: list[Tensor], momentum: float) -> None:
        sources = [p for p in weights if p in self.targets]
        targets = [self.targets[p] for p in sources]
        low = [[t for t in some if t in self.copies] for some in (weights, targets)]
        ema_update_(targets, sources, momentum)
        for some in low:
            if some:
                copies = [_local(self.copies[t]) for t in some]
                foreach_copy_(copies, [_local(t).detach() for t in some])
                torch.autograd.graph.increment_version(copies)  # on CUDA a foreach copy does not count as a change

    def _step_kernel(self, weights: list[Tensor], momentum: float) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        if self._updates is None:  # after the first step, or a resume: the one time that the device is asked
            steps = {int(step) for step in torch.stack([self.state[p]["step"] for p in weights]).tolist()}
            if len(steps) > 1:
                raise ValueError(f"state: want one number of steps for all parameters, got {sorted(steps)}")
            self._updates = steps.pop()
        self._updates += 1
        launches = self._plan(weights)
        grads = [_local(p.grad).contiguous() for p in weights]
        addresses = [g.data_ptr() + (g.data_ptr() % 16 != 0) for g in grads]
        host = torch.tensor(addresses, dtype=torch.int64, pin_memory=grads[0].is_cuda)
        table = host.to(grads[0].device, non_blocking=True)
        with torch.cuda.device_of(grads[0]):
            for launch in launches:
                self._launch(launch, table, grads, momentum)
        foreach_add_([self.state[p]["step"] for p in weights], 1)
        changed = [t for p in weights for t in (p, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])]
        changed += [*self.targets.values(), *self.copies.values()]
        torch.autograd.graph.increment_version([_local(t) for t in changed])

    def _launch(self, launch: _Launch, table: Tensor, grads: list[Tensor], momentum: float) -> None:
        group = self.param_groups[launch.group]
        (beta1, beta2), lr, t = group["betas"], float(group["lr"]), self._updates
        _adamw_ema_kernel[(launch.table.shape[0],)](
            launch.table,
            table,
            1 - lr * float(group["weight_decay"]),
            1 - beta1,
            float(beta2),
            1 - beta2,
            float(group["eps"]),
            lr / (1 - beta1**t),
            1 / math.sqrt(1 - beta2**t),
            1 - momentum,
            **launch.constexprs,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )

    def _plan(self, weights: list[Tensor]) -> list[_Launch]:
        """Tables for the addresses as they are now, new ones where an address or a gradient's dtype has changed."""
        lists, key = [], []
        for p in weights:
            target = self.targets.get(p)
            tensors = [p, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], target, self.copies.get(p)]
            tensors.append(None if target is None else self.copies.get(target))
            lists.append([None if x is None else _local(x) for x in tensors])
            key += [0 if x is None else x.data_ptr() for x in lists[-1]]
            key.append(p.grad.dtype)
        if self._launches is None or self._launches[0] != key:
            self._launches = key, self._make_plan(weights, lists)
        return self._launches[1]

    def _make_plan(self, weights: list[Tensor], lists: list[list[Tensor | None]]) -> list[_Launch]:
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        rows: dict[tuple, tuple[list[Tensor], list[int]]] = {}
        for position, (p, tensors) in enumerate(zip(weights, lists, strict=True)):
            w, _, _, target, copy, target_copy = tensors
            if any(x is not None and not x.is_contiguous() for x in tensors):
                raise ValueError(f"params: want contiguous tensors, targets and copies, got strides {w.stride()}")
            dtypes = [None if x is None else _TL[x.dtype] for x in (copy, target_copy)]
            key = group_of[p], _TL[p.grad.dtype], target is not None, *dtypes
            starts = torch.arange(0, w.numel(), CHUNK)
            count = (w.numel() - starts).clamp(max=CHUNK)
            if any(x is not None and x.data_ptr() % 16 for x in tensors):
                count = -count
            addresses = [0 * starts if x is None else x.data_ptr() + x.element_size() * starts for x in tensors]
            parts, positions = rows.setdefault(key, ([], []))
            parts.append(torch.stack([*addresses, torch.full_like(starts, position), starts, count], 1))
            positions.append(position)
        launches = []
        for (group, grad, has_target, copy, target_copy), (parts, positions) in rows.items():
            table = torch.cat(parts)
            if len(table):
                constexprs = dict(GRAD=grad, TARGET=has_target, COPY=copy, TARGET_COPY=target_copy)
                launches.append(_Launch(table.to(lists[0][0].device), positions, group, constexprs))
        return launches
