"""The passes between the matrix products of a transformer block, their results rounded to e4m3 as they are written.

`add_layer_norm_fp8` and `bias_gelu_fp8` are `add_layer_norm` and `bias_gelu` for a forward without gradients whose next
matrix product is `fp8_linear`. Bytes an element: 11 for the norm of an fp32 stream and a bf16 branch, 3 for GELU; each
one less than in bf16.

The norm has a scale for each row, or one for all of it, which is known before any row is read. The squares of a
normalised row, before weight and bias, sum to D * var / (var + eps), which is less than D. So none of its numbers is
beyond sqrt(D), and whatever x is

    |normed[t, c]| <= sqrt(D) * |weight[c]| + |bias[c]| <= the largest of these over c = 448 * scale

but for the last places of fp32, for which there is room: e4m3 rounds 464 to 448. The largest of D normal numbers is 3
times their root mean square, and sqrt(D) is 14 to 38: such rows have scales of their own 5 to 11 times smaller. By that
e4m3, a floating-point format, loses nothing but at its lower end. A number is off by 2^-4 of itself or by 2^-10 of the
scale, whichever is more. That is the second below 2^-6 of the scale or 2^-14.8 of the bound, which is 0.001 at D 1,280
where weights are 1 and biases 0.

The scale of a row of GELUs is known before they are: GELU grows with its argument above -0.75 and is never below -0.17,
so the largest magnitude of a row is at most the greater of GELU(largest argument) and 0.17. The kernel reads a row
twice, the second time from the cache, and computes each GELU once. Where all of a row is below 0.17 the scale is larger
than it need be, by which e4m3, a floating-point format, loses nothing down to 1e-5.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_tensor, describe
from .dispatch import INTERPRETED, tl, triton, use_triton
from .fp8 import FIRST_ARCH, Quantized, Scales, check_no_gradient, empty_quantized, round_within, store_e4m3
from .gelu import tail_and_density
from .norm import TILES, add_layer_norm_fwd_kernel, block_of, check_arguments
from .registration import is_plain_eager, register
from .shipped import Shipped

LEAST = 0.17  # -GELU is nowhere more
GELU_BLOCK, GELU_WARPS = 1024, 4  # columns at a time, 8 a thread: 16 bytes read, 8 written


def _norm_torch(x, branch, branch_bias, weight, bias, eps, one_scale):
    new = x
    if branch is not None:
        new = (x + branch if branch_bias is None else x.float() + branch + branch_bias).to(x.dtype)
    normed = F.layer_norm(new.float(), weight.shape, weight.float(), bias.float(), eps)
    values, scale = empty_quantized(x, "tensor" if one_scale else "row")
    some = slice(x.shape[0])
    if x.numel() and one_scale:
        largest = (weight.float().abs() * x.shape[1] ** 0.5 + bias.float().abs()).amax().view(1, 1)
        values[some], scale[:] = round_within(normed, largest)
    elif x.numel():
        values[some], scale[some] = round_within(normed, normed.abs().amax(1, keepdim=True))
    return x.new_empty(0) if branch is None else new, values, scale


def _norm_launch(x, branch, branch_bias, weight, bias, eps, one_scale):
    (num_rows, dim), block = x.shape, block_of(x.shape[1])
    rows, warps = TILES[block]
    tensors = [None if t is None else t.contiguous() for t in (x, branch, branch_bias, weight, bias)]
    new = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, scale = empty_quantized(x, "tensor" if one_scale else "row")
    if num_rows:
        with torch.cuda.device_of(x):
            add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
                *(*tensors, new, values, None, None, scale, num_rows, eps),
                DIM=dim,
                BLOCK=block,
                ROWS=rows,
                EXACT=INTERPRETED,
                ONE_SCALE=one_scale,
                num_warps=warps,
            )
    return x.new_empty(0) if new is None else new, values, scale


def _norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    one_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    body = _norm_launch if x.shape[1] <= max(TILES) and use_triton(x) else _norm_torch
    return body(x, branch, branch_bias, weight, bias, eps, one_scale)


def _norm_fake(x, branch, branch_bias, weight, bias, eps, one_scale):
    new = x.new_empty(0 if branch is None else x.shape)
    return (new, *empty_quantized(x, "tensor" if one_scale else "row"))


_norm_op = register(
    "add_layer_norm_fp8(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor weight, Tensor bias, float eps, "
    "bool one_scale) -> (Tensor new, Tensor values, Tensor scale)",
    _norm,
    _norm_fake,
)


def add_layer_norm_fp8(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    eps: float,
    scales: Scales = "row",
) -> tuple[Tensor, Quantized]:
    """`add_layer_norm` with its norm in e4m3; its arguments, but for fp64, and without gradients.

    scales: "row": one for each row, by its largest number; "tensor": one for all of it, by weight and bias (see above).

    Returns x_new [T, D] in x's dtype (x itself without a branch), and the norm of it as it is stored. Raises
    ValueError.
    """
    if scales not in ("row", "tensor"):
        raise ValueError(f"scales: want 'row' or 'tensor', got {describe(scales)}")
    check_tensor("x", x, "T, D")
    check_arguments(x, branch, weight, bias, branch_bias, eps)
    check_no_gradient(x, branch, weight, bias, branch_bias)
    call = _norm if is_plain_eager() else _norm_op
    new, values, scale = call(x, branch, branch_bias, weight, bias, float(eps), scales == "tensor")
    return x if branch is None else new, Quantized(values, scale, x.shape[0])


@triton.jit
def _bias_gelu_fp8_kernel(
    x_ptr,  # [T, DIM], as all others contiguous
    bias_ptr,  # [DIM], or None
    values_ptr,  # e4m3 [M, DIM]
    scale_ptr,  # fp32 [M, 1]
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < DIM
        h = tl.load(x_ptr + row * DIM + column, mask=mask, other=float("-inf")).to(tl.float32)
        if bias_ptr is not None:
            h += tl.load(bias_ptr + column, mask=mask, other=0).to(tl.float32)
        most = tl.maximum(most, h)
    most = tl.max(most[None, :], 1)  # [1]
    tail, _ = tail_and_density(most)
    largest = tl.maximum(most * tl.where(most < 0, tail, 1 - tail), 0.17)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < DIM
        h = tl.load(x_ptr + row * DIM + column, mask=mask, other=0).to(tl.float32)  # [BLOCK]
        if bias_ptr is not None:
            h += tl.load(bias_ptr + column, mask=mask, other=0).to(tl.float32)
        tail, _ = tail_and_density(h)
        out = (h * tl.where(h < 0, tail, 1 - tail))[None, :]
        offset, mask = (row * DIM)[:, None] + column[None, :], mask[None, :]
        store_e4m3(values_ptr, scale_ptr, row, offset, mask, first == 0, out, largest, EXACT)


def _gelu_torch(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.float() if bias is None else x.float() + bias.float()
    values, scale = empty_quantized(x)
    if x.numel():
        some = slice(x.shape[0])
        values[some], scale[some] = round_within(F.gelu(h), F.gelu(h.amax(1, keepdim=True)).clamp(min=LEAST))
    return values, scale


def _gelu_launch(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, dim = x.shape
    values, scale = empty_quantized(x)
    if x.numel():
        bias = None if bias is None else bias.contiguous()
        block = min(triton.next_power_of_2(dim), GELU_BLOCK)
        with torch.cuda.device_of(x):
            _bias_gelu_fp8_kernel[(num_rows,)](
                x.contiguous(), bias, values, scale, DIM=dim, BLOCK=block, EXACT=INTERPRETED, num_warps=GELU_WARPS
            )
    return values, scale


def _gelu(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (_gelu_launch if use_triton(x) else _gelu_torch)(x, bias)


def _gelu_fake(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_quantized(x)


_gelu_op = register("bias_gelu_fp8(Tensor x, Tensor? bias) -> (Tensor values, Tensor scale)", _gelu, _gelu_fake)


def bias_gelu_fp8(x: Tensor, bias: Tensor | None = None) -> Quantized:
    """The exact GELU of `x + bias` in e4m3, a scale a row; x [T, D] fp32, bf16 or fp16, bias [D] or None. No gradients.

    Raises ValueError.
    """
    check_tensor("x", x, "T, D")
    if bias is not None:
        check_tensor("bias", bias, f"{x.shape[1]}", device=x.device)
    check_no_gradient(x, bias)
    values, scale = (_gelu if is_plain_eager() else _gelu_op)(x, bias)
    return Quantized(values, scale, x.shape[0])


def shipped() -> list[Shipped]:
    """Every model's widths; the norm with an fp32 and a bf16 stream, by either kind of scales, and without a branch."""
    rows = []
    widths, streams = (192, 384, 768, 1024, 1280, 1408), ("fp32", "bf16")
    table = [(dim, stream, True, one) for one in (False, True) for dim in widths for stream in streams]
    for dim, stream, branch, one_scale in (*table, *((1280, "fp32", False, one) for one in (False, True))):
        tile_rows, warps = TILES[block_of(dim)]
        types = dict.fromkeys(("weight_ptr", "bias_ptr", "scale_ptr", "eps"), "fp32")
        types |= dict(x_ptr=stream, normed_ptr="fp8e4nv")
        absent = dict(mean_ptr=None, rstd_ptr=None)
        for name, dtype in (("branch_ptr", "bf16"), ("new_ptr", stream), ("branch_bias_ptr", "bf16")):
            (types if branch else absent)[name] = dtype if branch else None
        tile = dict(DIM=dim, BLOCK=block_of(dim), ROWS=tile_rows, EXACT=False, ONE_SCALE=one_scale) | absent
        rows.append(Shipped(add_layer_norm_fwd_kernel, types, tile, warps, vector_bytes=8, first_arch=FIRST_ARCH))
    for dim in (768, 1536, 3072, 4096, 5120, 6144):
        types = dict(x_ptr="bf16", bias_ptr="bf16", values_ptr="fp8e4nv", scale_ptr="fp32")
        tile = dict(DIM=dim, BLOCK=min(triton.next_power_of_2(dim), GELU_BLOCK), EXACT=False)
        rows.append(Shipped(_bias_gelu_fp8_kernel, types, tile, GELU_WARPS, vector_bytes=8, first_arch=FIRST_ARCH))
    return rows
