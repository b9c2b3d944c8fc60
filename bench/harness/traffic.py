"""Counts what a step asks of a GPU, without one: bytes, FLOPs, kernel launches, casts of weights, waits of the host.

`Counter` is a dispatch mode: it sees every operator of a real step on meta tensors, those of the backward too. Bytes of
an operator are those of the tensors that it reads and writes, each once: what a kernel must move when nothing of it is
left in a cache. Exceptions (gathers, operators that are several kernels) stand in the tables below. The predicted time
of an operator is the longer of its bytes and its FLOPs at the two ceilings, so the sum is a bound for launches that
never leave the GPU idle; nothing here was measured on one but the ceilings.
"""
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import ijepa_kernels  # noqa: F401  (registers the ops that are named below)
import torch
from ijepa_kernels import gelu, norm, patches, sums
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of an H100 SXM: bf16 products of a model's shapes, and a copy. Measured on a lent card, recorded in issue 13.
MATMUL_RATE, COPY_RATE = 798e12, 3.0e12  # FLOP/s, bytes/s
FP8_RATE = 1150e12  # FLOP/s, of e4m3 products, measured under load on the card that made 655 to 706e12 of bf16's then

aten, ijepa = torch.ops.aten, torch.ops.ijepa
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "_scaled_mm": (0, 1)}  # name: its two factors
ATTENTION = {  # name: FLOPs for a pair of tokens and channel
    "varlen_attention": 4,
    "varlen_attention_backward": 10,
    "varlen_attention_qkv": 4,
    "varlen_attention_qkv_backward": 10,
}
KINDS = {
    "norm": (
        *("native_layer_norm", "native_layer_norm_backward", "add_layer_norm", "add_layer_norm_backward"),
        "add_layer_norm_fp8",
    ),
    "gelu": ("gelu", "gelu_backward", "bias_gelu", "bias_gelu_backward", "bias_gelu_fp8"),
    "add": ("add", "add_"),
    "sum": ("sum", "column_sum"),  # gradients of biases
    "copy": ("cat", "stack", "clone", "copy_"),
    "rows": (
        *("index_select", "index_add_", "gather_patches", "predictor_tokens", "predictor_tokens_backward"),
        *("predictor_rows", "predictor_rows_backward"),
    ),
    "loss": ("smooth_l1_loss",),
    "optimizer": ("_fused_adamw_", "_foreach_add_", "adamw_ema_"),
    "ema": ("ema_update_",),
    "copies of weights": ("_foreach_copy_", "quantize_rows_", "quantize_tensor_"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
# Arguments that are written and not read.
WRITE_ONLY = {("copy_", "self"), ("zero_", "self"), ("fill_", "self"), ("_foreach_copy_", "self")}
WRITE_ONLY |= {("ema_update_", "low_precision")}
WRITE_ONLY |= {(f"quantize_{kind}_", what) for kind in ("rows", "tensor") for what in ("values", "scale")}
NOT_WRITTEN = {("_fused_adamw_", "grads")}  # though the schema says so: only where gradients are unscaled on the way
HOST_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
# Operators that are several kernels: the layer norm's backward reads both its inputs again for weight and bias, whose
# sums take two stages (ATen/native/cuda/layer_norm_kernel.cu). Ours are counted in the files of the ops.
LAUNCHES = {
    "native_layer_norm_backward": 3,
    "smooth_l1_loss": 2,
    "predictor_tokens": 6,
    "predictor_tokens_backward": 5,
    "predictor_rows": 6,
    "predictor_rows_backward": 14,  # a sort of 20,000 keys is 7
    "add_layer_norm_backward": 2,
    "bias_gelu_backward": 2,
    "column_sum": 2,
    "quantize_tensor_": 7,
}
# Partial sums, fp32, that the first of two kernels writes and the second reads: as many rows as there are programs.
PARTIAL_SUMS = {
    "add_layer_norm_backward": lambda results: norm.BACKWARD_PROGRAMS * results[2].numel(),
    "bias_gelu_backward": lambda results: gelu.BACKWARD_PROGRAMS * results[1].numel() // gelu.blocks_of(results[0]),
    "column_sum": lambda results: sums.PROGRAMS * results[0].numel() // sums.blocks_of(results[0].numel()),
}
# A multi-tensor launch takes 320 chunks of 65,536 elements (ATen/native/cuda/MultiTensorApply.cuh).
CHUNKED = {"_fused_adamw_", "_foreach_add_", "_foreach_copy_"}
INSIDE = {ijepa.embed_patches.default: patches._embed}  # made of other operators, all of which are counted


@dataclass
class Tally:
    other_bytes: float = 0  # outside matrix products and attention
    product_bytes: float = 0
    attention_bytes: float = 0
    flops: float = 0
    launches: int = 0
    weight_casts: int = 0
    host_syncs: int = 0
    predicted_ms: float = 0

    def __add__(self, other: "Tally") -> "Tally":
        theirs = asdict(other)
        return Tally(**{name: value + theirs[name] for name, value in asdict(self).items()})


class Counter(TorchDispatchMode):
    """Adds up by part of the step (`part`, set from outside) and by kind of operator.

    `weights`: parameters, a cast of which counts. `pairs`: of each part, the sum of the squared lengths of the
    sequences that attend to themselves, which meta tensors do not know.
    """

    def __init__(self, weights: Iterable[Tensor], pairs: dict[str, float]):
        super().__init__()
        weights = list(weights)
        self.weights = {_storage(w) for w in weights}
        self.shapes = {w.shape for w in weights}
        self.pairs = pairs
        self.part = ""
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INSIDE:
            return self._inside(INSIDE[func], args, kwargs)
        name = func._schema.name.partition("::")[2]
        if name in HOST_SYNCS:
            self.tallies[self.part, "other"].host_syncs += 1
            if name == "_local_scalar_dense":
                return 1.0  # what is not there; only how often it is asked for counts
        out = func(*args, **kwargs)
        if not (func.is_view or name in ("_unsafe_view", "detach") or name.startswith(("empty", "new_empty"))):
            self.tallies[self.part, self._kind(name, args, out)] += self._tally(func, name, args, kwargs, out)
        return out

    def _inside(self, body: Callable, args: Any, kwargs: Any) -> Any:
        gather = patches._gather
        patches._gather = patches._gather_op  # the body calls a kernel without its registration
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            patches._gather = gather

    def _kind(self, name: str, args: Any, out: Any) -> str:
        if name in PRODUCTS:
            return "product"
        if name in ATTENTION:
            return "attention"
        if name == "_to_copy":
            if _storage(args[0]) in self.weights:
                return "weight cast"
            return "gradient cast" if out.shape in self.shapes else "cast"
        return KIND_OF.get(name, "other")

    def _tally(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Tally:
        moved, launches = _moved(func, name, args, kwargs, out), LAUNCHES.get(name, 1)
        if name in CHUNKED:
            launches = math.ceil(sum(math.ceil(x.numel() / 65536) for x in args[0]) / 320)
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            tally = Tally(product_bytes=moved, flops=2 * a.shape[0] * a.shape[1] * b.shape[1], launches=1)
            return self._timed(tally, FP8_RATE if name == "_scaled_mm" else MATMUL_RATE)
        if name in ATTENTION:
            q = args[1] if name.endswith("backward") else args[0]
            flops = ATTENTION[name] * self.pairs[self.part] * q.shape[-2] * q.shape[-1]
            return self._timed(Tally(attention_bytes=moved, flops=flops, launches=launches))
        cast = name == "_to_copy" and _storage(args[0]) in self.weights
        return self._timed(Tally(other_bytes=moved, launches=launches, weight_casts=int(cast)))

    def add(self, kind: str, tally: Tally) -> None:
        self.tallies[self.part, kind] += self._timed(tally)

    @staticmethod
    def _timed(tally: Tally, rate: float = MATMUL_RATE) -> Tally:
        moved = tally.other_bytes + tally.product_bytes + tally.attention_bytes
        tally.predicted_ms = 1e3 * max(tally.flops / rate, moved / COPY_RATE)
        return tally

    def by_part(self) -> dict[str, Tally]:
        return self._sums(0)

    def by_kind(self) -> dict[str, Tally]:
        return self._sums(1)

    def _sums(self, field: int) -> dict[str, Tally]:
        sums: dict[str, Tally] = defaultdict(Tally)
        for key, tally in self.tallies.items():
            sums[key[field]] += tally
        return dict(sums)

    def total(self) -> Tally:
        return sum(self.tallies.values(), Tally())


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def nbytes(x: Tensor) -> int:
    """Of the elements that are there: an expanded dimension is read once."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _moved(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if name in ("index_select", "index", "gather_patches"):  # rows that are asked for, not all there are
        index = next(x for x in tree_leaves(args[1:]) if isinstance(x, Tensor))
        element = args[0].element_size()
        return sum(nbytes(x) + x.numel() * element for x in results) + nbytes(index)
    if name == "index_add_":
        return 3 * nbytes(args[3]) + nbytes(args[2])  # the source, and its rows of what is added to, twice
    if name == "smooth_l1_loss":  # reads a target row for each predicted one
        pred, target = args[0], args[1]
        return nbytes(pred) + pred.numel() * target.element_size() + sum(map(nbytes, results))
    moved, aliases = 0, set()
    for argument, value in zip(func._schema.arguments, (*args, *[None] * len(func._schema.arguments)), strict=False):
        value = kwargs.get(argument.name, value)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        written = written and (name, argument.name) not in NOT_WRITTEN
        if written:
            aliases.update(map(id, tensors))
        moved += sum(map(nbytes, tensors)) * (2 if written and (name, argument.name) not in WRITE_ONLY else 1)
    if name in PARTIAL_SUMS:
        moved += 2 * 4 * PARTIAL_SUMS[name](results)
    if name == "quantize_tensor_":  # the weight again, and what is to be rounded, in fp32, there and back
        moved += nbytes(args[0]) + 2 * 4 * args[0].numel()
    if name == "native_layer_norm_backward":
        moved += nbytes(args[0]) + nbytes(args[1])
    return moved + sum(nbytes(x) for x in results if id(x) not in aliases)
