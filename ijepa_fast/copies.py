"""Copies of fp32 weights in the dtype of the matrix products, made once an update instead of at every call.

A layer multiplies with its copy; the gradient goes to the fp32 weight, which alone is trained, averaged and saved. A
copy is never stale: tensors count their changes in place, and `Copies.refresh`, at the beginning of a model's forward,
rounds those weights again that were changed since (changes through `.data` alone are not counted). Whoever changes
weights and rounds them in the same pass says so by `Copies.mark_fresh`. Copies in e4m3 are kept alike (`fp8`).
"""
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from ijepa_kernels import column_sum
from ijepa_kernels.dispatch import use_triton
from torch import Tensor, nn

from ijepa_fast import compat


class Copies:
    """The copies of a model's weights."""

    def __init__(self, weights: list[nn.Parameter], dtype: torch.dtype):
        self.weights = weights
        self.copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
        self._seen = [-1] * len(weights)  # the counts of changes
        self._of = {id(weight): copy for weight, copy in zip(self.weights, self.copies, strict=True)}
        self._dtype = dtype

    def __getitem__(self, weight: Tensor) -> Tensor:
        return self._of[id(weight)]

    def of(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Their copies, and for those that have none a tensor that nobody reads."""
        return [self._of[id(w)] if id(w) in self._of else torch.empty_like(w, dtype=self._dtype) for w in weights]

    @torch.no_grad()
    def refresh(self) -> None:
        counts = [compat.changes(weight) for weight in self.weights]
        stale = [i for i, count in enumerate(counts) if count != self._seen[i]]
        if stale:
            compat.foreach_copy_([self.copies[i] for i in stale], [self.weights[i].detach() for i in stale])
            self._seen = counts

    def mark_fresh(self) -> None:
        """All copies were just written."""
        self._seen = [compat.changes(weight) for weight in self.weights]


class _CopiedLinear(torch.autograd.Function):
    """x @ weight.T + bias, computed with the copies; weight and bias have their gradients in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_copy)
        ctx.dtype, ctx.with_bias = weight.dtype, bias is not None
        return F.linear(x, weight_copy, bias_copy)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_copy = ctx.saved_tensors
        grad_x = grad @ weight_copy if ctx.needs_input_grad[0] else None
        grad_weight = _wide_product(grad.t(), x, ctx.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if ctx.with_bias:  # on a CPU rounded first, as PyTorch's own linear layer does, and so FSDP's
            total = grad.sum(0) if grad.is_cpu and not use_triton(grad) else column_sum(grad)
            grad_bias = total.to(ctx.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: a GPU's product writes fp32 itself, where it would be rounded and widened again."""
    if a.is_cpu or torch.compiler.is_compiling() or dtype != torch.float32:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def copied_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_copy: Tensor, bias_copy: Tensor | None
) -> Tensor:
    """`F.linear(x, weight, bias)` by copies that have x's dtype; x is `[T, in]`."""
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return F.linear(x, weight_copy, bias_copy)
    return _CopiedLinear.apply(x, weight, bias, weight_copy, bias_copy)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, copy):  # type: ignore[no-untyped-def]
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.to(ctx.dtype), None


def copied(weight: Tensor, copy: Tensor) -> Tensor:
    """The copy, whose gradient is the weight's."""
    return _Copied.apply(weight, copy) if torch.is_grad_enabled() and weight.requires_grad else copy
