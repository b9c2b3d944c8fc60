"""The ops that make a transformer's input, against PyTorch: gather_patches, embed_patches, predictor_tokens.

`eager` is the released way: normalise the whole image, in floats, then select patches. `select` is the best that plain
PyTorch offers: select rows first; `compiled` is `select` under torch.compile (GPU only: on a CPU it compiles longer
than this file runs). Both collations are here, because they differ: ragged contexts are longer, and the released way
cannot take them.
"""
import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD, Packed, embed_patches, gather_patches, predictor_tokens
from torch import Tensor

from bench.harness.compare import Case, NotRun, Variant, assert_close
from bench.harness.workload import MODELS, PREDICTOR_DIM, Model, draw_images, draw_masks, rectangular

CPU_BATCH = 4
pytestmark = [
    pytest.mark.parametrize("model", [pytest.param("B16", marks=pytest.mark.quick), "L16", "H14", "g16"]),
    pytest.mark.parametrize("collate", ["truncate", "ragged"]),
    pytest.mark.parametrize("provider", ["ours", "eager", "select", "compiled"]),
]


class Inputs:
    """One batch of images with its masks, sequences in the released code's order where they are rectangular."""

    def __init__(self, model: Model, collate: str, device: torch.device):
        self.model, self.device = model, device
        self.batch = model.gpu_batch if device.type == "cuda" else CPU_BATCH
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.images, _ = draw_images(self.batch, device)
        # Made here: a CUDA graph cannot capture a copy from the host.
        self.mean, self.std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self.patches, self.patch = model.grid**2, model.patch_size
        self.columns = 3 * self.patch**2
        context, target, self.context_of, _ = draw_masks(model.grid, self.batch, collate)
        self.contexts = self.targets = None
        if collate == "truncate":
            sides = (context, target)
            self.contexts, self.targets = ([m.to(device) for m in rectangular(side, self.batch)] for side in sides)
            context, target = (Packed.from_masks(masks, self.patches) for masks in (self.contexts, self.targets))
            self.context_of = target.image
        self.context, self.target = context.to(device), target.to(device)
        self.context_of = self.context_of.to(device)
        self.tokens, self.rows = len(context.indices), self.context.rows(self.patches)
        self.shapes = {"B": self.batch, "N": self.patches, "T": self.tokens, "collate": collate}

    def need_rectangles(self) -> None:
        if self.contexts is None:
            raise NotRun("wants rectangular masks")

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def unfolded(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] as rows of patches [B * N, p, p, 3], without touching the pixels until it is read."""
        grid, p = self.model.grid, self.patch
        return images.view(self.batch, grid, p, grid, p, 3).transpose(2, 3).reshape(-1, p, p, 3)

    def select_patches(self, images: Tensor) -> Tensor:
        """The wanted patches first, as bytes; then normalised, columns in the order of a convolution's weight."""
        chosen = self.unfolded(images).index_select(0, self.rows)
        return ((chosen.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2).flatten(1).to(self.dtype)

    def normalise_all(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2).to(self.dtype)


def gathered(x: Tensor, masks: list[Tensor]) -> Tensor:
    """With an index of the size of the output, the released way."""
    return torch.cat([x.gather(1, m.unsqueeze(-1).repeat(1, 1, x.shape[-1])) for m in masks]).flatten(0, 1)


def compiled(function, device: torch.device):
    if device.type != "cuda":
        raise NotRun("compiles longer than it runs on a CPU")
    return torch.compile(function, fullgraph=True)


def gather_case(data: Inputs) -> Case:
    """Forward; it has no backward."""
    p, exact = data.patch, data.select_patches(data.images)

    def eager(images):
        data.need_rectangles()
        columns = F.unfold(data.normalise_all(images), p, stride=p).transpose(1, 2)  # [B, N, 3 * p * p]
        return gathered(columns, data.contexts)

    def of(function):
        def make():
            images, call = data.images.clone(), function()
            return lambda: call(images)

        return Variant(make)

    variants = {
        "ours": of(lambda: lambda x: gather_patches(x, data.context, patch_size=p, dtype=data.dtype)),
        "eager": of(lambda: eager),
        "select": of(lambda: data.select_patches),
        "compiled": of(lambda: compiled(data.select_patches, data.device)),
    }
    # fp32 rounds the normalisation differently where it is one multiply-add; bf16 by one unit in the last place.
    tolerance = 2**-8 if data.dtype == torch.bfloat16 else 1e-6

    def check(out):
        assert_close([out], [exact], tolerance)

    elements = data.tokens * data.columns
    nbytes = elements * (1 + data.dtype.itemsize)
    return Case(variants, data.shapes, data.dtype, check, nbytes=nbytes, flops=2 * elements)


def embed_case(data: Inputs) -> Case:
    """Forward and backward, the context encoder's."""
    p, dim = data.patch, data.model.size.dim
    pos_embed = data.normal(data.patches, dim, seed=3, dtype=torch.float32)
    grad = data.normal(data.tokens, dim, seed=4) / dim

    def parameters(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        weight, bias = data.normal(dim, 3, p, p, seed=1) / p, data.normal(dim, seed=2)
        return weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()

    def ours(images, weight, bias):
        return embed_patches(images, data.context, weight, bias, pos_embed, patch_size=p, dtype=data.dtype)

    def eager(images, weight, bias):
        data.need_rectangles()
        weight, bias = weight.to(data.dtype), bias.to(data.dtype)
        tokens = F.conv2d(data.normalise_all(images), weight, bias, stride=p).flatten(2).transpose(1, 2)
        return gathered(tokens + pos_embed, data.contexts).to(data.dtype)

    def select(images, weight, bias):
        patches, weight, bias = data.select_patches(images), weight.to(data.dtype), bias.to(data.dtype)
        tokens = F.linear(patches, weight.flatten(1), bias)
        return (tokens + pos_embed.index_select(0, data.context.indices)).to(data.dtype)

    def of(function):
        def make():
            images, inputs, call = data.images.clone(), parameters(), function()

            def step():
                out = call(images, *inputs)
                return out.detach(), *torch.autograd.grad(out, inputs, grad)

            return step

        return Variant(make)

    variants = {
        "ours": of(lambda: ours),
        "eager": of(lambda: eager),
        "select": of(lambda: select),
        "compiled": of(lambda: compiled(select, data.device)),
    }
    exact_inputs = parameters(torch.float64)
    patches = data.select_patches(data.images).double()
    exact = F.linear(patches, exact_inputs[0].flatten(1), exact_inputs[1])
    exact = exact + pos_embed.double().index_select(0, data.context.indices)
    expected = exact.detach(), *torch.autograd.grad(exact, exact_inputs, grad.double())

    def check(result):
        # Sums of up to T or 3 p p products; in bf16 inputs, outputs and intermediate sums are rounded to 2^-9.
        assert_close(result, expected, 2**-5 if data.dtype == torch.bfloat16 else 2e-5)

    item, weights = data.dtype.itemsize, 4 * dim * data.columns
    nbytes = 2 * (data.tokens * data.columns + data.tokens * dim * item + weights)
    flops = 4 * data.tokens * data.columns * dim
    block = data.tokens, dim, data.model.size.mlp_dim
    shapes = data.shapes | {"D": dim}
    return Case(variants, shapes, data.dtype, check, nbytes=nbytes, flops=flops, block=block)


def predictor_case(data: Inputs) -> Case:
    """Forward and backward."""
    dim = PREDICTOR_DIM
    pos_embed = data.normal(data.patches, dim, seed=3, dtype=torch.float32)
    total = 4 * data.tokens + len(data.target.indices)
    grad = data.normal(total, dim, seed=4)

    def inputs(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        context, mask_token = data.normal(data.tokens, dim, seed=1), data.normal(1, 1, dim, seed=2)
        context, mask_token = context.to(dtype or data.dtype), mask_token.to(dtype or torch.float32)
        return context.requires_grad_(), mask_token.requires_grad_()

    def ours(context, mask_token):
        return predictor_tokens(context, mask_token, pos_embed, data.context, data.target, data.context_of)[0]

    def eager(context, mask_token):
        data.need_rectangles()
        positions = pos_embed.expand(data.batch, -1, -1)
        x = (context + gathered(positions, data.contexts)).view(data.batch, -1, dim)
        queries = mask_token + gathered(positions, data.targets).view(4 * data.batch, -1, dim)
        return torch.cat([x.repeat(4, 1, 1), queries], 1).flatten(0, 1).to(data.dtype)

    source = source_rows(data)

    def select(context, mask_token):
        visible = context + pos_embed.index_select(0, data.context.indices).to(context.dtype)
        masked = (mask_token.flatten() + pos_embed.index_select(0, data.target.indices)).to(context.dtype)
        return torch.cat([visible, masked]).index_select(0, source)

    def of(function):
        def make():
            leaves, call = inputs(), function()

            def step():
                out = call(*leaves)
                return out.detach(), *torch.autograd.grad(out, leaves, grad)

            return step

        return Variant(make)

    variants = {
        "ours": of(lambda: ours),
        "eager": of(lambda: eager),
        "select": of(lambda: select),
        "compiled": of(lambda: compiled(select, data.device)),
    }
    leaves = inputs(torch.float64)
    exact = select(*leaves)
    expected = exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())

    def check(result):
        # Each row is one sum of two; a context row's gradient sums four, the mask token's all mask rows.
        assert_close(result, expected, 2**-6 if data.dtype == torch.bfloat16 else 1e-5)

    item = data.dtype.itemsize
    nbytes = 2 * dim * item * (data.tokens + total) + 4 * dim * data.patches
    shapes = data.shapes | {"P": dim, "T_out": total}
    return Case(variants, shapes, data.dtype, check, nbytes=nbytes, flops=2 * dim * total)


def source_rows(data: Inputs) -> Tensor:
    """Where each row of the predictor's input lies in [context rows; target rows], sequence after sequence."""
    context, target = data.context.cu_seqlens.tolist(), data.target.cu_seqlens.tolist()
    parts = []
    for sequence, of in enumerate(data.context_of.tolist()):
        parts.append(torch.arange(context[of], context[of + 1]))
        parts.append(data.tokens + torch.arange(target[sequence], target[sequence + 1]))
    return torch.cat(parts).to(data.device)


def test_bench_gather_patches(bench, model, collate, provider):
    bench(lambda: gather_case(Inputs(MODELS[model], collate, bench.device)))


def test_bench_embed_patches(bench, model, collate, provider):
    bench(lambda: embed_case(Inputs(MODELS[model], collate, bench.device)))


def test_bench_predictor_tokens(bench, model, collate, provider):
    bench(lambda: predictor_case(Inputs(MODELS[model], collate, bench.device)))
