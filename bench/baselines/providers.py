"""The providers of a step: ours and the baselines.

To the baselines the pixels come normalised, as from the released loader; ours normalises inside its step.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.baselines.released import Released
from bench.baselines.step import Provider, need_rectangles
from bench.baselines.straight import StraightEncoder, StraightPredictor, straight_ema, straight_loss, straight_optimizer
from bench.baselines.tuned import TunedEncoder, TunedPredictor, compile_blocks, tuned_ema, tuned_loss
from bench.harness.compare import NotRun
from bench.harness.workload import Setup
from ijepa_fast.blocks import Block
from ijepa_fast.model import keep_copies
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import build_optimizer
from ijepa_fast.run import TrainState


class Ours(Provider):
    """The library, as `ijepa_fast.train` runs a step; `compiled`: with parallel.compile=true."""

    def __init__(self, setup: Setup, *, compiled: bool = False):
        super().__init__(setup)
        modules = setup.encoder, setup.predictor, setup.target_encoder
        if compiled and not setup.compiled:
            raise NotRun("needs --compile on a CPU, and minutes")
        if compiled:
            with torch.device("meta"):
                modules = setup.share(*setup.build_ours(setup.dtype), setup.build_ours(setup.dtype)[0])
            for block in (part for module in modules for part in module.modules() if isinstance(part, Block)):
                block.compile()
        self.encoder, self.predictor, self.target_encoder = modules
        for module in modules:
            keep_copies(module)
        self.optimizer = build_optimizer(*modules)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.lr, self.weight_decay if group["decay"] else 0.0
        self.state = TrainState(*modules, self.optimizer)
        self.ready()

    def loss(self) -> Tensor:
        return ijepa_loss(self.encoder, self.predictor, self.target_encoder, self.setup.images, self.setup.masks)

    def update(self) -> None:
        self.state.update(self.momentum)

    def inputs(self) -> list[Tensor]:
        context, target, context_of, covered = self.setup.masks
        return [self.setup.images, *context[:3], *target[:3], context_of, *(covered or ())]


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
    "ours_compiled": partial(Ours, compiled=True),
    "tuned": Tuned,
    "straight": Straight,
    "released": Released,
}
