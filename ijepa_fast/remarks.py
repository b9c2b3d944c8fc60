"""What is said at the start of a run about a config that is legitimate, and perhaps not what was meant."""
from ijepa_fast.config import Config


def remarks(config: Config, steps_per_epoch: int) -> list[str]:
    """A sentence on each key whose value the run will never come to. `steps_per_epoch`: updates in an epoch."""
    optim, log, train = config.optim, config.log, config.train
    total, said = optim.epochs * steps_per_epoch, []
    if optim.warmup_epochs > optim.epochs:
        top = optim.start_lr + (optim.lr - optim.start_lr) * optim.epochs / optim.warmup_epochs
        said.append(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than the run of {optim.epochs} epochs: its "
            f"learning rate ends at {top:.2g} and never comes to optim.lr={optim.lr:g}"
        )
    if optim.warmup_epochs and optim.start_lr > optim.lr:
        said.append(f"optim.start_lr={optim.start_lr:g} is above optim.lr={optim.lr:g}: the warm-up goes down")
    if log.probe_every is not None and log.probe_every > total:
        said.append(f"log.probe_every={log.probe_every} is past the end, step {total}: probes at both ends")
    if train.checkpoint_every is not None and train.checkpoint_every > total:
        said.append(f"train.checkpoint_every={train.checkpoint_every} is past the end, step {total}: one at the end")
    return said
