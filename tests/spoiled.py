"""Updates whose loss is not finite, in a run that is otherwise a real one."""
import math
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from ijepa_fast import step
from ijepa_fast.data.loader import Batch
from ijepa_fast.run import Run


def spoil(patch: pytest.MonkeyPatch, steps: Collection[int], loss: float = math.nan) -> None:
    """Of these updates (from 1) this rank's loss is `loss`, and so is each number of its gradients."""
    backward = step.backward

    def spoiled(run: Run, batch: Batch, denominator: float) -> Tensor:
        value = backward(run, batch, denominator)
        if batch.step + 1 not in steps:
            return value
        for p in run.state.trained().parameters():
            if p.grad is not None:
                p.grad.fill_(loss)
        return torch.full_like(value, loss)

    patch.setattr(step, "backward", spoiled)
