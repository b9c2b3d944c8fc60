"""AdamWEMA: AdamW, the target encoder's average and low-precision copies of both, in one pass over the state.

    m = m + (1 - beta1) (g - m);    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    target = target + (1 - momentum) (w - target)

AdamW after Loshchilov and Hutter (arXiv 1711.05101), in the order of `torch.optim.AdamW`; the average as `ema_update_`
computes it. Bytes a parameter in fp32: five reads, four writes and two 16-bit copies are 40, of a parameter without a
target 30. A fused AdamW (28), the average (12) and two casts (6 each) move 52. A target's copy in e4m3 takes a byte
where 16 bits take two, and a scale a row.

The kernels (`adamw_kernels`) find their tensors through tables of addresses, made when those are first seen
(`adamw_tables`). Every step sends the groups' rates, one small copy that nobody waits for, and the addresses of
gradients where those are new ones. The count of updates, and so Adam's corrections, are the device's, which alone knows
what was skipped (`adamw_begin`).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw_begin import begin, rates_of
from .adamw_kernels import update
from .adamw_tables import Tables, Weight, is_capturing, local, upload
from .checks import FLOATS, describe, is_number
from .compat import StorageWeakRef, foreach_copy_
from .dispatch import use_triton
from .ema import ema_update_
from .fp8 import E4M3, Quantized, padded_rows, quantize_rows


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
    copies:  of parameters and targets that have one, the tensor that receives it rounded, 16 bits wide; of a target
             with two dimensions it may be a `Quantized`, as `quantize_rows` makes it of that, and is written over to
             the same bits. Not of shards: a scale is of a whole row.
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
        copies: Mapping[Any, Tensor | Quantized] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # so that GradScaler divides the gradients and leaves out steps itself
        self.targets, self.copies = dict(targets or {}), dict(copies or {})
        weights, averages = self._weights(), set(self.targets.values())
        for what, pairs, of, dtypes in (
            ("targets", self.targets, set(weights), (torch.float32,)),
            ("copies", self.copies, {*weights, *averages}, FLOATS),
        ):
            for key, value in pairs.items():
                if key not in of:
                    raise ValueError(f"{what}: want parameters as keys, got {describe(key)}, which is none")
                if what == "copies" and isinstance(value, Quantized):
                    _check_quantized(key, value, key in averages)
                elif value.shape != key.shape or value.device != key.device or value.dtype not in dtypes:
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
            self._begin_state([p for p in weights if p.grad is not None])
        elif weights:
            self._step_plain(weights, momentum, grad_scale)

    def _launch(self, tables: Tables, finite: Tensor | None, grad_scale: Tensor | None) -> None:
        with torch.cuda.device_of(tables.steps):
            begin(tables, finite, grad_scale, self.skipped)
            update(tables)

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
        for t in targets:
            if isinstance(low := self.copies.get(t), Quantized):
                quantize_rows(t, low)
                torch.autograd.graph.increment_version(low[:2])
        for some in (weights, targets):
            if low := [t for t in some if isinstance(self.copies.get(t), Tensor)]:
                copies = [local(self.copies[t]) for t in low]
                foreach_copy_(copies, [local(t).detach() for t in low])
                torch.autograd.graph.increment_version(copies)  # on CUDA a foreach copy does not count as a change

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _begin_state(self, weights: list[Tensor]) -> None:
        """As AdamW begins it, for those that have none: a skipped first step leaves it, with a count of 0, to save."""
        for p in weights:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=local(p).device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

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
        self._begin_state(weights)
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
            low = None if target is None else self.copies.get(target)
            target_copy, scale = low[:2] if isinstance(low, Quantized) else (low, None)
            moments = state["exp_avg"], state["exp_avg_sq"]
            rows.append(Weight(p, *moments, target, self.copies.get(p), target_copy, scale, group, dtype))
        return Tables(key, self._owned(weights), rows, steps)


def _check_quantized(key: Tensor, value: Quantized, is_target: bool) -> None:
    """Raise ValueError unless `value` is what `quantize_rows` makes of `key`, a target."""
    if not is_target or key.ndim != 2 or hasattr(key, "to_local"):
        kind = "sharded" if hasattr(key, "to_local") else "target" if is_target else "trained"
        raise ValueError(f"copies: want a Quantized for whole targets of two dimensions alone, got one for the {kind} "
                         f"{describe(key)}")
    rows, (values, scale, count) = padded_rows(key), value
    shapes = (values.shape, scale.shape, count) == ((rows, key.shape[1]), (rows, 1), len(key))
    dtypes = (values.dtype, scale.dtype) == (E4M3, torch.float32)
    if not shapes or not dtypes or {values.device, scale.device} != {key.device}:
        raise ValueError(f"copies: want a Quantized as quantize_rows makes it of its target, {describe(key)}, got "
                         f"{count} rows of {describe(values)} with scales {describe(scale)}")


def _scalar(name: str, x: Tensor | None, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Tensor | None:
    """`x`, of a DTensor the local value. Raises ValueError unless it is a 0-dim tensor of one of these dtypes."""
    if x is not None and (not isinstance(x, Tensor) or x.ndim or x.dtype not in dtypes or x.device != device):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: want a 0-dim {wanted} tensor on {device}, got {describe(x)}")
    return None if x is None else local(x)
