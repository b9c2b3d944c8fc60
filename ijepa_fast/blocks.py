"""One pre-norm transformer block over packed tokens, with the layers that it is made of; and how it is checkpointed."""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ijepa_kernels import (
    Packed,
    Quantized,
    add_layer_norm,
    add_layer_norm_fp8,
    bias_gelu,
    bias_gelu_fp8,
    fp8_linear,
    predictor_rows,
    quantize_rows,
    quantize_tensor,
    varlen_attention_qkv,
)
from ijepa_kernels.dispatch import use_triton
from ijepa_kernels.fp8 import Scales
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ijepa_fast import compat, onednn
from ijepa_fast.copies import copied_linear

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """`nn.Linear` that multiplies in `compute_dtype`, whatever the dtypes of its input and of its stored weights.

    With `fp8`, the kind of its scales, its input comes in e4m3, and it has no gradient (see `ijepa_fast.fp8`).
    """

    def __init__(self, dim_in: int, dim_out: int, compute_dtype: torch.dtype):
        super().__init__(dim_in, dim_out)
        self.compute_dtype = compute_dtype
        self.copies: tuple[Tensor, Tensor] | None = None  # of weight and bias, see `keep_copies`
        self.fp8: Scales | None = None
        self.quantized: Quantized | None = None  # the weight; without it, as under FSDP, it is rounded at every call
        self.bias_copy: Tensor | None = None  # of an fp8 layer

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every weight, and drawing a billion of them twice takes a while."""

    def forward(self, x: Tensor | Quantized) -> Tensor:
        dtype = self.compute_dtype
        if isinstance(x, Quantized):
            return self._fp8(x, self.bias.to(dtype) if self.bias_copy is None else self.bias_copy)
        if self.copies is not None:
            return copied_linear(x.to(dtype), self.weight, self.bias, *self.copies)
        return onednn.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def _fp8(self, x: Quantized, bias: Tensor | None) -> Tensor:
        weight = self.quantized
        if weight is None:
            weight = (quantize_tensor if self.fp8 == "tensor" else quantize_rows)(self.weight)
        return fp8_linear(x, weight, bias, out_dtype=self.compute_dtype)

    def product(self, x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
        """The product, and the bias where it is still to be added.

        On a GPU it is left to the op that reads the product, whose backward has its gradient for free. A CPU's matrix
        product adds it for nothing, and a compiler fuses its addition.
        """
        if isinstance(x, Quantized):
            return self._fp8(x, None), self.bias
        if self._is_plain(x):
            return self(x), None
        dtype = self.compute_dtype
        if self.copies is not None:
            return copied_linear(x.to(dtype), self.weight, None, self.copies[0], None), self.bias
        return F.linear(x.to(dtype), self.weight.to(dtype)), self.bias

    def gelu(self, x: Tensor | Quantized) -> Tensor:
        """The exact GELU of its result."""
        if isinstance(x, Tensor) and self._is_plain(x) and self.copies is None:
            dtype = self.compute_dtype
            return onednn.linear_gelu(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        hidden, bias = self.product(x)
        return F.gelu(hidden) if bias is None else bias_gelu(hidden, bias)

    @staticmethod
    def _is_plain(x: Tensor) -> bool:
        """Whether PyTorch's own product takes the bias along."""
        return torch.compiler.is_compiling() or (x.is_cpu and not use_triton(x))


class Branch(NamedTuple):
    """What is still to be added to the stream: `value` [T, D] in the compute dtype, and a bias [D] to each row."""

    value: Tensor
    bias: Tensor | None = None


class LayerNorm(nn.LayerNorm):
    """Adds a branch to the residual stream, and normalises the sum in fp32 (in fp64 for an fp64 stream)."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=NORM_EPS)

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Branch | None, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The new stream, in x's dtype, and its norm in `out_dtype`; see `add_layer_norm`."""
        value, bias = branch or (None, None)
        return add_layer_norm(
            x, value, self.weight, self.bias, branch_bias=bias, eps=self.eps, out_dtype=out_dtype
        )

    def before(self, layer: Linear, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor | Quantized]:
        """The new stream, and its norm as `layer` takes it."""
        if layer.fp8 is None:
            return self(x, branch, layer.compute_dtype)
        value, bias = branch or (None, None)
        return add_layer_norm_fp8(
            x, value, self.weight, self.bias, branch_bias=bias, eps=self.eps, scales=layer.fp8
        )


class Distinct(NamedTuple):
    """The predictor's tokens as they enter it, each once: a norm and a projection of them need not see repeats.

    `x` `[T_ctx + N, D]` has the context tokens, then a mask token at every patch; its rows stand in the sequences as
    `predictor_rows` lays them out, by the other fields.
    """

    x: Tensor
    context: Packed
    target: Packed
    context_of: Tensor | None


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, compute_dtype: torch.dtype):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, compute_dtype)
        self.proj = Linear(dim, dim, compute_dtype)

    def forward(
        self,
        x: Tensor | Quantized,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
        distinct: Distinct | None = None,
    ) -> Branch:
        qkv = self.qkv(x)
        if distinct is not None:
            qkv = predictor_rows(qkv, *distinct[1:])
        qkv = qkv.unflatten(1, (3, self.num_heads, -1))
        y = varlen_attention_qkv(qkv, cu_seqlens, max_seqlen).flatten(1)
        return Branch(*self.proj.product(y if rows is None else y.index_select(0, rows)))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, compute_dtype: torch.dtype):
        super().__init__()
        self.fc1 = Linear(dim, hidden, compute_dtype)
        self.fc2 = Linear(hidden, dim, compute_dtype)

    def forward(self, x: Tensor | Quantized) -> Branch:
        if self.fc2.fp8 is not None:
            return Branch(self.fc2(bias_gelu_fp8(*self.fc1.product(x))))
        hidden = self.fc1.gelu(x)
        # Its bias is added in the next block, where FSDP, which makes no copies, has taken it away again.
        return Branch(self.fc2(hidden)) if self.fc2.copies is None else Branch(*self.fc2.product(hidden))


class Block(nn.Module):
    """One pre-norm transformer block over packed tokens; the encoder's and the predictor's alike.

    Its last addition is left to the norm that comes next, the next block's or the model's last, which reads both terms
    anyway: a block takes and returns the stream and the branch that is still to be added to it.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, compute_dtype: torch.dtype):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, compute_dtype)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim, compute_dtype)
        self.checkpointing = "none"  # "full" keeps the block's input for the backward, "selective" its costly results
        self._compiled: Callable[..., tuple[Tensor, Branch | None]] | None = None

    def compile(self) -> None:
        """Compile what `forward` computes: one graph for all blocks of a shape, whatever the number of tokens.

        Not the call of the module: the hooks by which FSDP gathers the parameters stay outside.
        """
        self._compiled = torch.compile(self._checkpointed, fullgraph=True, dynamic=False)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
        distinct: Distinct | None = None,
    ) -> tuple[Tensor, Branch | None]:
        """From the stream x `[T, D]` and what is to be added to it first, the same of the next block.

        The stream stays in x's dtype. With `rows` (int64 `[R]`, distinct) the result is of those rows alone, `[R, D]`.
        Every row is attended to either way: what the other rows are spared is the projection and the MLP. With
        `distinct`, whose tokens the rows of x are, and no branch, the first norm and queries, keys and values are
        computed of each of those once.
        """
        arguments = x, branch, cu_seqlens, max_seqlen, rows, distinct
        if self._compiled is None:
            return self._checkpointed(*arguments)
        for varying in tree_leaves(arguments):
            if isinstance(varying, Tensor):
                compat.mark_dynamic(varying)  # lengths are symbols to the compiler, widths are numbers
        return self._compiled(*arguments)

    def _checkpointed(self, *arguments: Any) -> tuple[Tensor, Branch | None]:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(*arguments)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.checkpointing == "selective":
            options["context_fn"] = _keep_costly
        return checkpoint(self._forward, *arguments, **options)

    def _forward(
        self,
        x: Tensor,
        branch: Branch | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None,
        distinct: Distinct | None,
    ) -> tuple[Tensor, Branch | None]:
        y: Tensor | Quantized
        if distinct is None:
            x, y = self.norm1.before(self.attn.qkv, x, branch)
        else:
            y = self.norm1.before(self.attn.qkv, distinct.x, None)[1]
        branch = self.attn(y, cu_seqlens, max_seqlen, rows, distinct)
        if rows is not None:
            x = x.index_select(0, rows)
        x, y = self.norm2.before(self.mlp.fc1, x, branch)
        branch = self.mlp(y)
        # A compiler of single blocks adds while it has the branch at hand; full checkpointing keeps what a block takes,
        # which is then one tensor instead of two.
        if torch.compiler.is_compiling() or self.checkpointing == "full":
            new = x + branch.value
            return (new if branch.bias is None else new + branch.bias).to(x.dtype), None
        return x, branch


# Attention by its own names, and by those of the libraries that it calls.
COSTLY = {
    "aten::mm",
    "aten::addmm",
    "ijepa::varlen_attention",
    "ijepa::varlen_attention_qkv",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "xformers_flash::flash_fwd",
    "xformers::efficient_attention_forward_cutlass",
}


def _keep_costly():
    """Selective checkpointing: results of matrix products and attention are kept, norms, GELU and casts made again."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = op._schema.name in COSTLY
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
