"""The providers of a step: ours and the baselines.

To the baselines the pixels come normalised, as from the released loader; ours normalises inside its step.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.baselines.released import Released
from bench.baselines.step import Provider, need_rectangles
from bench.baselines.straight import StraightEncoder, StraightPredictor, straight_ema, straight_loss, straight_optimizer
from bench.baselines.tuned import TunedEncoder, TunedPredictor, compile_blocks, tuned_ema, tuned_loss
from bench.harness.compare import NotRun
from bench.harness.workload import Setup, masks_to
from ijepa_fast.blocks import Block
from ijepa_fast.fp8 import use_fp8
from ijepa_fast.graph import GraphedBackward
from ijepa_fast.model import keep_copies
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import build_optimizer
from ijepa_fast.padding import pad
from ijepa_fast.run import TrainState


class Ours(Provider):
    """The library, as `ijepa_fast.train` runs a step.

    `compiled`: with parallel.compile=true; `fp8`: with model.target_dtype=fp8.
    """

    def __init__(self, setup: Setup, *, compiled: bool = False, fp8: bool = False):
        super().__init__(setup)
        if compiled and not setup.compiled:
            raise NotRun("needs --compile on a CPU, and minutes")
        if fp8 and setup.device.type != "cuda":
            raise NotRun("GPU only: a CPU emulates it")
        modules = self.modules(setup)
        if compiled:
            for block in (part for module in modules for part in module.modules() if isinstance(part, Block)):
                block.compile()
        if fp8:
            use_fp8(modules[2], "inner")
            self.error = 16.0  # e4m3 has four bits fewer than bf16
        self.encoder, self.predictor, self.target_encoder = modules
        for module in modules:
            keep_copies(module)
        self.optimizer = build_optimizer(*modules)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.lr, self.weight_decay if group["decay"] else 0.0
        self.state = TrainState(*modules, self.optimizer)
        self.ready()

    @staticmethod
    def modules(setup: Setup) -> tuple[nn.Module, ...]:
        """Modules of their own, for the shared weights."""
        with torch.device("meta"):
            return setup.share(*setup.build_ours(setup.dtype), setup.build_ours(setup.dtype)[0])

    def loss(self) -> Tensor:
        return ijepa_loss(self.encoder, self.predictor, self.target_encoder, self.setup.images, self.setup.masks)

    def update(self) -> None:
        self.state.update(self.momentum)

    def inputs(self) -> list[Tensor]:
        context, target, context_of, covered = self.setup.masks
        return [self.setup.images, *context[:3], *target[:3], context_of, *(covered or ())]


class Graphed(Ours):
    """The library with train.cuda_graph=true: forward and backward of a step in one launch."""

    def __init__(self, setup: Setup):
        if setup.device.type != "cuda":
            raise NotRun("GPU only")
        super().__init__(setup)
        self.graphed = GraphedBackward(self.encoder, self.predictor, self.target_encoder, "smooth_l1")
        masks = masks_to(setup.masks, torch.device("cpu"))
        self.masks = pad(masks, setup.batch * setup.model.grid**2).to(setup.device)
        self.denominator = float(len(masks.target.indices) * setup.model.size.dim)

    def ready(self) -> None:
        """Without marks inside the graph, which are events of their own."""
        self.setup.share_moments(self.optimizer, encoder=self.encoder, predictor=self.predictor)

    def loss(self) -> Tensor:
        self.graphed.zero()
        return self.graphed(self.setup.images, self.masks, self.denominator)

    def backward(self, loss: Tensor) -> None:
        """Nothing: the graph has done it."""

    def update(self) -> None:
        self.state.update(self.momentum, keep_gradients=True)

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        return self.loss(), self.graphed.gradients


class Straight(Provider):
    freed_memory = "returned"

    def __init__(self, setup: Setup):
        need_rectangles(setup)
        super().__init__(setup)
        self.encoder, self.predictor, self.target_encoder = setup.build_baseline(StraightEncoder, StraightPredictor)
        self.optimizer = straight_optimizer(self.encoder, self.predictor, self.lr, self.weight_decay)
        self.ready()

    def loss(self) -> Tensor:
        modules, setup = (self.encoder, self.predictor, self.target_encoder), self.setup
        return straight_loss(*modules, setup.floats, setup.contexts, setup.targets)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        straight_ema(self.target_encoder, self.encoder, self.momentum)


class Tuned(Provider):
    def __init__(self, setup: Setup):
        need_rectangles(setup)
        super().__init__(setup)
        modules = setup.build_baseline(TunedEncoder, TunedPredictor)
        self.encoder, self.predictor, self.target_encoder = modules
        if setup.compiled:
            compile_blocks(*modules)
        groups = straight_optimizer(self.encoder, self.predictor, self.lr, self.weight_decay).param_groups
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        self.ready()

    def loss(self) -> Tensor:
        modules, setup = (self.encoder, self.predictor, self.target_encoder), self.setup
        return tuned_loss(*modules, setup.floats, setup.contexts, setup.targets)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tuned_ema(self.target_encoder, self.encoder, self.momentum)


PROVIDERS: dict[str, Callable[[Setup], Provider]] = {
    "ours": Ours,
    "ours_graph": Graphed,
    "ours_fp8": partial(Ours, fp8=True),
    "ours_compiled": partial(Ours, compiled=True),
    "tuned": Tuned,
    "straight": Straight,
    "released": Released,
}
