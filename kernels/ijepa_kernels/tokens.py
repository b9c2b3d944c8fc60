"""gather_tokens, apply_masks: take the tokens of a `Packed` out of dense features.

    out[t] = x[image of t's sequence, indices[t]]

Moves 2 * D elements a token (each row read once, written once) and no index of the size of the output: the released
helper repeats its index to int64 [B, K, D], 8 bytes for every element of 2 or 4 it moves.

The backward sums each row's gradients in the order of the tokens, in fp32, without atomics: bitwise reproducible, also
where blocks overlap and a row is taken several times. (That of `x[index]` is not: not on a GPU, nor on a CPU with
several threads.) On a GPU a stable sort of the T row numbers finds the tokens of each row, so that any masks will do,
unsorted and repeating ones too; it costs a few small launches, and nothing waits for the device. The exception is the
PyTorch form on a GPU (IJEPA_KERNELS=torch, or no Triton): `index_add_` is made of float atomics there.

In the forward `index_select` moves as few bytes, so this op's gain is its backward.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_masks, check_tensor
from .dispatch import tl, triton, use_triton
from .packed import Packed, check_packed
from .registration import register
from .shipped import Shipped

BLOCK_TOKENS = 16


def gather_tokens_ref(x: Tensor, packed: Packed) -> Tensor:
    """`gather_tokens` in plain PyTorch; as its CPU form too, where `index_select` on rows is one memcpy a row."""
    num_patches, dim = x.shape[1:]
    rows = packed.rows(num_patches)
    if x.is_contiguous():
        return x.view(-1, dim).index_select(0, rows)
    return x[rows // num_patches, rows % num_patches]


def tile_columns(dim: int) -> int:
    """The columns of a tile: 64 or 128 where that divides `dim`, so that no mask splits a 16-byte word."""
    divisor = min(dim & -dim, 128)
    return divisor if divisor >= 64 else min(triton.next_power_of_2(dim), 128)


@triton.jit
def _gather_tokens_fwd_kernel(
    x_ptr,  # [B, N, DIM]
    indices_ptr,  # [T]
    cu_seqlens_ptr,  # [S+1]
    image_ptr,  # [S]
    out_ptr,  # [T, DIM], contiguous
    blocks_per_sequence,
    stride_x_image,
    stride_x_token,
    stride_x_dim,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // blocks_per_sequence
    first = tl.load(cu_seqlens_ptr + sequence) + tl.program_id(0) % blocks_per_sequence * BLOCK_T
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if first >= end:
        return
    token = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = token < end
    index = tl.load(indices_ptr + token, mask=inside, other=0).to(tl.int64)
    image = tl.load(image_ptr + sequence).to(tl.int64)
    x_row = x_ptr + image * stride_x_image + index * stride_x_token
    out_row = out_ptr + token.to(tl.int64) * DIM
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = inside[:, None] & (column < DIM)[None, :]
        value = tl.load(x_row[:, None] + column[None, :] * stride_x_dim, mask=mask)  # [BLOCK_T, BLOCK_D]
        tl.store(out_row[:, None] + column[None, :], value, mask=mask)


@triton.jit
def _gather_tokens_bwd_kernel(
    grad_ptr,  # [T, DIM], contiguous
    order_ptr,  # [T], the tokens sorted by the row they come from
    starts_ptr,  # [B*N+1], where in `order` each row's tokens begin
    grad_x_ptr,  # [B*N, DIM], contiguous
    num_rows,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = row < num_rows
    start = tl.load(starts_ptr + row, mask=inside, other=0)
    count = tl.load(starts_ptr + row + 1, mask=inside, other=0) - start
    most = tl.max(count, axis=0)
    out_row = grad_x_ptr + row.to(tl.int64) * DIM
    for first in range(0, DIM, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        in_dim = (column < DIM)[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for i in range(0, most):
            token = tl.load(order_ptr + start + i, mask=i < count, other=0)
            grad_row = grad_ptr + token * DIM
            mask = (i < count)[:, None] & in_dim
            total += tl.load(grad_row[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
        value = total.to(grad_x_ptr.dtype.element_ty)
        tl.store(out_row[:, None] + column[None, :], value, mask=inside[:, None] & in_dim)


def shipped() -> list[Shipped]:
    """Every model's width, in bf16 and fp32."""
    rows = []
    strides = ("stride_x_image", "stride_x_token")
    for dim in (192, 384, 768, 1024, 1280, 1408):
        tile = {"DIM": dim, "BLOCK_T": BLOCK_TOKENS, "BLOCK_D": tile_columns(dim)}
        for dtype in ("bf16", "fp32"):
            forward = {"x_ptr": dtype, "out_ptr": dtype}
            rows.append(Shipped(_gather_tokens_fwd_kernel, forward, tile | {"stride_x_dim": 1}, divisible=strides))
            backward = {"grad_ptr": dtype, "order_ptr": "i64", "starts_ptr": "i32", "grad_x_ptr": dtype}
            rows.append(Shipped(_gather_tokens_bwd_kernel, backward, tile))
    return rows


def _launch_forward(x: Tensor, packed: Packed) -> Tensor:
    dim = x.shape[2]
    out = torch.empty(packed.indices.shape[0], dim, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(packed.max_seqlen, BLOCK_TOKENS)
    if out.numel():
        with torch.cuda.device_of(x):
            _gather_tokens_fwd_kernel[(packed.image.shape[0] * blocks,)](
                x, *packed[:3], out, blocks, *x.stride(), DIM=dim, BLOCK_T=BLOCK_TOKENS, BLOCK_D=tile_columns(dim)
            )
    return out


def _launch_backward(grad: Tensor, packed: Packed, num_images: int, num_patches: int) -> Tensor:
    grad, num_rows, dim = grad.contiguous(), num_images * num_patches, grad.shape[1]
    grad_x = torch.empty(num_images, num_patches, dim, dtype=grad.dtype, device=grad.device)
    if grad_x.numel():
        # Sorting 32-bit keys takes half the passes of 64-bit ones; B * N reaches 2^31 in no batch that fits a GPU.
        row, order = packed.rows(num_patches).int().sort(stable=True)
        every_row = torch.arange(num_rows + 1, dtype=torch.int32, device=grad.device)
        starts = torch.searchsorted(row, every_row, out_int32=True)
        with torch.cuda.device_of(grad):
            _gather_tokens_bwd_kernel[(triton.cdiv(num_rows, BLOCK_TOKENS),)](
                grad, order, starts, grad_x, num_rows, DIM=dim, BLOCK_T=BLOCK_TOKENS, BLOCK_D=tile_columns(dim)
            )
    return grad_x


def _forward(x: Tensor, indices: Tensor, cu_seqlens: Tensor, image: Tensor, max_seqlen: int) -> Tensor:
    packed = Packed(indices, cu_seqlens, image, max_seqlen)
    return _launch_forward(x, packed) if use_triton(x) else gather_tokens_ref(x, packed)


def _backward(
    grad: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    image: Tensor,
    max_seqlen: int,
    num_images: int,
    num_patches: int,
) -> Tensor:
    packed = Packed(indices, cu_seqlens, image, max_seqlen)
    if use_triton(grad):
        return _launch_backward(grad, packed, num_images, num_patches)
    # On a CPU index_add_ goes through the tokens in order, whatever the number of threads.
    rows, dim = packed.rows(num_patches), grad.shape[1]
    grad_x = torch.zeros(num_images * num_patches, dim, device=grad.device).index_add_(0, rows, grad.float())
    return grad_x.to(grad.dtype).view(num_images, num_patches, dim)


def _forward_fake(x, indices, cu_seqlens, image, max_seqlen):
    return x.new_empty(indices.shape[0], x.shape[2])


def _backward_fake(grad, indices, cu_seqlens, image, max_seqlen, num_images, num_patches):
    return grad.new_empty(num_images, num_patches, grad.shape[1])


def _setup_context(ctx, inputs, output):
    x, *packed, ctx.max_seqlen = inputs
    ctx.save_for_backward(*packed)
    ctx.num_images, ctx.num_patches = x.shape[:2]


def _autograd(ctx, grad):
    grad_x = _backward_op(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.num_images, ctx.num_patches)
    return grad_x, None, None, None, None


_backward_op = register(
    "gather_tokens_backward(Tensor grad, Tensor indices, Tensor cu_seqlens, Tensor image, SymInt max_seqlen, "
    "SymInt num_images, SymInt num_patches) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "gather_tokens(Tensor x, Tensor indices, Tensor cu_seqlens, Tensor image, SymInt max_seqlen) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def gather_tokens(x: Tensor, packed: Packed) -> Tensor:
    """The rows of `x` that `packed` names, in its order.

    x:      `[B, N, D]` float32, bfloat16 or float16, any strides.
    packed: sequences over N patches of B images.

    Returns `[T, D]` in x's dtype; differentiable in x, once. Raises `ValueError` for a wrong rank, device or dtype, and
    on the CPU for an index out of range.
    """
    check_tensor("x", x, "B, N, D")
    check_packed(packed, x.device, x.shape[1], x.shape[0])
    return _forward_op(x, *packed)


def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """Drop-in for the helper of the released I-JEPA and V-JEPA codes.

    x:      `[B, N, D]` float32, bfloat16 or float16, any strides.
    masks:  M integer tensors `[B, K]`, the patches to keep, in any order.
    concat: as in V-JEPA: True gives one `[M * B, K, D]`, mask-major, and wants one K; False a list of M `[B, K, D]`.
    """
    check_masks(masks)
    check_tensor("x", x, "B, N, D")
    if x.shape[0] != masks[0].shape[0]:
        raise ValueError(f"x: want {masks[0].shape[0]} images as masks has rows, got {x.shape[0]}")
    lengths = [m.shape[1] for m in masks]
    if concat and any(k != lengths[0] for k in lengths):  # a set of lengths would make them constants of a graph
        raise ValueError(f"masks: want one length to concatenate, got {lengths}; concat=False takes them")
    batch, num_patches, dim = x.shape
    # The bound is N unless a mask is longer: the masks' own length changes from step to step, and would recompile.
    tokens = gather_tokens(x, Packed.from_masks(masks, max(num_patches, *lengths)))
    if concat:
        return tokens.view(len(masks) * batch, lengths[0], dim)
    parts = tokens.split([batch * k for k in lengths])
    return [part.view(batch, k, dim) for part, k in zip(parts, lengths, strict=True)]
