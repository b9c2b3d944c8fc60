"""Spread a model over ranks: activation checkpointing, compilation, sharding, its weights, accumulated gradients.

Every strategy (see `ijepa_fast.distributed`) computes the same: the loss is normalised by the global batch, its casts
are inside the blocks, and weights come from the seed alone.
"""
import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast import compat
from ijepa_fast.blocks import Block, LayerNorm
from ijepa_fast.config import Config
from ijepa_fast.distributed import World


def parallelize(model: nn.Module, config: Config, world: World, *, trained: bool) -> None:
    """Prepare `model` (an encoder or a predictor) in place; context and target encoder are cut alike.

    In this order, block by block: checkpointing (of a model that is trained), compilation, sharding.
    """
    if trained:
        checkpoint_blocks(model, config.parallel.checkpointing)
    # auto: not. Our kernels, one by one, were faster on an H100: H/14 216 ms a step against 228, B/16 71 against 73.
    if config.parallel.compile is True:
        compile_blocks(model)
    if world.mesh is not None:
        shard(model, world.mesh)


def checkpoint_blocks(model: nn.Module, policy: str) -> None:
    """Keep for the backward all activations ("none"), the costly ones ("selective"), or inputs of blocks ("full")."""
    for block in _blocks(model):
        block.checkpointing = policy


def compile_blocks(model: nn.Module) -> None:
    for block in _blocks(model):
        block.compile()
    # Context, target, predictor, first and last blocks, and each again without gradients or in inference mode.
    compat.allow_graphs(16)
    compat.silence_checkpointed_compile()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: shard every block, and the rest of the model, over `mesh`.

    Matrices are gathered in the dtype that the blocks cast them to anyway. Norms and positions, which every strategy
    applies in fp32, are gathered in fp32: once for the whole model, with all that belongs to no block.
    """
    blocks = _blocks(model)
    # Inputs are not cast: a block's input is the residual stream.
    low = MixedPrecisionPolicy(
        param_dtype=blocks[0].mlp.fc1.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # The root comes first and takes the norms: in a group of their own they would put hooks inside the blocks.
    matrices = {p for block in blocks for p in block.parameters()} - _norm_parameters(model)
    # Resharded at the root too: a forward without backward (targets, probes) would leave it whole.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=matrices)
    norms = _norm_parameters(model)  # others than before: shards
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=low, reshard_after_forward=True, ignored_params=norms)
    for before, after in itertools.pairwise(blocks):
        assert isinstance(before, FSDPModule)
        assert isinstance(after, FSDPModule)
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


def materialise(model: nn.Module, source: nn.Module | None, world: World) -> None:
    """Give a model made on the meta device its memory and, on all ranks, the weights of rank 0's `source`.

    Memory is filled with NaN first, so that a parameter without a weight is noticed.
    """
    model.to_empty(device=world.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    weights = dict(source.state_dict()) if source is not None else {}
    set_model_state_dict(model, weights, options=options)
    for name, parameter in model.named_parameters():
        assert not local(parameter).isnan().any(), f"{name} was not initialised"


def average_gradients(model: nn.Module, world: World) -> nn.Module:
    """The module to call for training: under DDP a wrapper that averages gradients in the backward, else `model`."""
    if world.strategy != "ddp":
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def accumulate(*models: nn.Module) -> Iterator[None]:
    """Inside, backward only adds to this rank's gradients; the step's last micro-batch reduces them over the ranks."""
    with contextlib.ExitStack() as stack:
        for model in models:
            if isinstance(model, DistributedDataParallel):
                stack.enter_context(model.no_sync())
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(False)
                stack.callback(model.set_requires_gradient_sync, True)
        yield


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def _blocks(model: nn.Module) -> list[Block]:
    return [part for part in model.modules() if isinstance(part, Block)]


def _norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {p for part in model.modules() if isinstance(part, LayerNorm) for p in part.parameters()}
