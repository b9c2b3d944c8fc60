"""A provider of one I-JEPA step, with marks between the parts of the step.

All providers' modules hold the very same weight tensors, and their optimizers the same moments. So four ViT-g fit one
GPU, and every gate is taken at the same point. Gradients are each provider's own. The parts end with the target
encoder, the context encoder, the loss, the backward pass and the update.
"""
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import heap
from bench.harness.compare import NotRun
from bench.harness.workload import Setup

PARTS = ("target", "context", "predictor", "backward", "optimizer+EMA")


class Marks:
    """Time stamps between the parts of each step. On CUDA they are events in the stream, read after all steps."""

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
    """A step: loss, backward, update. Subclasses set the three modules and the optimizer."""

    encoder: nn.Module
    predictor: nn.Module
    target_encoder: nn.Module
    optimizer: torch.optim.Optimizer
    momentum, lr, weight_decay = 1.0, 0.0, 0.05  # any values cost the same; these leave the shared weights in place
    freed_memory = "kept"  # see bench/harness/heap.py
    error = 1.0  # how many times what the gate allows it may be off

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
        """Untimed: set what the C library does with freed memory as this provider has it."""
        if self.setup.device.type == "cpu":
            heap.enter(self.freed_memory, settle=self._unmarked_step)

    def _unmarked_step(self) -> None:
        self.step()
        self.marks.steps.pop()

    def trained(self) -> Iterator[nn.Parameter]:
        for model in (self.encoder, self.predictor):
            yield from (p for p in model.parameters() if p.requires_grad)

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients at the shared weights; nothing is updated."""
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.trained()))
        return loss.detach(), list(gradients)

    def persistent_bytes(self) -> int:
        """The bytes of what lives from step to step: weights, target, optimizer state, batch."""
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
