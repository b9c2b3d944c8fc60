"""PyTorch's private functions that this package calls, all of them, and what to do when one moves.

Nothing else in the package names anything private of PyTorch (a test asserts it), so whatever a new release of PyTorch
moves is mended here. Names without an underscore that are as little documented stand here too.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "StorageWeakRef",
    "assume_constant_result",
    "flash_attention_cpu",
    "flash_attention_cpu_backward",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp_",
    "gelu_backward",
    "layer_norm_backward",
    "mse_loss_backward_",
    "num_dispatch_modes",
    "scaled_mm",
    "smooth_l1_loss_backward_",
    "softmax_backward",
]

# StorageWeakRef: says whether a tensor's memory was freed, whatever became of the Python objects that looked at it.
# When it moves: a list of the tensors instead keeps one table for each set of them that was ever captured.

# The number of active `__torch_dispatch__` modes: fake tensors, checkpoint policies, FLOP counters.
# When it moves: torch/utils/_python_dispatch.py shows what replaced it. `lambda: 1` is always right, but sends
# each eager call through its registration: 80 us more for a forward and backward.
num_dispatch_modes = torch._C._len_torch_dispatch_stack

# Fused attention on a CPU that also returns the log-sum-exp, which `F.scaled_dot_product_attention` keeps to itself.
#   (q, k, v, dropout_p, is_causal, *, attn_mask, scale) -> out, lse [batch, heads, length]
#   (grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask, scale) -> dq, dk, dv
# All others are [batch, heads, length, head_dim].
# When they move: aten/src/ATen/native/native_functions.yaml lists them under these names. Without them, set
# `attention_torch._can_fuse` to return False: everything then goes through matrix products, slower for long sequences.
flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_attention_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# `torch.lerp_` and `copy_` over lists, in one call. The lerp refuses mixed dtypes, and a tensor as its weight.
# When they move: `ema.ema_update_ref`, a loop, computes the same.
foreach_lerp_ = torch._foreach_lerp_
foreach_copy_ = torch._foreach_copy_
foreach_add_ = torch._foreach_add_  # when it moves: a loop over `add_`

_SUM = 2  # the reduction "sum" in ATen's numbering: at::Reduction in ATen/core/Reduction.h


def assume_constant_result(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result` without the import of torch._dynamo, which takes 1.6 s.

    When it moves: take the public one.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x `[T, D]`, weight and bias, `[D]`; mean and rstd `[T, 1]` are `torch.native_layer_norm`'s.

    When it moves: with `z = (x - mean) * rstd` and `g = grad * weight`, `(g - g.mean(1, keepdim=True) - z * (g *
    z).mean(1, keepdim=True)) * rstd`, `(grad * z).sum(0)` and `grad.sum(0)`.
    """
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, mean, rstd, weight, weight, [True, True, True]
    )


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x behind an exact GELU.

    When it moves: `grad * (0.5 * (1 + erf(x / sqrt(2))) + x * exp(-x * x / 2) / sqrt(2 * pi))`.
    """
    return torch.ops.aten.gelu_backward(grad, x)


def scaled_mm(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`(x @ weight.T) * x_scale * weight_scale.T + bias` of e4m3 matrices [M, K] and [N, K], scales [M, 1] and [N, 1],
    or both [1, 1].

    Partial sums are kept in the tensor cores, with 14 bits or so ("fast accumulation"), as inference does everywhere.
    When it moves: `torch.nn.functional.scaled_mm` is its public successor.
    """
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), bias=bias, out_dtype=out_dtype, use_fast_accum=True
    )


def softmax_backward(grad: Tensor, softmax: Tensor) -> Tensor:
    """The gradient of the logits, given that of `softmax`, over the last dimension.

    When it moves: `softmax * (grad - (softmax * grad).sum(-1, keepdim=True))`, three passes instead of one.
    """
    return torch._softmax_backward_data(grad, softmax, -1, softmax.dtype)


def mse_loss_backward_(upstream: Tensor, pred: Tensor, target: Tensor) -> None:
    """Write `upstream * 2 * (pred - target)` over `target`.

    When it moves: `torch.sub(pred, target, out=target).mul_(2 * upstream)`, a pass more.
    """
    torch.ops.aten.mse_loss_backward.grad_input(upstream, pred, target, _SUM, grad_input=target)


def smooth_l1_loss_backward_(upstream: Tensor, pred: Tensor, target: Tensor, beta: float) -> None:
    """Write `upstream * clamp((pred - target) / beta, -1, 1)` over `target`; beta > 0.

    When it moves: `torch.sub(pred, target, out=target).div_(beta).clamp_(-1, 1).mul_(upstream)`, three passes more.
    """
    torch.ops.aten.smooth_l1_loss_backward.grad_input(upstream, pred, target, _SUM, beta, grad_input=target)
