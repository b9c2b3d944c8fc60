"""AdamWEMA: AdamW, the target encoder's average and low-precision copies of both, in one pass over the state.

    m = m + (1 - beta1) (g - m);    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    target = target + (1 - momentum) (w - target)

AdamW after Loshchilov and Hutter (arXiv 1711.05101), in the order of `torch.optim.AdamW`; the average as `ema_update_`
computes it. Bytes a parameter in fp32: five reads, four writes and two 16-bit copies are 40, of a parameter without a
target 30. A fused AdamW (28), the average (12) and two casts (6 each) move 52.

The kernels find their tensors through tables of addresses, made when those are first seen (`adamw_tables`). Every step
sends the groups' rates, one small copy that nobody waits for, and the addresses of gradients where those are new ones.
The count of updates, and so Adam's corrections, are the device's, which alone knows what was skipped (`adamw_begin`).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw_begin import begin, rates_of
from .adamw_tables import CHUNK, Tables, Weight, is_capturing, local, upload
from .checks import FLOATS, describe, is_number
from .compat import StorageWeakRef, foreach_copy_
from .dispatch import tl, triton, use_triton
from .ema import _lerp, ema_update_
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


class _Prepared(NamedTuple):
    """What `apply` is to do."""

    weights: list[Tensor]
    grads: list[Tensor]  # held until they are read
    strided: bool  # some of them are copies of gradients with gaps
    tables: Tables | None  # None: without a kernel
    momentum: float


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step also moves a target encoder and writes low-precision copies.

    params:  as for AdamW, fp32: parameters or groups of them. DTensors are updated shard by shard.
    targets: of the parameters that have one, the tensor that averages it: fp32, of its shape.
    copies:  of parameters and targets that have one, the tensor that receives it rounded, 16 bits wide.
    lr, betas, eps, weight_decay: as for AdamW; `lr` and `weight_decay` of a group may be changed between steps.

    `step` is `prepare`, the host's part, and `apply`, the device's. `state_dict` is AdamW's, both ways. On CUDA all
    weights are updated by one kernel (a launch for each kind); elsewhere by the fused AdamW, `ema_update_` and a copy,
    which compute the same. Raises ValueError.

    skipped: int64 [], on the device of the weights: steps that were skipped because `finite` was not. It is no part of
             the state_dict.
    layout:  a number that changes where `apply` reads other memory than before; see there.
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
        self._step_supports_amp_scaling = False  # so that GradScaler divides the gradients and leaves out steps itself
        self.targets, self.copies = dict(targets or {}), dict(copies or {})
        weights = self._weights()
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
        self.skipped = torch.zeros((), dtype=torch.int64, device=weights[0].device if weights else None)
        self.layout = 0
        self._tables: Tables | None = None
        # A graph reads its tables at every replay, also where newer ones took their place: kept as long as its weights.
        self._captured: list[tuple[StorageWeakRef, list[Tensor]]] = []
        self._prepared: _Prepared | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._replace_tables(None)
        self._prepared = None

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        momentum: float = 1.0,
        finite: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """One update. See `prepare` and `apply` for the arguments."""
        if closure is not None:
            raise ValueError("closure: want None, got a function")
        self.prepare(momentum)
        self.apply(finite=finite, grad_scale=grad_scale)

    @torch.no_grad()
    def prepare(self, momentum: float = 1.0) -> None:
        """The host's part of an update: sends the device the groups' rates and where the gradients are.

        momentum: of the average, in [0, 1]; 1 leaves the targets as they are.

        The update is of the gradients that the parameters have now. Until `apply` is through, nothing that it reads or
        writes may move, and both go to one stream. To autograd the weights change here. Raises ValueError for a bad
        momentum, for tensors with gaps, for gradients with gaps where a graph holds `apply`, and for weights whose
        numbers of updates differ; RuntimeError while a graph is captured.
        """
        if not is_number(momentum) or not 0 <= momentum <= 1:
            raise ValueError(f"momentum: want a number in [0, 1], got {describe(momentum)}")
        weights = self._weights()
        if is_capturing(weights):
            raise RuntimeError("prepare: want it before the capture of a CUDA graph, which can hold apply alone")
        grads = [p.grad for p in weights]
        tables, strided = self._tables_for(weights, grads), False
        if tables is None:
            self._replace_tables(None)  # the plain update may leave weights with different numbers of updates
        else:
            if tables.sharded:
                grads = [local(g) for g in grads]
            if not all(map(Tensor.is_contiguous, grads)):
                if tables.captured:
                    raise ValueError("params: want contiguous gradients where a CUDA graph holds apply")
                grads, strided = [g.contiguous() for g in grads], True
            tables.send_grads(grads)
            upload(rates_of(self.param_groups, float(momentum)), tables.given)
            torch.autograd.graph.increment_version(tables.changed)
        self._prepared = _Prepared(weights, grads, strided, tables, float(momentum))

    @torch.no_grad()
    def apply(self, *, finite: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """The device's part of an update that was prepared.

        finite:     a 0-dim tensor on the weights' device, bool or of any float. Where it is False, infinite or NaN
                    nothing changes (weights, state, targets, copies), and `skipped` counts it. Decided on the device.
                    Of sharded weights it must be the same on all ranks.
        grad_scale: 0-dim, fp32, on the weights' device: multiplies every gradient, which stays as it is.

        With the kernel these are launches alone: nothing is copied, read back or waited for, and the launches depend on
        no number that changes from step to step. So a CUDA graph may hold them; call `prepare` before the capture and
        before every replay. Where that has changed `layout`, capture anew. Without the kernel `finite` is read.
        Raises ValueError, and RuntimeError where nothing is prepared.
        """
        if self._prepared is None:
            raise RuntimeError("apply: want a call of prepare before each")
        weights, _grads, strided, tables, momentum = self._prepared  # the gradients live until all is launched
        device = weights[0].device if weights else self.skipped.device
        finite = _scalar("finite", finite, (torch.bool, torch.float64, *FLOATS), device)
        grad_scale = _scalar("grad_scale", grad_scale, (torch.float32,), device)
        if tables is not None and is_capturing(weights):
            if strided:
                raise ValueError("params: want contiguous gradients where a CUDA graph holds apply")
            if not tables.captured:
                self._captured = [kept for kept in self._captured if not kept[0].expired()]
                self._captured.append((tables.memory, tables.buffers()))
                tables.captured = True
        self._prepared = None
        if tables is not None:
            self._launch(tables, finite, grad_scale)
        elif finite is not None and not (finite if finite.dtype == torch.bool else finite.isfinite()):
            self.skipped += 1
        elif weights:
            self._step_plain(weights, momentum, grad_scale)

    def _launch(self, tables: Tables, finite: Tensor | None, grad_scale: Tensor | None) -> None:
        with torch.cuda.device_of(tables.steps):
            begin(tables, finite, grad_scale, self.skipped)
            for table, constexprs in tables.launches:
                _adamw_ema_kernel[(len(table),)](
                    table, tables.grads, tables.rates, **constexprs, CHUNK=CHUNK, num_warps=NUM_WARPS
                )

    def _step_plain(self, weights: list[Tensor], momentum: float, grad_scale: Tensor | None) -> None:
        grads = [p.grad for p in weights]
        try:
            if grad_scale is not None:
                for p in weights:
                    p.grad = None if p.grad is None else p.grad * grad_scale
            super().step()
        finally:
            if grad_scale is not None:
                for p, grad in zip(weights, grads, strict=True):
                    p.grad = grad
        torch.autograd.graph.increment_version([local(p) for p in weights])  # a fused update does not count as one
        sources = [p for p in weights if p in self.targets]
        targets = [self.targets[p] for p in sources]
        ema_update_(targets, sources, momentum)
        for some in (weights, targets):
            if low := [t for t in some if t in self.copies]:
                copies = [local(self.copies[t]) for t in low]
                foreach_copy_(copies, [local(t).detach() for t in low])
                torch.autograd.graph.increment_version(copies)  # on CUDA a foreach copy does not count as a change

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _replace_tables(self, tables: Tables | None) -> None:
        if tables is not self._tables:
            self._tables = tables
            self.layout += 1

    def _tables_for(self, weights: list[Tensor], grads: list[Tensor | None]) -> Tables | None:
        """Those that hold, new ones if need be; None where the kernel cannot be used."""
        if not weights or any(g is None for g in grads) or not use_triton(local(weights[0])):
            return None
        key = [g.dtype for g in grads], [len(group["params"]) for group in self.param_groups]
        if self._tables is None or not self._tables.hold(key, self._owned(weights)):
            if any(p.dtype != torch.float32 for p in weights) or not set(key[0]) <= set(FLOATS):
                return None
            self._replace_tables(self._make_tables(weights, key))
        return self._tables

    def _owned(self, weights: list[Tensor]) -> list[Any]:
        """Everything whose replacement would make a table a lie."""
        state = [x for values in self.state.values() for x in values.values()]
        targets, copies = self.targets, self.copies
        return [*weights, *self.state, *state, *targets, *targets.values(), *copies, *copies.values()]

    def _make_tables(self, weights: list[Tensor], key: tuple[list[torch.dtype], list[int]]) -> Tables:
        device = local(weights[0]).device
        for p in weights:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        steps = torch.stack([self.state[p]["step"].to(device, torch.float32) for p in weights])
        counts = {int(count) for count in steps.tolist()}  # the one time that the device is asked
        if len(counts) > 1:
            raise ValueError(f"state: want one number of steps for all parameters, got {sorted(counts)}")
        for p, step in zip(weights, steps.unbind(), strict=True):  # a weight's own number, in one tensor
            self.state[p]["step"] = step
        if self.skipped.device != device:
            self.skipped = torch.zeros_like(self.skipped, device=device)
        group_of = [i for i, size in enumerate(key[1]) for _ in range(size)]
        rows = []
        for p, group, dtype in zip(weights, group_of, key[0], strict=True):
            state, target = self.state[p], self.targets.get(p)
            target_copy = None if target is None else self.copies.get(target)
            moments = state["exp_avg"], state["exp_avg_sq"]
            rows.append(Weight(p, *moments, target, self.copies.get(p), target_copy, group, dtype))
        return Tables(key, self._owned(weights), rows, steps)


def _scalar(name: str, x: Tensor | None, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Tensor | None:
    """`x`, of a DTensor the local value. Raises ValueError unless it is a 0-dim tensor of one of these dtypes."""
    if x is not None and (not isinstance(x, Tensor) or x.ndim or x.dtype not in dtypes or x.device != device):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: want a 0-dim {wanted} tensor on {device}, got {describe(x)}")
    return None if x is None else local(x)
