"""Everything a config builds: data, models, optimizer, schedules, probe."""
import copy
from pathlib import Path

import torch
from torch import nn

from ijepa_fast.checkpoint import TrainState
from ijepa_fast.config import Config
from ijepa_fast.data.index import Index, build_index
from ijepa_fast.data.pipeline import ImageSource, build_pipeline
from ijepa_fast.distributed import World
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.evaluate import Probe, build_probe
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.model import build_encoder, build_predictor
from ijepa_fast.optim import Schedule, build_optimizer
from ijepa_fast.parallel import average_gradients, materialise, parallelize


class Run:
    """One pretraining run: its data, models, optimizer and schedules, built from the config."""

    def __init__(self, config: Config, world: World, *, write_cache: bool = True):
        self.config, self.world, self.write_cache = config, world, write_cache
        data, optim, seed = config.data, config.optim, config.train.seed
        if optim.global_batch_size % world.size:
            raise SharedError(
                f"optim.global_batch_size {optim.global_batch_size} does not divide among {world.size} processes"
            )

        with world.raise_on_all_ranks():
            self.masks = MultiBlockMasks(config.mask, config.grid, seed, optim.global_batch_size)
        self.index = self._index(data.root)
        with world.raise_on_all_ranks():
            if {"train", "val"} <= set(self.index.class_names):
                raise UserError(
                    f"data.root={data.root} holds both train and val; name one: data.root={data.root}/train"
                )
            self.data = build_pipeline(
                data,
                self.masks,
                micro_batch=optim.micro_batch,
                index=self.index,
                rank=world.rank,
                world_size=world.size,
                device=world.device,
            )
        self.loader = self.data.loader

        with torch.device("meta"):
            encoder, predictor = self._models()
        target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        # Ranks that hold shards get their part of rank 0's weights; the others draw the same weights themselves.
        drawn = self.random_models() if world.mesh is None or world.is_main else (None, None)
        for model, weights in ((encoder, drawn[0]), (predictor, drawn[1]), (target_encoder, drawn[0])):
            parallelize(model, config.parallel, world, trained=model is not target_encoder)
            materialise(model, weights, world)
        optimizer = build_optimizer(encoder, predictor, betas=optim.betas, eps=optim.eps)
        self.state = TrainState(encoder, predictor, target_encoder, optimizer)
        # What the loss is computed with: the same modules, with their gradients averaged over the ranks.
        self.encoder, self.predictor = average_gradients(encoder, world), average_gradients(predictor, world)
        pairs = zip(target_encoder.parameters(), encoder.parameters(), strict=True)
        pairs = [(target, source) for target, source in pairs if source.requires_grad]  # positions stay as they are
        self.target_parameters, self.source_parameters = map(list, zip(*pairs, strict=True))
        self.schedule = Schedule(
            steps_per_epoch=optim.epoch_length or self.data.sampler.steps_per_epoch,
            epochs=optim.epochs,
            warmup_epochs=optim.warmup_epochs,
            start_lr=optim.start_lr,
            peak_lr=optim.lr,
            final_lr=optim.final_lr,
            start_weight_decay=optim.weight_decay,
            final_weight_decay=optim.final_weight_decay,
            start_momentum=optim.momentum[0],
            final_momentum=optim.momentum[1],
            schedule_stretch=optim.schedule_stretch,
        )
        self.total_steps = optim.epochs * self.schedule.steps_per_epoch

    def _index(self, root: Path) -> Index:
        """Rank 0 reads all headers, unless they are cached; the others find its cache, or that of their machine."""
        turn = 0 if self.world.is_main or not self.write_cache else 1 if self.world.local_rank == 0 else 2
        group = self.world.long_timeout_group()
        for current in range(3):
            with self.world.raise_on_all_ranks(group):
                if turn == current:
                    index = build_index(root, threads=self.config.data.threads, write_cache=self.write_cache)
        return index

    def loss_denominator(self, step: int) -> float:
        """What a rank's part of the loss is divided by, so that the mean over ranks is that over the global batch."""
        return self.masks.count_targets(step) * self.state.encoder.size.dim / self.world.size

    def random_models(self) -> tuple[nn.Module, nn.Module]:
        """Context encoder and predictor as at step 0, on the CPU: their weights are a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.train.seed)
            return self._models()

    def _models(self) -> tuple[nn.Module, nn.Module]:
        model = self.config.model
        compute = model.compute_dtype
        if compute == "auto":
            compute = "bfloat16" if self.world.device.type == "cuda" else "float32"
        encoder = build_encoder(
            model.name,
            image_size=self.config.data.image_size,
            patch_size=model.patch_size,
            compute_dtype=getattr(torch, compute),
            residual_dtype=getattr(torch, model.residual_dtype),
        )
        try:
            return encoder, build_predictor(encoder, depth=model.predictor_depth, dim=model.predictor_dim)
        except ValueError as error:
            raise UserError(f"model.predictor_dim={model.predictor_dim}: {error}") from None

    def build_probe(self) -> Probe | None:
        """The probe of data.probe_root, or of the training images where that is not given."""
        config, data = self.config, self.config.data
        if config.log.probe_every is None:
            return None
        source = self.data.source
        if data.probe_root is not None:
            source = ImageSource(self._index(data.probe_root), data, self.world.device, self.data.source.decoder)
        with self.world.raise_on_all_ranks():
            return build_probe(
                source.index,
                config.log.probe_images,
                lambda ids: source.center_crops(ids, config.optim.micro_batch),
                self.world,
                must_have_labels=data.probe_root is not None,
            )

    def close(self) -> None:
        self.data.close()
