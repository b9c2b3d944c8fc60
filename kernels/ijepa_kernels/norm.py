"""add_layer_norm: a transformer's residual addition and the layer norm behind it, in one pass each way.

    x_new  = x + branch + branch_bias
    normed = (x_new - mean(x_new)) / sqrt(var(x_new) + eps) * weight + bias        (biased variance, over D)

Bytes an element, an fp32 stream and bf16 branches: 12 forward (x, branch, x_new, normed), where PyTorch's addition,
norm and cast move 24. 16 backward (the gradients of x_new and of normed, x_new, the gradients of x and of branch),
where PyTorch's casts, norm (which reads its inputs twice) and addition move 46. Without a branch: a norm and a cast.

The backward also has the sum of branch's gradient over the rows, what a bias in front of the addition gets: leave that
bias out of the matrix product, give it as `branch_bias`, and the pass over the gradient that sums it is spared.
Sums over rows take two stages, programs of rows, then their partial sums: no atomics, bitwise reproducible.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import FLOATS, check_tensor, describe, is_number
from .compat import layer_norm_backward
from .dispatch import tl, triton, use_triton
from .fp8 import store_e4m3
from .registration import is_plain_eager, register
from .shipped import Shipped

DTYPES = (*FLOATS, torch.float64)  # the last on a CPU alone
# D rounded up to a power of two -> rows a program, warps: 8 elements a thread, 16 and more in a wide row. At
# D 1,280 both directions together move 2.7 TB/s on an H100. A row is held in registers; wider ones are plain PyTorch.
TILES = {256: (8, 8), 512: (4, 8), 1024: (2, 8), 2048: (1, 8), 4096: (1, 8), 8192: (1, 16)}
BACKWARD_PROGRAMS = 528  # four on each of the 132 multiprocessors of an H100; each leaves a row of partial sums


def block_of(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 256)


def add_layer_norm_ref(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` as plain, differentiable PyTorch, in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    new = x
    if branch is not None:
        new = (x + branch if branch_bias is None else x.to(dtype) + branch + branch_bias).to(x.dtype)
    normed = F.layer_norm(new.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return new, normed.to(out_dtype or x.dtype)


def _forward_torch(x, branch, branch_bias, weight, bias, eps, out_dtype):
    dtype = torch.promote_types(x.dtype, torch.float32)
    new = x
    if branch is not None:
        # Added first, cast after: nothing to cast in fp32 streams, where a sum of both dtypes is one kernel.
        new = (x + branch if branch_bias is None else x.to(dtype) + branch + branch_bias).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(new.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    # Without a branch there is nothing new, and an op may not return its input.
    return x.new_empty(0) if branch is None else new, normed.to(out_dtype), mean.flatten(), rstd.flatten()


def _backward_torch(grad_new, grad_normed, new, mean, rstd, weight, branch_dtype, with_sums):
    dtype = mean.dtype
    grad_x, grad_weight, grad_bias = layer_norm_backward(
        grad_normed.to(dtype), new.to(dtype), mean[:, None], rstd[:, None], weight.to(dtype)
    )
    if grad_new is not None:
        grad_x += grad_new
    rows = [grad_weight, grad_bias]
    if with_sums:
        rows.append(grad_x.sum(0))
    grad_branch = None if branch_dtype in (None, new.dtype) else grad_x.to(branch_dtype)
    return grad_x.to(new.dtype), new.new_empty(0) if grad_branch is None else grad_branch, torch.stack(rows)


@triton.jit(do_not_specialize=["num_rows"])
def add_layer_norm_fwd_kernel(
    x_ptr,  # [T, DIM], as all others contiguous
    branch_ptr,  # [T, DIM], or None
    branch_bias_ptr,  # [DIM], or None
    weight_ptr,  # [DIM]
    bias_ptr,  # [DIM]
    new_ptr,  # [T, DIM], or None without a branch
    normed_ptr,  # [T, DIM]
    mean_ptr,  # fp32 [T], or None
    rstd_ptr,  # fp32 [T], or None
    scale_ptr,  # fp32 [T], or [1] with ONE_SCALE, where normed is e4m3, else None
    num_rows,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr = False,  # see to_e4m3
    ONE_SCALE: tl.constexpr = False,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)
    in_dim = column < DIM
    inside = row < num_rows
    mask = inside[:, None] & in_dim[None, :]
    offset = (row * DIM)[:, None] + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    if branch_ptr is not None:
        x += tl.load(branch_ptr + offset, mask=mask, other=0).to(tl.float32)
        if branch_bias_ptr is not None:
            x += tl.load(branch_bias_ptr + column, mask=in_dim, other=0).to(tl.float32)[None, :]
        new = x.to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + offset, new, mask=mask)
        x = new.to(tl.float32)  # what the backward will read
    mean = tl.sum(x, 1) / DIM
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)
    weight = tl.load(weight_ptr + column, mask=in_dim, other=0).to(tl.float32)  # [BLOCK]
    bias = tl.load(bias_ptr + column, mask=in_dim, other=0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if scale_ptr is not None and ONE_SCALE:  # each program computes it, to the same bits; `fp8_fused` derives it
        largest = tl.max((tl.abs(weight) * DIM**0.5 + tl.abs(bias))[None, :], 1)  # [1]
        store_e4m3(normed_ptr, scale_ptr, row, offset, mask, row == 0, normed, largest, EXACT)
    elif scale_ptr is not None:
        largest = tl.max(tl.where(mask, tl.abs(normed), 0.0), 1)
        store_e4m3(normed_ptr, scale_ptr, row, offset, mask, inside, normed, largest, EXACT)
    else:
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=inside)
        tl.store(rstd_ptr + row, rstd, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _add_layer_norm_bwd_kernel(
    grad_new_ptr,  # [T, DIM], as all others contiguous; or None
    grad_normed_ptr,  # [T, DIM]
    new_ptr,  # [T, DIM]
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    weight_ptr,  # [DIM]
    grad_x_ptr,  # [T, DIM]
    grad_branch_ptr,  # [T, DIM], or None where it is grad_x or there is no branch
    partial_ptr,  # fp32 [programs, SUMS, DIM]: of weight, of bias, of branch_bias
    num_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,  # 3, or 2 without a branch_bias
):
    column = tl.arange(0, BLOCK)
    in_dim = column < DIM
    weight = tl.load(weight_ptr + column, mask=in_dim, other=0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_branch = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)  # [ROWS]
        inside = row < num_rows
        mask = inside[:, None] & in_dim[None, :]
        offset = (row.to(tl.int64) * DIM)[:, None] + column[None, :]
        grad = tl.load(grad_normed_ptr + offset, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
        x = tl.load(new_ptr + offset, mask=mask, other=0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside, other=0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0)[:, None]
        x = (x - mean) * rstd
        of_weight += grad * x
        of_bias += grad
        grad *= weight
        shift = tl.sum(grad, 1)[:, None] / DIM
        slope = tl.sum(grad * x, 1)[:, None] / DIM
        grad_x = (grad - shift - x * slope) * rstd
        if grad_new_ptr is not None:
            grad_x += tl.load(grad_new_ptr + offset, mask=mask, other=0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + offset, grad_x.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        if SUMS == 3:
            of_branch += grad_x
    partial_row_ptr = partial_ptr + tl.program_id(0) * SUMS * DIM + column
    tl.store(partial_row_ptr, tl.sum(of_weight, 0), mask=in_dim)
    tl.store(partial_row_ptr + DIM, tl.sum(of_bias, 0), mask=in_dim)
    if SUMS == 3:
        tl.store(partial_row_ptr + 2 * DIM, tl.sum(of_branch, 0), mask=in_dim)


def shipped() -> list[Shipped]:
    """Every model's width with an fp32 and a bf16 stream; without a branch, and without a bias of it, at one."""
    rows = []
    table = [(dim, stream, True, True) for dim in (192, 384, 768, 1024, 1280, 1408) for stream in ("fp32", "bf16")]
    table += [(1280, stream, *rest) for stream in ("fp32", "bf16") for rest in ((True, False), (False, False))]
    for dim, stream, branch, branch_bias in table:
        block = block_of(dim)
        tile_rows, warps = TILES[block]
        tile = dict(DIM=dim, BLOCK=block, ROWS=tile_rows)
        statistics = dict(mean_ptr="fp32", rstd_ptr="fp32", weight_ptr="fp32")
        types = dict(x_ptr=stream, bias_ptr="fp32", normed_ptr="bf16", eps="fp32") | statistics
        absent: dict[str, Any] = {"scale_ptr": None, "EXACT": False, "ONE_SCALE": False}
        for name, dtype, there in (
            ("branch_ptr", "bf16", branch),
            ("new_ptr", stream, branch),
            ("branch_bias_ptr", "fp32", branch_bias),
        ):
            (types if there else absent)[name] = dtype if there else None
        rows.append(Shipped(add_layer_norm_fwd_kernel, types, tile | absent, warps))
        types = dict(grad_new_ptr=stream, grad_normed_ptr="bf16", new_ptr=stream, grad_x_ptr=stream) | statistics
        types["partial_ptr"], absent = "fp32", {}
        two = branch and stream != "bf16"
        (types if two else absent)["grad_branch_ptr"] = "bf16" if two else None
        rows.append(Shipped(_add_layer_norm_bwd_kernel, types, tile | {"SUMS": 2 + branch_bias} | absent, warps))
    return rows


def _launch_forward(x, branch, branch_bias, weight, bias, eps, out_dtype):
    (num_rows, dim), block = x.shape, block_of(x.shape[1])
    rows, warps = TILES[block]
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    branch = None if branch is None else branch.contiguous()
    branch_bias = None if branch_bias is None else branch_bias.contiguous()
    new = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(x):
            add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
                *(x, branch, branch_bias, weight, bias, new, normed, mean, rstd, None, num_rows, eps),
                DIM=dim,
                BLOCK=block,
                ROWS=rows,
                num_warps=warps,
            )
    return x.new_empty(0) if new is None else new, normed, mean, rstd


def _launch_backward(grad_new, grad_normed, new, mean, rstd, weight, branch_dtype, with_sums):
    (num_rows, dim), block, sums = new.shape, block_of(new.shape[1]), 2 + with_sums
    rows, warps = TILES[block]
    grad_new = None if grad_new is None else grad_new.contiguous()
    grad_x = torch.empty(new.shape, dtype=new.dtype, device=new.device)
    grad_branch = None
    if branch_dtype not in (None, new.dtype):
        grad_branch = torch.empty(new.shape, dtype=branch_dtype, device=new.device)
    programs = min(triton.cdiv(num_rows, rows), BACKWARD_PROGRAMS)
    partial = torch.empty(programs, sums, dim, dtype=torch.float32, device=new.device)
    if num_rows:
        with torch.cuda.device_of(new):
            _add_layer_norm_bwd_kernel[(programs,)](
                *(grad_new, grad_normed.contiguous(), new.contiguous(), mean, rstd, weight.contiguous()),
                *(grad_x, grad_branch, partial, num_rows),
                DIM=dim,
                BLOCK=block,
                ROWS=rows,
                SUMS=sums,
                num_warps=warps,
            )
    return grad_x, new.new_empty(0) if grad_branch is None else grad_branch, partial.sum(0)


def _runs_kernel(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.shape[1] <= max(TILES) and use_triton(x)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    body = _launch_forward if _runs_kernel(x) else _forward_torch
    return body(x, branch, branch_bias, weight, bias, eps, out_dtype)


def _forward_fake(x, branch, branch_bias, weight, bias, eps, out_dtype):
    statistics = torch.promote_types(x.dtype, torch.float32)
    new = x.new_empty(0 if branch is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[0], dtype=statistics) for _ in range(2))
    return new, x.new_empty(x.shape, dtype=out_dtype), mean, rstd


def _backward(
    grad_new: Tensor | None,
    grad_normed: Tensor,
    new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch_dtype: torch.dtype | None,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    body = _launch_backward if _runs_kernel(new) else _backward_torch
    return body(grad_new, grad_normed, new, mean, rstd, weight, branch_dtype, with_sums)


def _backward_fake(grad_new, grad_normed, new, mean, rstd, weight, branch_dtype, with_sums):
    branch = new.new_empty(0) if branch_dtype in (None, new.dtype) else new.new_empty(new.shape, dtype=branch_dtype)
    return new.new_empty(new.shape), branch, new.new_empty((2 + with_sums, new.shape[1]), dtype=mean.dtype)


def _setup_context(ctx, inputs, output):
    x, branch, branch_bias, weight, bias, *_ = inputs
    new, _, mean, rstd = output
    ctx.mark_non_differentiable(*((mean, rstd) if branch is not None else (new, mean, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if branch is None else new, mean, rstd, weight)
    ctx.dtypes = [None if t is None else t.dtype for t in (branch, branch_bias, bias)]


def _gradients(ctx, backward, grad_new, grad_normed):
    """Of x, branch, branch_bias, weight, bias, eps, out_dtype."""
    new, mean, rstd, weight = ctx.saved_tensors
    branch_dtype, branch_bias_dtype, bias_dtype = ctx.dtypes
    if branch_dtype is None:
        grad_new = None
    if grad_normed is None:
        if grad_new is None:
            return (None,) * 7
        grad_normed = torch.zeros_like(new)
    with_sums = branch_bias_dtype is not None
    grad_x, grad_branch, sums = backward(
        grad_new, grad_normed.contiguous(), new, mean, rstd, weight, branch_dtype, with_sums
    )
    if branch_dtype is None:
        grad_branch = None
    elif branch_dtype == new.dtype:
        grad_branch = grad_x
    grad_branch_bias = sums[2].to(branch_bias_dtype) if with_sums else None
    return grad_x, grad_branch, grad_branch_bias, sums[0].to(weight.dtype), sums[1].to(bias_dtype), None, None


def _autograd(ctx, grad_new, grad_normed, _grad_mean, _grad_rstd):
    return _gradients(ctx, _backward_op, grad_new, grad_normed)


_backward_op = register(
    "add_layer_norm_backward(Tensor? grad_new, Tensor grad_normed, Tensor new, Tensor mean, Tensor rstd, "
    "Tensor weight, ScalarType? branch_dtype, bool with_sums) -> (Tensor grad_x, Tensor grad_branch, Tensor sums)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype) -> (Tensor new, Tensor normed, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


class _Eager(torch.autograd.Function):
    """The op without its registration, whose cost it spares."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_new, grad_normed, _grad_mean, _grad_rstd):
        return _gradients(ctx, _backward, grad_new, grad_normed)


def check_arguments(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None, eps: float
) -> None:
    """Raise ValueError unless all fit x, [T, D]."""
    dim = x.shape[1]
    if branch is not None and (
        not isinstance(branch, Tensor) or branch.shape != x.shape or branch.dtype not in DTYPES
        or branch.device != x.device
    ):
        raise ValueError(f"branch: want a floating tensor of x's shape and device, {describe(x)}, or None, "
                         f"got {describe(branch)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if name != "branch_bias" or tensor is not None:
            check_tensor(name, tensor, f"{dim}", DTYPES, x.device)
    if branch_bias is not None and branch is None:
        raise ValueError("branch_bias: want None where branch is None, got a tensor")
    if not is_number(eps) or not eps >= 0:
        raise ValueError(f"eps: want a number >= 0, got {describe(eps)}")


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream with `branch` added, and its layer norm.

    x:           [T, D] fp32, bf16 or fp16 (fp64 on a CPU): the stream.
    branch:      [T, D], fp32, bf16 or fp16, what is added; None adds nothing.
    weight:      [D], bias [D]: the norm's, of any floating dtype.
    branch_bias: [D], added to every row of branch.
    eps:         added to the variance.
    out_dtype:   of the norm; x's if None.

    Returns x_new [T, D] in x's dtype (x itself without a branch) and the norm of x_new as it is stored, [T, D] in
    `out_dtype`. The arithmetic is fp32. Differentiable once, in all tensors. Under `torch.compile` it is plain
    PyTorch, which the compiler fuses with what is around it. Raises ValueError.
    """
    check_tensor("x", x, "T, D", DTYPES)
    check_arguments(x, branch, weight, bias, branch_bias, eps)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in DTYPES:
        raise ValueError(f"out_dtype: want a floating dtype, got {out_dtype}")
    if torch.compiler.is_compiling():
        return add_layer_norm_ref(
            x, branch, weight, bias, branch_bias=branch_bias, eps=eps, out_dtype=out_dtype
        )
    arguments = x, branch, branch_bias, weight, bias, float(eps), out_dtype
    eager = _Eager.apply if torch.is_grad_enabled() else _forward
    call = eager if is_plain_eager() else _forward_op
    new, normed, _, _ = call(*arguments)
    return x if branch is None else new, normed
