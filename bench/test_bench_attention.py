"""Attention inside packed sequences: every backend and head dim of the paper's models, lengths of the real sampler.

`context` sequences are the context encoder's, `predictor` ones a context with its mask tokens, `dense` ones the whole
images of the target encoder, forward only. `ours` is our kernel on a GPU and the PyTorch form on a CPU; `auto` is the
backend that a user gets by default, `short` our kernel with the backward of `attention_short`, of predictors alone. The
last five are plain PyTorch: a call of `scaled_dot_product_attention` for every sequence (`loop`), or one call, padded
and masked (`padded`); and where lengths are equal, one call over the batch (`batched`, and by cuDNN: `cudnn`), or the
released way, which materialises the attention matrix (`materialised`).
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import attention_short, attention_triton, varlen_attention
from ijepa_kernels.attention import varlen_attention_ref
from ijepa_kernels.attention_backends import BACKENDS, choose, takes_one_call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.compare import Case, NotRun, Variant, assert_close
from bench.harness.workload import MODELS, draw_masks

CPU_BATCH = 8
PLAIN = ("loop", "padded", "batched", "cudnn", "materialised")
PROVIDERS = ["ours", "short", "auto", *BACKENDS, *PLAIN]
SEQUENCES = {
    "context64": ("B16", "context"),
    "context80": ("H14", "context"),
    "context88": ("g16", "context"),
    "predictor32": ("B16", "predictor"),
    "predictor24": ("H14", "predictor"),
    "dense64": ("B16", "dense"),
    "dense80": ("H14", "dense"),
    "dense88": ("g16", "dense"),
}
CASES = [
    pytest.param(name, collate, id=f"{name}-{collate}", marks=[pytest.mark.quick] * (name in ("context64", "dense64")))
    for name, (_, kind) in SEQUENCES.items()
    for collate in (["truncate"] if kind == "dense" else ["truncate", "ragged"])
]


class Sequences:
    """q, k and v of one batch."""

    def __init__(self, name: str, collate: str, device: torch.device):
        model, self.kind = SEQUENCES[name]
        self.model, self.device = MODELS[model], device
        self.size = self.model.predictor_size if self.kind == "predictor" else self.model.size
        self.heads, self.head_dim = self.size.num_heads, self.size.dim // self.size.num_heads
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.batch = self.model.gpu_batch if device.type == "cuda" else CPU_BATCH
        patches = self.model.grid**2
        context, target, context_of, _ = draw_masks(self.model.grid, self.batch, collate)
        lengths = context.cu_seqlens.diff()
        if self.kind == "predictor":
            lengths = lengths[context_of.long()] + target.cu_seqlens.diff()
        elif self.kind == "dense":
            lengths = torch.full((self.batch,), patches)
        self.lengths = lengths.tolist()
        self.tokens = sum(self.lengths)
        bounds = {"context": context.max_seqlen, "predictor": context.max_seqlen + target.max_seqlen, "dense": patches}
        self.max_seqlen = bounds[self.kind]
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        self.training = self.kind != "dense"
        self.packing = self._packing()

    def qkv(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Views of one `[T, 3, heads, head_dim]`, as a model makes them."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.tokens, 3, self.heads, self.head_dim)
        x = torch.randn(shape, generator=generator, device=self.device).to(self.dtype).to(dtype or self.dtype)
        return [part.requires_grad_(self.training) for part in x.unbind(1)]

    def grad(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (self.tokens, self.heads, self.head_dim)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def need_equal_lengths(self) -> None:
        if len(set(self.lengths)) > 1:
            raise NotRun("wants sequences of one length")

    def dense(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)  # [S, heads, L, head_dim]

    def _packing(self) -> tuple[Tensor, Tensor]:
        """int64 [T], where each token goes in a padded `[S, longest]`; bool [S, 1, 1, longest], what is no padding."""
        longest, lengths = max(self.lengths), torch.tensor(self.lengths)
        inside = torch.arange(longest) < lengths[:, None]
        return inside.flatten().nonzero()[:, 0].to(self.device), inside[:, None, None].to(self.device)

    def loop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(x.transpose(0, 1)[None].split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in sequences], dim=2)[0].transpose(0, 1)

    def padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place, mask = self.packing
        rows = mask.shape[0] * mask.shape[-1]

        def pad(x: Tensor) -> Tensor:
            return self.dense(x.new_zeros(rows, *x.shape[1:]).index_copy(0, place, x))

        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, place)

    def batched(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.need_equal_lengths()
        return F.scaled_dot_product_attention(*map(self.dense, (q, k, v))).transpose(1, 2).flatten(0, 1)

    def cudnn(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.need_equal_lengths()
        if q.device.type != "cuda":
            raise NotRun("GPU only")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.batched(q, k, v)

    def materialised(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.need_equal_lengths()
        q, k, v = map(self.dense, (q, k, v))
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(0, 1)


def absent(reason: str) -> Variant:
    def make():
        raise NotRun(reason)

    return Variant(make)


def attention_case(name: str, collate: str, device: torch.device) -> Case:
    data = Sequences(name, collate, device)

    def run(attend, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
        if not data.training:
            with torch.no_grad():
                return [attend(*inputs)]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def variant(provider: str) -> Variant:
        if provider in PLAIN:
            return Variant(make(getattr(data, provider)))
        if provider == "short":
            if data.device.type != "cuda":
                return absent("GPU only")
            fits = data.training and attention_short.fits(data.head_dim, data.dtype, data.max_seqlen)
            if data.head_dim in attention_triton.SHORT_BACKWARD:
                return absent("it is what ours is here")
            return Variant(short) if fits else absent("not for these sequences")
        try:
            backend = choose(data.head_dim, data.dtype, data.device, ours if provider == "ours" else provider)
        except ValueError as error:
            return absent(str(error).rpartition(": ")[2])
        sizes = data.tokens, len(data.lengths), data.max_seqlen
        if provider == "auto" and not data.training and takes_one_call(data.head_dim, data.dtype, data.device, *sizes):
            return Variant(make(partial(packed, "auto")), info=lambda timing: {"backend": "one call"})
        if provider != "ours" and backend == ours:
            return absent("it is what ours is here")
        captured = backend not in ("xformers", "torch")  # those read the lengths on the host
        return Variant(make(partial(packed, backend)), graph=captured, info=lambda timing: {"backend": backend})

    def packed(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, data.cu_seqlens, data.max_seqlen, backend=backend)

    def make(attend):
        def build():
            inputs, grad = data.qkv(), data.grad()
            return lambda: run(attend, inputs, grad)

        return build

    def short():
        (q, k, v), grad, scale = (x.detach() for x in data.qkv()), data.grad(), data.head_dim**-0.5

        def call() -> list[Tensor]:
            out, lse = attention_triton.forward(q, k, v, data.cu_seqlens, data.max_seqlen, scale)
            grads = attention_short.backward(grad, q, k, v, out, lse, data.cu_seqlens, data.max_seqlen, scale)
            return [out, *grads]

        return call

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention_ref(q, k, v, data.cu_seqlens)

    ours = "triton" if data.device.type == "cuda" else "torch"
    exact = run(reference, data.qkv(torch.float64), data.grad().double())
    tolerance = 2e-5  # sums of a few hundred products in fp32
    if data.dtype != torch.float32:  # twice what plain PyTorch loses in this dtype
        plain = zip(run(reference, data.qkv(), data.grad()), exact, strict=True)
        tolerance = 2 * max(((a.double() - e).abs().max() / e.abs().max()).item() for a, e in plain)

    elements = data.tokens * data.heads * data.head_dim
    flops = 4 * data.heads * data.head_dim * sum(length**2 for length in data.lengths)
    rows, size = data.batch * data.model.grid**2, data.model.size
    return Case(
        {provider: variant(provider) for provider in PROVIDERS},
        {"sequences": len(data.lengths), "T": data.tokens, "heads": data.heads, "head_dim": data.head_dim},
        data.dtype,
        lambda out: assert_close(out, exact, tolerance),
        # q, k, v, out; in the backward those and their four gradients
        nbytes=(12 if data.training else 4) * elements * data.dtype.itemsize,
        flops=(3 if data.training else 1) * flops,
        block=(rows, size.dim, size.mlp_dim),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("sequences", "collate"), CASES)
def test_bench_attention(bench, sequences, collate, provider):
    bench(lambda: attention_case(sequences, collate, bench.device))
