"""What is said at the start of a run about a config that is legitimate, and perhaps not what was meant."""
from ijepa_fast.config import Config


def remarks(config: Config, steps_per_epoch: int, device: str = "cuda") -> list[str]:
    """A sentence on each key whose value the run will never come to, or that is slow on this device.

    `steps_per_epoch`: updates in an epoch; `device`: "cpu" or "cuda".
    """
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
    if device == "cpu" and config.model.compute_dtype == "bfloat16" and not multiplies_bfloat16():
        said.append("this CPU has no instructions for model.compute_dtype=bfloat16: float32 is faster on it")
    return said


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16: AVX512_BF16 or AMX of x86, BF16 of ARM."""
    import torch

    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
