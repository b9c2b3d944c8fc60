"""The single ops against PyTorch, at the shapes of the paper's models: ours, its plain form, the best way to say it.

`eager` is the released way; `index_select`, `foreach_lerp` and the like are the best that PyTorch offers; `compiled` is
that form under torch.compile (GPU only: on a CPU compiling takes longer than this file). The bytes are
those of kernels/README.md. On a CPU batches are small and the EMA takes one block of the model.
"""
import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import Packed, ema_update_, gather_tokens, smooth_l1_loss
from torch import Tensor

from bench.harness.compare import Case, NotRun, Variant, assert_close
from bench.harness.workload import IMAGE_SIZE, MODELS, Model, draw_masks, rectangular
from ijepa_fast.model import build_encoder

CPU_BATCH = 4
MOMENTUM = 0.996
pytestmark = pytest.mark.parametrize("model", [pytest.param("B16", marks=pytest.mark.quick), "L16", "H14", "g16"])


def ema_shapes(model: Model, device: torch.device) -> list[torch.Size]:
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, image_size=IMAGE_SIZE, patch_size=model.patch_size)
    parameters = encoder.parameters() if device.type == "cuda" else encoder.blocks[0].parameters()
    return [p.shape for p in parameters]


@pytest.mark.parametrize("provider", ["ours", "eager", "foreach_lerp", "foreach_mul_add"])
def test_bench_ema(bench, model, provider):
    shapes = ema_shapes(MODELS[model], bench.device)

    def tensor(i: int, which: int) -> Tensor:
        generator = torch.Generator(bench.device).manual_seed(2 * i + which)
        return torch.randn(shapes[i], generator=generator, device=bench.device)

    def of(update):
        def make():
            target, source = ([tensor(i, which) for i in range(len(shapes))] for which in (0, 1))

            def call():
                update(target, source)
                return target

            return call

        return Variant(make)

    def eager(target, source):
        for t, s in zip(target, source, strict=True):
            t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)

    def mul_add(target, source):
        torch._foreach_mul_(target, MOMENTUM)
        torch._foreach_add_(target, source, alpha=1 - MOMENTUM)

    def check(target):
        for i, got in enumerate(target):
            assert_close([got], [MOMENTUM * tensor(i, 0).double() + (1 - MOMENTUM) * tensor(i, 1).double()], 2**-22)

    def build():
        elements = sum(shape.numel() for shape in shapes)
        variants = {
            "ours": of(lambda target, source: ema_update_(target, source, MOMENTUM)),
            "eager": of(eager),
            "foreach_lerp": of(lambda target, source: torch._foreach_lerp_(target, source, 1 - MOMENTUM)),
            "foreach_mul_add": of(mul_add),
        }
        about = {"tensors": len(shapes), "elements": elements}
        return Case(variants, about, torch.float32, check, nbytes=12 * elements)

    bench(build)


class Targets:
    """Predicted tokens and the target encoder's output of one batch, with the masks that chose them."""

    def __init__(self, model: Model, device: torch.device):
        self.batch = model.gpu_batch if device.type == "cuda" else CPU_BATCH
        self.patches, self.dim = model.grid**2, model.size.dim
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        packed = draw_masks(model.grid, self.batch, "truncate").target
        self.masks = [mask.to(device) for mask in rectangular(packed, self.batch)]
        self.packed = Packed.from_masks(self.masks, self.patches)  # mask-major, as the eager form's rows
        self.tokens, self.rows = len(self.packed.indices), self.packed.rows(self.patches)
        self.shapes = {"B": self.batch, "N": self.patches, "D": self.dim, "T": self.tokens}
        self.device = device

    def features(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(self.batch, self.patches, self.dim, generator=generator, device=self.device).to(self.dtype)

    def predictions(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(self.tokens, self.dim, generator=generator, device=self.device).to(self.dtype)

    def gather(self, x: Tensor) -> Tensor:
        """With an index of the size of the output, the released way."""
        return torch.cat([x.gather(1, m.unsqueeze(-1).repeat(1, 1, self.dim)) for m in self.masks]).flatten(0, 1)

    def select(self, x: Tensor) -> Tensor:
        """By row numbers computed beforehand; ours computes them itself, from the masks."""
        return x.flatten(0, 1).index_select(0, self.rows)


def compiled(function, device: torch.device):
    if device.type != "cuda":
        raise NotRun("compiles longer than it runs on a CPU")
    return torch.compile(function, fullgraph=True)


@pytest.mark.parametrize("provider", ["ours", "eager", "index_select", "compiled"])
def test_bench_gather(bench, model, provider):
    def build():
        data = Targets(MODELS[model], bench.device)

        def of(gather):
            def make():
                x, call = data.features(), gather()
                return lambda: call(x)

            return Variant(make)

        variants = {
            "ours": of(lambda: lambda x: gather_tokens(x, data.packed)),
            "eager": of(lambda: data.gather),
            "index_select": of(lambda: data.select),
            "compiled": of(lambda: compiled(data.select, bench.device)),
        }
        nbytes = 2 * data.tokens * data.dim * data.dtype.itemsize
        expected = data.select(data.features())
        return Case(variants, data.shapes, data.dtype, lambda out: assert_close([out], [expected], 0.0), nbytes=nbytes)

    bench(build)


@pytest.mark.parametrize("provider", ["ours", "eager", "index_select", "compiled"])
def test_bench_loss(bench, model, provider):
    """Forward and backward."""

    def build():
        data = Targets(MODELS[model], bench.device)

        def of(loss_of):
            def make():
                features, pred, function = data.features(), data.predictions().requires_grad_(), loss_of()

                def call():
                    loss = function(pred, features)
                    return loss.detach(), *torch.autograd.grad(loss, pred)

                return call

            return Variant(make)

        def normalise_all(pred, features):
            return F.smooth_l1_loss(pred.float(), data.gather(F.layer_norm(features.float(), (data.dim,))))

        def normalise_selected(pred, features):
            return F.smooth_l1_loss(pred.float(), F.layer_norm(data.select(features).float(), (data.dim,)))

        variants = {
            "ours": of(lambda: lambda pred, features: smooth_l1_loss(pred, features, data.packed)),
            "eager": of(lambda: normalise_all),
            "index_select": of(lambda: normalise_selected),
            "compiled": of(lambda: compiled(normalise_selected, bench.device)),
        }
        exact = data.predictions().double().requires_grad_()
        expected = F.smooth_l1_loss(exact, F.layer_norm(data.select(data.features()).double(), (data.dim,)))
        (gradient,) = torch.autograd.grad(expected, exact)

        def check(result):
            # sums of millions of terms in fp32; the gradient is rounded to its dtype
            assert_close(result[:1], [expected.detach()], 1e-5)
            assert_close(result[1:], [gradient], 2**-8 if data.dtype == torch.bfloat16 else 1e-5)

        nbytes = 3 * data.tokens * data.dim * data.dtype.itemsize
        return Case(variants, data.shapes, data.dtype, check, nbytes=nbytes)

    bench(build)
