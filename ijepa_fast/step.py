"""One update of a run: gradients of all micro-batches, AdamW, and the EMA of the target encoder."""
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_fast.data.bad import BadImage
from ijepa_fast.data.loader import Batch
from ijepa_fast.memory import memory_advice
from ijepa_fast.metrics import Rates, StepRow, TokenCounts
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import set_rates
from ijepa_fast.parallel import accumulate
from ijepa_fast.run import Run


class Update(NamedTuple):
    loss: Tensor  # fp32 [] on the device: of the global batch. Where it is not finite, the update was skipped
    step: int  # from 0
    lr: float
    weight_decay: float
    momentum: float
    counts: TokenCounts  # of this rank
    bad: list[BadImage]  # of this rank

    def row(self, loss: float | None, rates: Rates, steps_per_epoch: int) -> StepRow:
        """Its row of the log; `loss` as read from the device, None where it is not finite."""
        epoch, itr = divmod(self.step, steps_per_epoch)
        return StepRow(
            epoch=epoch + 1,
            itr=itr,
            loss=loss,
            context_tokens=round(self.counts.context / self.counts.contexts, 2),
            target_tokens=round(self.counts.target / self.counts.targets, 2),
            step=self.step + 1,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            **rates._asdict(),
        )


def update(run: Run, step: int, batches: Iterator[Batch]) -> Update:
    """Make update `step` (from 0) with the next micro-batches of this rank. Does not wait for a CUDA device.

    Where the loss is not finite, weights, optimizer and target encoder stay as they are: the device skips the update.
    """
    lr, weight_decay = set_rates(run.state.optimizer, run.schedule, step)
    momentum = run.schedule.momentum(step)
    denominator = run.loss_denominator(step)
    loss, counts, bad = torch.zeros((), device=run.world.device), TokenCounts(), list[BadImage]()
    with memory_advice(run.config.optim.micro_batch):
        if run.graphed is not None:
            run.graphed.zero()
        for _ in range(run.data.loader.micro_batches_per_step):
            batch = next(batches)
            loss += backward(run, batch, denominator)
            counts.add(batch, run.config.grid**2)
            bad += batch.bad
        loss = run.world.mean(loss)  # one for all ranks, which skip together or not at all
        run.state.update(momentum, finite=loss, keep_gradients=run.graphed is not None)
    return Update(loss, step, lr, weight_decay, momentum, counts, bad)


def backward(run: Run, batch: Batch, denominator: float) -> Tensor:
    """Add a micro-batch's gradients; the last of a step averages them over the ranks. Returns its part of the loss."""
    if run.graphed is not None:
        assert batch.padded is not None
        return run.graphed(batch.images, batch.padded, denominator)
    with contextlib.nullcontext() if batch.last else accumulate(run.encoder, run.predictor):
        loss = ijepa_loss(
            run.encoder,
            run.predictor,
            run.state.target_encoder,
            batch.images,
            batch.masks,
            denominator=denominator,
            kind=run.config.optim.loss,
        )
        loss.backward()
    return loss.detach()
