"""The gate of whole steps: only a provider whose loss and gradients agree with those of `straight` is timed."""
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.baselines.step import Provider
from bench.baselines.straight import StraightEncoder, StraightPredictor, straight_loss
from bench.harness.workload import Setup


class Gate:
    """Compares loss and gradients of a provider with those of `straight` in fp32, at the shared weights.

    The allowed error is twice what `straight` itself loses in the provider's dtype, plus the rounding of fp32 sums
    (ROUNDING). The reference runs on a few images at a time, because in fp32 the activations of a whole batch would
    not fit. Where masks are ragged it runs on one image at a time: `straight` needs rectangular masks.
    """

    ROUNDING = 1e-5  # of the norm; measured at S/16: 2e-7
    IMAGES = 16

    def __init__(self, setup: Setup):
        self.setup = setup
        self.reference: tuple[Tensor, Tensor] | None = None
        self.allowed = 0.0

    def __call__(self, provider: Provider) -> None:
        if self.reference is None:
            self.reference = self._straight(autocast=False)
            if self.setup.dtype != torch.float32:
                own = self._straight(autocast=True)
                self.allowed = 2 * max(self._error(own))
        loss, gradients = provider.gradients()
        loss_error, gradient_error = self._error((loss, _flat(gradients)))
        limit = provider.error * self.allowed + self.ROUNDING
        assert loss_error <= limit, f"the loss is off by {loss_error:.1e} of it, allowed {limit:.1e}"
        assert gradient_error <= limit, f"the gradient is off by {gradient_error:.1e} of it, allowed {limit:.1e}"

    def _error(self, result: tuple[Tensor, Tensor]) -> tuple[float, float]:
        return tuple(((a - b).norm() / b.norm()).item() for a, b in zip(result, self.reference, strict=True))

    def _straight(self, *, autocast: bool) -> tuple[Tensor, Tensor]:
        setup = self.setup
        modules = setup.build_baseline(StraightEncoder, StraightPredictor)
        trained = [p for m in modules[:2] for p in m.parameters() if p.requires_grad]
        loss = torch.zeros((), device=setup.device)
        total = [torch.zeros_like(p) for p in trained]
        for images, contexts, targets, weight in self._parts():
            part = weight * straight_loss(*modules, images, contexts, targets, autocast=autocast)
            torch._foreach_add_(total, torch.autograd.grad(part, trained))
            loss += part.detach()
        return loss, _flat(total)

    def _parts(self) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor], float]]:
        """Parts of the batch: images, rectangular masks, and the part's weight in the loss."""
        setup = self.setup
        if setup.contexts is not None:
            for start in range(0, setup.batch, self.IMAGES):
                part = slice(start, start + self.IMAGES)
                images = setup.floats[part]
                masks = ([mask[part] for mask in side] for side in (setup.contexts, setup.targets))
                yield images, *masks, len(images) / setup.batch
            return
        context, target, *_ = setup.masks
        contexts = context.indices.long().split(setup.lengths[0].tolist())
        targets = target.indices.long().split(setup.lengths[1].tolist())
        for i, one in enumerate(contexts):
            of_image = [t[None] for t in targets[4 * i : 4 * i + 4]]
            share = sum(t.numel() for t in of_image) / len(target.indices)
            yield setup.floats[i : i + 1], [one[None]], of_image, share


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().float() for x in tensors])
