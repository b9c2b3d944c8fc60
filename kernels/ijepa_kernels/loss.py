"""The I-JEPA loss in one op: layer norm of the targets, gather of the predicted patches, smooth-L1 or L2, gradient.

Released I-JEPA normalises the target encoder's output over its features, without affine parameters, gathers the patches
of the target blocks and takes `smooth_l1_loss(pred, target)`. Only the T gathered rows of the [B, N, D] targets are
ever used, so only those are read and normalised, and the gradient, which costs nothing once the difference is in
registers, is written in the same pass:

    t = target[image, index];   t = (t - mean(t)) / sqrt(var(t) + eps)          (biased variance, as torch's layer norm)
    d = pred - t;               c = clamp(d, -beta, beta)
    smooth_l1:  sum c * (d - c / 2) / beta / denominator        gradient  c / beta / denominator
    l2:         sum d * d / denominator                         gradient  2 * d / denominator

Bytes: it reads pred and the gathered target rows once and writes the gradient once.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import outside_dispatch, register
from .packed import Packed, check_packed, describe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("smooth_l1", "l2")


def smooth_l1_loss_ref(
    pred: Tensor,
    target: Tensor,
    packed: Packed,
    *,
    kind: str = "smooth_l1",
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    denominator: float | None = None,
) -> Tensor:
    """`smooth_l1_loss` as plain, differentiable PyTorch, in the widest dtype that comes in and at least fp32."""
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    batch, num_patches, dim = target.shape
    rows = target.reshape(batch * num_patches, dim).index_select(0, packed.rows(num_patches)).to(dtype)
    if normalize:
        rows = F.layer_norm(rows, (dim,), eps=eps)
    if kind == "l2":
        total = F.mse_loss(pred.to(dtype), rows, reduction="sum")
    else:
        total = F.smooth_l1_loss(pred.to(dtype), rows, reduction="sum", beta=beta)
    return total / _denominator(pred, denominator)


def _denominator(pred: Tensor, denominator: float | None) -> float:
    return max(pred.numel(), 1) if denominator is None else denominator


def _gradient_dtype(pred: Tensor) -> torch.dtype:
    """A mean's gradient, 1 / (T * D), is below fp16's smallest number until a loss scale comes in the backward."""
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


def _forward_torch(pred, target, packed, kind, beta, normalize, eps, denominator, with_gradient):
    num_patches, dim = target.shape[1:]
    rows = packed.rows(num_patches)
    if target.is_contiguous():
        rows = target.view(-1, dim).index_select(0, rows).float()
    else:
        rows = target[rows // num_patches, rows % num_patches].float()
    if normalize:
        rows = F.layer_norm(rows, (dim,), eps=eps)
    difference = torch.sub(pred.float(), rows, out=rows)
    scale = 1 / _denominator(pred, denominator)
    zero = torch.zeros((), dtype=torch.float32, device=pred.device).expand_as(difference)
    if kind == "l2":
        loss = F.mse_loss(difference, zero, reduction="sum") * scale
        gradient = difference.mul_(2 * scale)
    else:
        loss = F.smooth_l1_loss(difference, zero, reduction="sum", beta=beta) * scale
        # beta 0 is L1: clamp(d, 0, 0) / 0 would be nan
        gradient = difference.clamp_(-beta, beta).mul_(scale / beta) if beta else difference.sign_().mul_(scale)
    return loss, gradient.to(_gradient_dtype(pred)) if with_gradient else pred.new_empty(0)


def _forward(
    pred: Tensor,
    target: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    image: Tensor,
    max_seqlen: int,
    kind: str,
    beta: float,
    normalize: bool,
    eps: float,
    denominator: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    packed = Packed(indices, cu_seqlens, image, max_seqlen)
    return _forward_torch(pred, target, packed, kind, beta, normalize, eps, denominator, with_gradient)


def _forward_fake(pred, *_args):
    *_, with_gradient = _args
    gradient = torch.empty_like(pred, dtype=_gradient_dtype(pred), memory_format=torch.contiguous_format)
    return pred.new_empty((), dtype=torch.float32), gradient if with_gradient else pred.new_empty(0)


def _scale_gradient_(gradient: Tensor, by: Tensor) -> None:
    """gradient *= by, without touching it where `by` is 1, as it is for every loss that is itself the root."""
    if by.device.type == "cpu" and by == 1:
        return
    gradient.mul_(by)


def _setup_context(ctx, inputs, output):
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, *inputs[:5])
    ctx.arguments, ctx.used = inputs[5:], False


def _backward(ctx, grad_loss, _grad_gradient):
    nothing = (None,) * (4 + len(ctx.arguments))
    if grad_loss is None:
        return None, *nothing
    gradient, *tensors = ctx.saved_tensors
    if not outside_dispatch():
        return (gradient * grad_loss).to(tensors[0].dtype), *nothing  # fused by a compiler, which may see no mutation
    if ctx.used:  # retain_graph: the first backward scaled the buffer and gave it away
        gradient = _forward(*tensors, *ctx.arguments)[1]
    ctx.used = True
    _scale_gradient_(gradient.data, grad_loss)  # .data: a saved tensor must not change its version, see above
    return gradient.to(tensors[0].dtype), *nothing


_forward_op = register(
    "smooth_l1_loss(Tensor pred, Tensor target, Tensor indices, Tensor cu_seqlens, Tensor image, SymInt max_seqlen, "
    "str kind, float beta, bool normalize, float eps, float? denominator, bool with_gradient) "
    "-> (Tensor loss, Tensor gradient)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def smooth_l1_loss(
    pred: Tensor,
    target: Tensor,
    packed: Packed,
    *,
    kind: str = "smooth_l1",
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    denominator: float | None = None,
) -> Tensor:
    """The loss between predicted tokens and the target encoder's at the same patches (arXiv 2301.08243, section 3).

    pred:        [T, D] fp32, bf16 or fp16; row t predicts patch `packed.indices[t]` of its image. Differentiable.
    target:      [B, N, D] fp32, bf16 or fp16, any strides: every token of every image, before the layer norm. Constant.
    packed:      T tokens, indices below N, images below B.
    kind:        "smooth_l1" (Huber over beta, as the released code; beta 0 is L1) or "l2" (squared error, as the paper)
    normalize:   layer norm of the target rows over D, no affine, with `eps`.
    denominator: what the sum is divided by, a Python number; None: T * D, the mean. Pass the global batch's count when
                 a batch is split over ranks or accumulation steps. No tokens give a loss of 0.

    Returns a scalar in fp32; arithmetic is fp32 throughout. Raises ValueError.
    """
    for name, x, shape in (("pred", pred, "[T, D]"), ("target", target, "[B, N, D]")):
        if not isinstance(x, Tensor) or x.ndim != shape.count(",") + 1 or x.dtype not in DTYPES:
            raise ValueError(f"{name}: want a fp32, bf16 or fp16 {shape} tensor, got {describe(x)}")
    if target.device != pred.device or target.shape[2] != pred.shape[1]:
        raise ValueError(f"target: want [B, N, {pred.shape[1]}] on {pred.device} as pred, got {describe(target)}")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("target: want a tensor that requires no gradient, as under torch.no_grad(), got one that does")
    check_packed(packed, pred.device, target.shape[1], target.shape[0])
    if packed.indices.shape[0] != pred.shape[0]:
        raise ValueError(f"packed: want {pred.shape[0]} tokens as pred has rows, got {packed.indices.shape[0]}")
    if kind not in KINDS:
        raise ValueError(f"kind: want one of {', '.join(KINDS)}, got {kind!r}")
    if beta < 0:
        raise ValueError(f"beta: want a number >= 0, got {beta}")
    if isinstance(denominator, Tensor) or (denominator is not None and not denominator > 0):
        raise ValueError(f"denominator: want a Python number > 0 or None, got {denominator!r}")
    with_gradient = torch.is_grad_enabled() and pred.requires_grad
    if denominator is not None and torch.compiler.is_compiling():
        # To the compiler a float argument of a custom op is a constant, and the count changes with every batch.
        mean = _forward_op(pred, target, *packed, kind, beta, normalize, eps, None, with_gradient)[0]
        return mean * (pred.numel() / denominator)
    return _forward_op(pred, target, *packed, kind, beta, normalize, eps, denominator, with_gradient)[0]
