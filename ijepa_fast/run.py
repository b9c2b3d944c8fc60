"""The parts of a pretraining run, assembled from its config by `build_run`."""
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ijepa_kernels import AdamWEMA
from torch import Tensor, nn

from ijepa_fast.config import Config
from ijepa_fast.data.index import Index, build_index
from ijepa_fast.data.pipeline import ImageSource, Pipeline, build_pipeline
from ijepa_fast.data.storage import is_remote
from ijepa_fast.data.subset import select
from ijepa_fast.distributed import World
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.evaluation.probe import Probe, build_probe
from ijepa_fast.fp8 import check_fp8, use_fp8
from ijepa_fast.graph import GraphedBackward
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.model import Predictor, VisionTransformer, build_encoder, build_predictor, keep_copies
from ijepa_fast.optim import Schedule, build_optimizer, build_schedule
from ijepa_fast.parallel import average_gradients, materialise, parallelize
from ijepa_fast.splits import check_one_split


@dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step, and a checkpoint holds (modules not wrapped by DDP)."""

    encoder: VisionTransformer
    predictor: Predictor
    target_encoder: VisionTransformer
    optimizer: AdamWEMA

    def weights(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("encoder", "predictor", "target_encoder")}

    def trained(self) -> nn.ModuleDict:
        """What the optimizer steps; its parameter names key the optimizer's state."""
        return nn.ModuleDict({"encoder": self.encoder, "predictor": self.predictor})

    def update(self, momentum: float, *, finite: Tensor | None = None, keep_gradients: bool = False) -> None:
        """Step the trained models by their gradients, which are dropped, and the target encoder after them.

        finite: fp32 [], on the device, the same on all ranks; where it is not, nothing changes. See `AdamWEMA.apply`.
        """
        self.optimizer.step(momentum=momentum, finite=finite)
        if not keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        for model in (self.encoder, self.predictor, self.target_encoder):
            for copies in model.kept_copies():
                copies.mark_fresh()


class Run(NamedTuple):
    config: Config
    world: World
    masks: MultiBlockMasks
    data: Pipeline
    state: TrainState
    encoder: nn.Module  # for the loss: the state's modules, under DDP in a wrapper that averages gradients
    predictor: nn.Module
    schedule: Schedule
    probe: Probe | None
    graphed: GraphedBackward | None = None  # what adds the gradients of a micro-batch, in the place of autograd

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.schedule.steps_per_epoch

    def loss_denominator(self, step: int) -> float:
        """Divides this rank's part of the loss, so that the mean over ranks is the mean over the global batch."""
        return self.masks.count_targets(step) * self.state.encoder.size.dim / self.world.size


@contextlib.contextmanager
def build_run(
    config: Config, world: World, *, write_cache: bool = True, report: Callable[[str], None] | None = None
) -> Iterator[Run]:
    """All parts of a run; its threads end with the context. Raises UserError for a config that cannot work.

    `write_cache=False` leaves no index of the images behind. `report` gets lines on the images, on rank 0.
    """
    check_divisible(config, world)
    with contextlib.ExitStack() as stack:
        with world.raise_on_all_ranks():
            masks = MultiBlockMasks(config.mask, config.grid, config.train.seed, config.optim.global_batch_size)
        with_graph = uses_graph(config, world)
        data = stack.enter_context(build_data(config, world, masks, write_cache, report, padded=with_graph))
        state = build_state(config, world)
        encoder, predictor = average_gradients(state.encoder, world), average_gradients(state.predictor, world)
        schedule = build_schedule(config.optim, data.sampler.steps_per_epoch)
        probe = stack.enter_context(open_probe(config, world, data, write_cache, report))
        graphed = None
        if with_graph:
            graphed = GraphedBackward(state.encoder, state.predictor, state.target_encoder, config.optim.loss)
        yield Run(config, world, masks, data, state, encoder, predictor, schedule, probe, graphed)


def uses_graph(config: Config, world: World) -> bool:
    """Whether steps are captured as CUDA graphs. Raises UserError where they cannot be, and the config asks for it."""
    if config.train.cuda_graph is not True:  # auto: not before a GPU has timed it
        return False
    if world.device.type != "cuda":
        raise SharedError("train.cuda_graph=true needs a GPU; leave it out")
    if world.strategy != "single":
        raise SharedError(f"train.cuda_graph=true is for one process, not {world.strategy}; leave it out")
    if config.model.target_dtype == "fp8" and torch.cuda.get_device_capability(world.device) < (9, 0):
        raise SharedError(
            "train.cuda_graph=true and model.target_dtype=fp8 need a GPU of compute capability 9.0; leave one out"
        )  # before it PyTorch 2.11 is said to launch such products on a stream that is not captured (pytorch#177651)
    if config.parallel.compile is True:
        raise SharedError("train.cuda_graph=true and parallel.compile=true exclude each other; leave one out")
    return True


def check_divisible(config: Config, world: World) -> None:
    if config.optim.global_batch_size % world.size:
        raise SharedError(
            f"optim.global_batch_size {config.optim.global_batch_size} does not divide among {world.size} processes"
        )


def build_data(
    config: Config,
    world: World,
    masks: MultiBlockMasks,
    write_cache: bool,
    report: Callable[[str], None] | None = None,
    padded: bool = False,
) -> Pipeline:
    """This rank's share of the batches of data.root."""
    root = config.data.root
    with world.raise_on_all_ranks():
        check_one_split(root)
    index = read_index(root, config, world, write_cache, report)
    with world.raise_on_all_ranks():
        index = select(index, config.data)
        return build_pipeline(
            config.data,
            masks,
            micro_batch=config.optim.micro_batch,
            index=index,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            padded=padded,
        )


def read_index(
    root: Path | str, config: Config, world: World, write_cache: bool, report: Callable[[str], None] | None = None
) -> Index:
    """Rank 0 reads all headers or the cache, then the first rank of each machine (it may share that), then the rest."""
    turn = 0 if world.is_main or not write_cache else 1 if world.local_rank == 0 else 2
    group = world.long_timeout_group()
    for current in range(3):
        with world.raise_on_all_ranks(group):
            if turn == current:
                index = build_index(
                    root,
                    threads=config.data.threads,
                    write_cache=write_cache,
                    compare=turn < 2 or not is_remote(root),  # a rank of the same machine has just listed all
                    report=(report if world.is_main else lambda line: None),
                )
    return index


def build_state(config: Config, world: World) -> TrainState:
    """Models at step 0, spread over the ranks, and their optimizer."""
    with torch.device("meta"):
        encoder, predictor = draw_models(config, world.device)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    if config.model.target_dtype == "fp8":
        check_fp8(world.device, encoder.compute_dtype)
        use_fp8(target_encoder, config.model.fp8_blocks)
    # With shards, rank 0 draws the weights and sends each rank its part; without, every rank draws them all itself.
    drawn = initial_models(config, world.device) if world.mesh is None or world.is_main else (None, None)
    for model, weights in ((encoder, drawn[0]), (predictor, drawn[1]), (target_encoder, drawn[0])):
        parallelize(model, config, world, trained=model is not target_encoder)
        materialise(model, weights, world)
        if world.mesh is None:
            keep_copies(model)
    betas, eps = config.optim.betas, config.optim.eps
    optimizer = build_optimizer(encoder, predictor, target_encoder, betas=betas, eps=eps)
    return TrainState(encoder, predictor, target_encoder, optimizer)


def initial_models(config: Config, device: torch.device) -> tuple[VisionTransformer, Predictor]:
    """Context encoder and predictor as at step 0, on the CPU: their weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return draw_models(config, device)


def draw_models(config: Config, device: torch.device) -> tuple[VisionTransformer, Predictor]:
    """Context encoder and predictor, for training on `device`, with weights from torch's global generator."""
    model, compute = config.model, config.model.compute_dtype
    if compute == "auto":
        compute = "bfloat16" if device.type == "cuda" else "float32"
    encoder = build_encoder(
        model.name,
        image_size=config.data.image_size,
        patch_size=model.patch_size,
        compute_dtype=getattr(torch, compute),
        residual_dtype=getattr(torch, model.residual_dtype),
    )
    try:
        return encoder, build_predictor(encoder, depth=model.predictor_depth, dim=model.predictor_dim)
    except ValueError as error:
        raise UserError(f"model.predictor_dim={model.predictor_dim}: {error}") from None


@contextlib.contextmanager
def open_probe(
    config: Config,
    world: World,
    data: Pipeline,
    write_cache: bool,
    report: Callable[[str], None] | None = None,
) -> Iterator[Probe | None]:
    """The probe of data.probe_root, or of the training images where that is not given."""
    if config.log.probe_every is None:
        yield None
        return
    source, root = data.source, config.data.probe_root
    with contextlib.ExitStack() as stack:
        if root is not None:
            index = read_index(root, config, world, write_cache, report)
            source = ImageSource(index, config.data, world.device, data.source.decoder)
            stack.enter_context(contextlib.closing(source))
        with world.raise_on_all_ranks():
            probe = build_probe(
                source.index,
                config.log.probe_images,
                lambda ids: source.center_crops(ids, config.optim.micro_batch),
                world,
                must_have_labels=root is not None,
            )
        yield probe
