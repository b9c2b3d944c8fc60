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

For a captured graph, which computes as many rows at every replay, rows may be padding, and the denominator a tensor.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_tensor, describe, is_number
from .compat import mse_loss_backward_, smooth_l1_loss_backward_
from .dispatch import tl, triton, use_triton
from .packed import Packed, check_packed
from .registration import is_plain_eager, register
from .shipped import Shipped

KINDS = ("smooth_l1", "l2")
# D rounded up to a power of two -> rows a program, warps: 32 elements a thread, so that many loads are in flight.
# At D 1,280 it takes 1.5 times as long as a copy of as many bytes on an H100: no other tiles were tried there. A row is
# held in registers; wider ones run as plain PyTorch.
TILES = {256: (8, 2), 512: (8, 4), 1024: (4, 4), 2048: (2, 4), 4096: (1, 4), 8192: (1, 8), 16384: (1, 16)}
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1056  # eight programs on each of the 132 multiprocessors of an H100


def _block(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 256)


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


def _rows_of(packed: Packed, num_patches: int) -> Tensor:
    """`packed.rows`, where rows past the last sequence are taken to belong to it."""
    token = torch.arange(packed.indices.shape[0], dtype=torch.int32, device=packed.indices.device)
    last = packed.image.shape[0] - 1
    sequence = torch.searchsorted(packed.cu_seqlens[1:], token, right=True).clamp(max=last)
    return packed.image.long().index_select(0, sequence) * num_patches + packed.indices


def _forward_torch(pred, target, packed, kind, beta, normalize, eps, denominator, with_gradient, divisor, padded):
    num_patches, dim = target.shape[1:]
    rows = _rows_of(packed, num_patches) if padded else packed.rows(num_patches)
    if target.is_contiguous():
        rows = target.view(-1, dim).index_select(0, rows).float()
    else:
        rows = target[rows // num_patches, rows % num_patches].float()
    if normalize:
        rows = F.layer_norm(rows, (dim,), eps=eps)
    pred32, scale = pred.float(), 1 / _denominator(pred, denominator)
    upstream = torch.full((), scale, device=pred.device)
    if divisor is not None:
        scale = upstream = upstream / divisor
    if padded:  # no difference, no loss, no gradient
        counts = torch.arange(pred.shape[0], device=pred.device) < packed.cu_seqlens[-1]
        pred32 = torch.where(counts[:, None], pred32, rows)
    if kind == "l2":
        loss = F.mse_loss(pred32, rows, reduction="sum")
    elif beta == 0:
        loss = F.l1_loss(pred32, rows, reduction="sum")
    else:
        loss = F.smooth_l1_loss(pred32, rows, reduction="sum", beta=beta)
    if not with_gradient:
        return loss * scale, pred.new_empty(0)
    # Written over the rows: half the time of a new tensor, which ATen would fill with zeros first.
    if kind == "l2":
        mse_loss_backward_(upstream, pred32, rows)
    elif beta == 0:
        torch.sub(pred32, rows, out=rows).sign_().mul_(scale)
    else:
        smooth_l1_loss_backward_(upstream, pred32, rows, beta)
    return loss * scale, rows.to(_gradient_dtype(pred))


@triton.jit
def _sequence_of(token, cu_seqlens_ptr, num_sequences, search_steps):
    """The last sequence that begins at or before `token`, by bisection; empty ones at the same place come before it."""
    low = token * 0
    high = low + num_sequences - 1
    for _ in range(search_steps):  # ceil(log2(S)); the first steps read what every program reads, from L1
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "search_steps"])  # they change from batch to batch
def _loss_fwd_kernel(
    pred_ptr,  # [T, DIM]
    target_ptr,  # [B, N, DIM]
    indices_ptr,  # [T]
    cu_seqlens_ptr,  # [S+1]
    image_ptr,  # [S]
    divisor_ptr,  # fp32 [], or None
    gradient_ptr,  # [T, DIM], contiguous
    partial_ptr,  # fp32 [T], each row's share of the loss
    num_tokens,
    num_sequences,
    search_steps,
    beta,
    eps,
    loss_scale,
    gradient_scale,
    stride_pred_row,
    stride_target_image,
    stride_target_patch,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PADDED: tl.constexpr,  # whether rows past the last sequence are padding, of which nothing is written
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = token < tl.load(cu_seqlens_ptr + num_sequences) if PADDED else token < num_tokens
    searched = tl.minimum(token, num_tokens - 1)
    index = tl.load(indices_ptr + token, mask=inside, other=0).to(tl.int64)
    token = token.to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (column < DIM)
    # Half of what is read does not depend on the search: loaded before it, it arrives while the search waits.
    p = tl.load(pred_ptr + (token * stride_pred_row)[:, None] + column, mask=mask, other=0)  # [ROWS, BLOCK]
    sequence = _sequence_of(searched, cu_seqlens_ptr, num_sequences, search_steps)
    image = tl.load(image_ptr + sequence).to(tl.int64)
    target_row_ptr = target_ptr + image * stride_target_image + index * stride_target_patch
    t = tl.load(target_row_ptr[:, None] + column, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    p = p.to(tl.float32)
    if NORMALIZE:
        mean = tl.sum(t, 1) / DIM
        t = tl.where(mask, t - mean[:, None], 0.0)
        t *= (1 / tl.sqrt(tl.sum(t * t, 1) / DIM + eps))[:, None]
    d = p - t
    if KIND == "l2":
        loss, c = d * d, d
    elif KIND == "l1":
        c = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        loss = tl.abs(d)
    else:  # a nan passes both comparisons and stays one
        c = tl.where(d > beta, beta, tl.where(d < -beta, -beta, d))
        loss = c * (d - 0.5 * c)
    if divisor_ptr is not None:
        scale = 1 / tl.load(divisor_ptr)
        loss_scale *= scale
        gradient_scale *= scale
    tl.store(partial_ptr + token, tl.sum(loss, 1) * loss_scale, mask=inside)
    if WITH_GRADIENT:
        gradient = (c * gradient_scale).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + (token * DIM)[:, None] + column, gradient, mask=mask)


@triton.jit
def _scale_kernel(
    gradient_ptr,  # [numel], in place
    by_ptr,  # []
    numel,
    BLOCK: tl.constexpr,
):
    by = tl.load(by_ptr).to(tl.float32)
    if by != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
            offset = start + tl.arange(0, BLOCK)
            mask = offset < numel
            gradient = tl.load(gradient_ptr + offset, mask=mask).to(tl.float32)
            tl.store(gradient_ptr + offset, (gradient * by).to(gradient_ptr.dtype.element_ty), mask=mask)


def shipped() -> list[Shipped]:
    """Every model's width in bf16, some in fp32 and mixed, the other kinds at one; the gradient's scaling."""
    table = [(dim, "bf16", "bf16", "smooth_l1", True) for dim in (192, 384, 768, 1024, 1280, 1408)]
    table += [(dim, "fp32", "fp32", "smooth_l1", True) for dim in (384, 1280, 1408)]
    table += [(1280, "bf16", "fp32", "smooth_l1", True), (1280, "bf16", "bf16", "l2", True)]
    table += [(1280, "bf16", "bf16", "l1", True), (1280, "bf16", "bf16", "smooth_l1", False)]
    rows = []
    strides = ("stride_pred_row", "stride_target_image", "stride_target_patch")
    floats = dict.fromkeys(("beta", "eps", "loss_scale", "gradient_scale"), "fp32")
    for dim, pred, target, kind, normalize in table:
        block = _block(dim)
        tile_rows, warps = TILES[block]
        types = {"pred_ptr": pred, "target_ptr": target, "gradient_ptr": pred, "partial_ptr": "fp32"} | floats
        constexprs = dict(DIM=dim, BLOCK=block, ROWS=tile_rows, KIND=kind, NORMALIZE=normalize, WITH_GRADIENT=True)
        eager, graph = dict(divisor_ptr=None, PADDED=False), dict(PADDED=True)
        rows.append(Shipped(_loss_fwd_kernel, types, constexprs | eager, warps, divisible=strides))
        if kind == "smooth_l1" and normalize and pred == target == "bf16":
            types = types | {"divisor_ptr": "fp32"}
            rows.append(Shipped(_loss_fwd_kernel, types, constexprs | graph, warps, divisible=strides))
    for dtype in ("bf16", "fp32"):
        types = {"gradient_ptr": dtype, "by_ptr": "fp32"}
        rows.append(Shipped(_scale_kernel, types, dict(BLOCK=SCALE_BLOCK), 8, divisible=("numel",)))
    return rows


def _launch_forward(
    pred: Tensor,
    target: Tensor,
    packed: Packed,
    kind: str,
    beta: float,
    normalize: bool,
    eps: float,
    denominator: float,
    gradient: Tensor | None,  # [T, D], filled
    partial: Tensor,  # fp32 [T], filled
    divisor: Tensor | None = None,
    padded: bool = False,
) -> None:
    num_tokens, dim = pred.shape
    if kind == "smooth_l1" and beta == 0:
        kind = "l1"
    block = _block(dim)
    rows, warps = TILES[block]
    loss_scale = 1 / denominator / (beta if kind == "smooth_l1" else 1)
    num_sequences = packed.image.shape[0]
    with torch.cuda.device_of(pred):
        _loss_fwd_kernel[(triton.cdiv(num_tokens, rows),)](
            pred,
            target,
            *packed[:3],
            divisor,
            gradient,
            partial,
            num_tokens,
            num_sequences,
            (num_sequences - 1).bit_length(),
            beta,
            eps,
            loss_scale,
            loss_scale * (2 if kind == "l2" else 1),
            pred.stride(0),
            target.stride(0),
            target.stride(1),
            DIM=dim,
            BLOCK=block,
            ROWS=rows,
            KIND=kind,
            NORMALIZE=normalize,
            WITH_GRADIENT=gradient is not None,
            PADDED=padded,
            num_warps=warps,
        )


def _launch_scale(gradient: Tensor, by: Tensor) -> None:
    programs = min(triton.cdiv(gradient.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
    with torch.cuda.device_of(gradient):
        _scale_kernel[(programs,)](gradient, by, gradient.numel(), BLOCK=SCALE_BLOCK, num_warps=8)


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
    divisor: Tensor | None = None,
    padded: bool = False,
) -> tuple[Tensor, Tensor]:
    packed = Packed(indices.contiguous(), cu_seqlens.contiguous(), image.contiguous(), max_seqlen)
    if not use_triton(pred) or pred.shape[1] > max(TILES):
        arguments = kind, beta, normalize, eps, denominator, with_gradient, divisor, padded
        return _forward_torch(pred, target, packed, *arguments)
    pred, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (pred, target))
    empty = pred.new_empty(0)
    if not pred.numel():
        return pred.new_zeros((), dtype=torch.float32), _new_gradient(pred) if with_gradient else empty
    gradient = _new_gradient(pred) if with_gradient else None
    partial = pred.new_empty(pred.shape[0], dtype=torch.float32)
    if padded:
        partial.zero_()
        if gradient is not None:
            gradient.zero_()
    by = _denominator(pred, denominator)
    _launch_forward(pred, target, packed, kind, beta, normalize, eps, by, gradient, partial, divisor, padded)
    return partial.sum(), gradient if with_gradient else empty


def _gradient_dtype(pred: Tensor) -> torch.dtype:
    """A mean's gradient, 1 / (T * D), is below fp16's smallest number until a loss scale comes in the backward."""
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


def _new_gradient(pred: Tensor) -> Tensor:
    return torch.empty(pred.shape, dtype=_gradient_dtype(pred), device=pred.device)


def _forward_fake(
    pred, target, indices, cu_seqlens, image, max_seqlen, kind, beta, normalize, eps, denominator, with_gradient,
    divisor=None, padded=False,
):  # fmt: skip
    return pred.new_empty((), dtype=torch.float32), _new_gradient(pred) if with_gradient else pred.new_empty(0)


def _scale_gradient_(gradient: Tensor, by: Tensor) -> None:
    """gradient *= by, without touching it where `by` is 1, as it is for every loss that is itself the root."""
    if use_triton(gradient):
        if gradient.numel():
            _launch_scale(gradient, by)
    elif by.is_cuda or by != 1:
        gradient.mul_(by)


def _setup_context(ctx, inputs, output):
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, *inputs[:5])
    ctx.arguments, ctx.used = inputs[5:], False


@once_differentiable
def _backward(ctx, grad_loss, _grad_gradient):
    nothing = (None,) * (4 + len(ctx.arguments))
    if grad_loss is None:
        return None, *nothing
    gradient, *tensors = ctx.saved_tensors
    if not is_plain_eager():
        return (gradient * grad_loss).to(tensors[0].dtype), *nothing  # a compiler fuses it, and must see no mutation
    if ctx.used:  # a retained graph: the first backward scaled the buffer and gave it away
        gradient = _forward(*tensors, *ctx.arguments)[1]
    ctx.used = True
    _scale_gradient_(gradient.data, grad_loss)  # .data has a version of its own: a retained graph unpacks this one
    return gradient.to(tensors[0].dtype), *nothing


_forward_op = register(
    "smooth_l1_loss(Tensor pred, Tensor target, Tensor indices, Tensor cu_seqlens, Tensor image, SymInt max_seqlen, "
    "str kind, float beta, bool normalize, float eps, float? denominator, bool with_gradient, Tensor? divisor=None, "
    "bool padded=False) "
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
    denominator: float | Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """The loss between predicted tokens and the target encoder's at the same patches (arXiv 2301.08243, section 3).

    pred:        [T, D] fp32, bf16 or fp16; row t predicts patch `packed.indices[t]` of its image. Differentiable.
    target:      [B, N, D] fp32, bf16 or fp16, any strides: every token of every image, before the layer norm. Constant.
    packed:      T tokens, indices below N, images below B.
    kind:        "smooth_l1" (Huber over beta, as the released code; beta 0 is L1) or "l2" (squared error, as the paper)
    normalize:   layer norm of the target rows over D, no affine, with `eps`.
    denominator: what the sum is divided by, a Python number, or an fp32 tensor without dimensions on pred's device;
                 None: T * D, the mean. Pass the global batch's count when a batch is split over ranks or accumulation
                 steps. No tokens give a loss of 0.
    padded:      whether rows of pred may follow the last sequence. They count for nothing, whatever they hold.

    Returns a scalar in fp32; arithmetic is fp32 throughout. Raises ValueError.
    """
    check_tensor("pred", pred, "T, D")
    check_tensor("target", target, "B, N, D", device=pred.device)
    if target.shape[2] != pred.shape[1]:
        raise ValueError(f"target: want D = {pred.shape[1]} as pred has columns, got {describe(target)}")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("target: want a tensor that requires no gradient, as under torch.no_grad(), got one that does")
    check_packed(packed, pred.device, target.shape[1], target.shape[0], padded=padded)
    if packed.indices.shape[0] != pred.shape[0]:
        raise ValueError(f"packed: want {pred.shape[0]} tokens as pred has rows, got {packed.indices.shape[0]}")
    if kind not in KINDS:
        raise ValueError(f"kind: want one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("beta", beta), ("eps", eps)):
        if not is_number(value) or not value >= 0:
            raise ValueError(f"{name}: want a number >= 0, got {describe(value)}")
    divisor = None
    if isinstance(denominator, Tensor):
        if denominator.shape or denominator.dtype != torch.float32 or denominator.device != pred.device:
            raise ValueError(f"denominator: want a number, or a float32 [] on {pred.device}, got "
                             f"{describe(denominator)}")
        denominator, divisor = 1.0, denominator
    elif denominator is not None and not (is_number(denominator) and denominator > 0):
        raise ValueError(f"denominator: want a number > 0 or None, got {describe(denominator)}")
    elif denominator is None and padded:
        raise ValueError("denominator: want one where rows are padding, got None")
    beta, eps = float(beta), float(eps)  # Triton specialises an int of 1
    with_gradient = torch.is_grad_enabled() and pred.requires_grad
    fixed = kind, beta, normalize, eps
    if denominator is not None and divisor is None and torch.compiler.is_compiling():
        # To the compiler a float argument of a custom op is a constant, and the count changes with every batch.
        mean = _forward_op(pred, target, *packed, *fixed, None, with_gradient, None, padded)[0]
        return mean * (pred.numel() / denominator)
    return _forward_op(pred, target, *packed, *fixed, denominator, with_gradient, divisor, padded)[0]
