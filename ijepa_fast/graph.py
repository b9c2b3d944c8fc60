"""Forward and backward of a micro-batch as a captured CUDA graph (`train.cuda_graph`).

A small model's kernels take a few milliseconds of a step, and the host tens of them to launch each from Python. A graph
launches all at once. It computes what was captured, on the same memory: images, padded masks (see `ijepa_fast.padding`)
and the loss's denominator are copied there first, and gradients are added to tensors that stay where they are.

The price is memory. What a step needs between its forward and its backward is kept for the graphs, and is needed once
more when a size is met for the first time, which may be hundreds of updates into a run.
"""
import contextlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from ijepa_kernels import Packed
from torch import Tensor

from ijepa_fast import compat
from ijepa_fast.errors import UserError
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.padding import Padded

Replay = Callable[[], None]


class _Captured(NamedTuple):
    masks: Padded  # what it reads, beside images, denominator and weights
    loss: Tensor  # what it writes, beside the gradients
    replay: Replay
    kept: Packed  # what it reads that a cache of the target encoder may let go


class GraphedBackward:
    """Adds the gradients of micro-batches, by a graph for each size that occurs, captured at its first batch."""

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer,
        kind: Literal["smooth_l1", "l2"],
        capture: Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]] | None = None,
    ):
        """`capture`: of a function gives the result, not computed yet, and what computes it; left out, a CUDA graph."""
        self.models = encoder, predictor, target_encoder
        self.kind = kind
        self.parameters = [p for model in (encoder, predictor) for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.denominator = torch.ones((), device=self.parameters[0].device)
        self._images: dict[torch.Size, Tensor] = {}
        self._graphs: dict[tuple, _Captured] = {}
        self._capture = capture or CudaCapture()

    def __call__(self, images: Tensor, masks: Padded, denominator: float) -> Tensor:
        """The loss of a micro-batch, which the next call writes over."""
        for model in self.models:
            model.refresh_copies()  # the graph reads them, and was captured where there was nothing to refresh
        if images.shape not in self._images:
            self._images[images.shape] = torch.empty_like(images)
        static = self._images[images.shape]
        static.copy_(images)
        self.denominator.fill_(denominator)
        key = images.shape, masks.size
        if key not in self._graphs:
            self._graphs[key] = self._captured(static, masks.clone())
        graph = self._graphs[key]
        compat.foreach_copy_(graph.masks.tensors(), masks.tensors())
        graph.masks.covered.copy_(masks.covered)
        graph.replay()
        return graph.loss

    def zero(self) -> None:
        """Begin an update: the parameters' gradients are ours from here on, and zero."""
        # Not before: PyTorch does not load an optimizer's state beside gradients, and says nothing.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        compat.foreach_zero_(self.gradients)

    def _captured(self, images: Tensor, masks: Padded) -> _Captured:
        def forward() -> Tensor:
            encoder, predictor, target_encoder = self.models
            return ijepa_loss(
                encoder, predictor, target_encoder, images, masks, denominator=self.denominator, kind=self.kind
            )

        def backward() -> Tensor:
            loss = forward()
            compat.foreach_add_(self.gradients, torch.autograd.grad(loss, self.parameters))
            return loss.detach()

        torch.autograd.grad(forward(), self.parameters)  # compiles kernels and allocates workspaces, which no graph may
        loss, replay = self._capture(backward)
        return _Captured(masks, loss, replay, self.models[2].every_patch(images))


class CudaCapture:
    """Captures into graphs that share one pool of memory, since no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on meanwhile: the loader's pins memory.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # what is left of the capture
                torch.cuda.synchronize()
            cause = error.__context__ or error  # the end of a capture that broke has an error of its own
            what = [*str(cause).strip().splitlines(), type(cause).__name__][0]
            raise UserError(f"train.cuda_graph: the step cannot be captured ({what}); set it to false") from error
        return result, graph.replay
