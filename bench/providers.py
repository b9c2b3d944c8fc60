"""One I-JEPA step by each provider, on shared weights and one batch, with marks between its parts.

All providers' modules hold the very same weight tensors, and their optimizers the same moments, so that four ViT-g fit
one GPU and every gate is taken at one point; gradients are each provider's own. Parts end where the target encoder, the
context encoder, the loss, the backward pass and the update end. To the baselines the pixels come normalised, as from
the released loader; ours normalises inside its step.
"""
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ijepa_kernels import ema_update_
from torch import Tensor, nn

from bench import heap
from bench.compare import NotRun
from bench.straight import straight_ema, straight_loss, straight_optimizer
from bench.tuned import TunedEncoder, TunedPredictor, compile_blocks, tuned_ema, tuned_loss
from bench.workload import IMAGE_SIZE, Setup
from ijepa_fast.model import Block
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import build_optimizer

PARTS = ("target", "context", "predictor", "backward", "optimizer+EMA")
MOMENTUM, LR, WEIGHT_DECAY = 1.0, 0.0, 0.05  # any cost the same; with these the shared weights stay where they are


class Marks:
    """Time stamps between the parts of each step; on CUDA events in the stream, read when all is over."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[list[tuple[str, Any]]] = []

    def __call__(self, part: str) -> None:
        if self.device.type == "cuda":
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        if part == "start":
            self.steps.append([])
        if self.steps:
            self.steps[-1].append((part, stamp))

    def seconds(self, last: int) -> dict[str, float]:
        """The median of each part over the last `last` steps."""
        parts: dict[str, list[float]] = {}
        for step in self.steps[-last:]:
            for (_, begin), (part, end) in itertools.pairwise(step):
                duration = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
                parts.setdefault(part, []).append(duration)
        return {part: sorted(durations)[len(durations) // 2] for part, durations in parts.items()}


class Provider:
    """A step: loss, backward, update. Subclasses set the three modules and the optimizer, and say how."""

    encoder: nn.Module
    predictor: nn.Module
    target_encoder: nn.Module
    optimizer: torch.optim.Optimizer
    freed_memory = "kept"  # see bench/heap.py

    def __init__(self, setup: Setup):
        self.setup, self.marks = setup, Marks(setup.device)

    def ready(self) -> None:
        """Share the optimizer's moments, and mark the ends of the two encoders' forward passes."""
        self.setup.share_moments(self.optimizer, encoder=self.encoder, predictor=self.predictor)
        self.target_encoder.register_forward_hook(lambda *_: self.marks("target"))
        self.encoder.register_forward_hook(lambda *_: self.marks("context"))

    def loss(self) -> Tensor:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        raise NotImplementedError

    def step(self) -> Tensor:
        self.marks("start")
        loss = self.loss()
        self.marks("predictor")
        self.backward(loss)
        self.marks("backward")
        self.update()
        self.marks("optimizer+EMA")
        return loss.detach()

    def before_step(self) -> None:
        """Untimed: have the C library treat freed memory this provider's way."""
        if self.setup.device.type == "cpu":
            heap.enter(self.freed_memory, settle=self._unmarked_step)

    def _unmarked_step(self) -> None:
        self.step()
        self.marks.steps.pop()

    def trained(self) -> Iterator[nn.Parameter]:
        for model in (self.encoder, self.predictor):
            yield from (p for p in model.parameters() if p.requires_grad)

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients at the shared weights; changes nothing."""
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.trained()))
        return loss.detach(), list(gradients)

    def persistent_bytes(self) -> int:
        """Of everything that lives from step to step: weights, target, optimizer state, batch."""
        setup = self.setup
        tensors = [p for m in (self.encoder, self.predictor, self.target_encoder) for p in m.parameters()]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        tensors += self.inputs()
        on_device = [x.untyped_storage() for x in tensors if x.device.type == setup.device.type]
        return sum({storage.data_ptr(): storage.nbytes() for storage in on_device}.values())

    def inputs(self) -> list[Tensor]:
        return [self.setup.floats, *self.setup.contexts, *self.setup.targets]


def need_rectangles(setup: Setup) -> None:
    if setup.contexts is None:
        raise NotRun("wants rectangular masks")


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
        self.optimizer = build_optimizer(self.encoder, self.predictor)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = LR, WEIGHT_DECAY if group["decay"] else 0.0
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        self.pairs = [list(side) for side in zip(*((t, s) for t, s in pairs if s.requires_grad), strict=True)]
        self.ready()

    def loss(self) -> Tensor:
        return ijepa_loss(self.encoder, self.predictor, self.target_encoder, self.setup.images, self.setup.masks)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema_update_(*self.pairs, MOMENTUM)

    def inputs(self) -> list[Tensor]:
        context, target, context_of = self.setup.masks
        return [self.setup.images, *context[:3], *target[:3], context_of]


class Straight(Provider):
    freed_memory = "returned"

    def __init__(self, setup: Setup):
        need_rectangles(setup)
        super().__init__(setup)
        self.encoder, self.predictor, self.target_encoder = setup.straight()
        self.optimizer = straight_optimizer(self.encoder, self.predictor, LR, WEIGHT_DECAY)
        self.ready()

    def loss(self) -> Tensor:
        modules, setup = (self.encoder, self.predictor, self.target_encoder), self.setup
        return straight_loss(*modules, setup.floats, setup.contexts, setup.targets)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        straight_ema(self.target_encoder, self.encoder, MOMENTUM)


class Tuned(Provider):
    def __init__(self, setup: Setup):
        need_rectangles(setup)
        super().__init__(setup)
        encoder, predictor = setup.sizes()
        with torch.device("meta"):
            modules = TunedEncoder(**encoder), TunedPredictor(**predictor), TunedEncoder(**encoder)
        self.encoder, self.predictor, self.target_encoder = setup.share(*modules)
        if setup.compiled:
            compile_blocks(*modules)
        groups = straight_optimizer(self.encoder, self.predictor, LR, WEIGHT_DECAY).param_groups
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
        self.ready()

    def loss(self) -> Tensor:
        modules, setup = (self.encoder, self.predictor, self.target_encoder), self.setup
        return tuned_loss(*modules, setup.floats, setup.contexts, setup.targets)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tuned_ema(self.target_encoder, self.encoder, MOMENTUM)


class Released(Provider):
    """The released code's own modules, from a checkout outside the repository, in the order of its training loop.

    With its `torch.cuda.amp` autocast and GradScaler; without its process group, its logging and its loader.
    """

    freed_memory = "returned"

    def __init__(self, setup: Setup):
        if setup.released is None:
            raise NotRun("needs --released CHECKOUT")
        need_rectangles(setup)
        super().__init__(setup)
        with importable(setup.released):
            from src.masks.utils import apply_masks
            from src.models import vision_transformer
            from src.utils.tensors import repeat_interleave_batch
        self.apply_masks, self.repeat = apply_masks, repeat_interleave_batch
        model, size, predictor = setup.model, setup.model.size, setup.model.predictor_size

        def encoder() -> nn.Module:
            build = getattr(vision_transformer, model.encoder)
            return build(patch_size=model.patch_size, img_size=[IMAGE_SIZE])

        with setup.device:  # it reads values while it builds, so not on meta
            modules = (
                encoder(),
                vision_transformer.vit_predictor(
                    num_patches=model.grid**2,
                    embed_dim=size.dim,
                    predictor_embed_dim=predictor.dim,
                    depth=predictor.depth,
                    num_heads=predictor.num_heads,
                ),
                encoder(),
            )
        self.encoder, self.predictor, self.target_encoder = setup.share(*modules)
        self.optimizer = straight_optimizer(self.encoder, self.predictor, LR, WEIGHT_DECAY)
        self.scaler = None
        if setup.device.type == "cuda":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.scaler = torch.cuda.amp.GradScaler()
        self.ready()

    def loss(self) -> Tensor:
        setup = self.setup
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            autocast = torch.cuda.amp.autocast(dtype=torch.bfloat16, enabled=setup.device.type == "cuda")
        with autocast:
            with torch.no_grad():
                h = self.target_encoder(setup.floats)
                h = nn.functional.layer_norm(h, (h.size(-1),))
                h = self.repeat(self.apply_masks(h, setup.targets), len(h), repeat=len(setup.contexts))
            z = self.predictor(self.encoder(setup.floats, setup.contexts), setup.contexts, setup.targets)
            return nn.functional.smooth_l1_loss(z, h)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        straight_ema(self.target_encoder, self.encoder, MOMENTUM)


PROVIDERS: dict[str, Callable[[Setup], Provider]] = {
    "ours": Ours,
    "ours_compiled": partial(Ours, compiled=True),
    "tuned": Tuned,
    "straight": Straight,
    "released": Released,
}


class importable:
    """`src` of a checkout on the import path, only as long as it is imported."""

    def __init__(self, checkout: Path):
        self.path = str(checkout.resolve())
        if not (checkout / "src" / "models" / "vision_transformer.py").is_file():
            raise NotRun(f"{checkout.name} is no checkout of the released code")

    def __enter__(self) -> None:
        sys.path.insert(0, self.path)

    def __exit__(self, *exception: object) -> None:
        sys.path.remove(self.path)
