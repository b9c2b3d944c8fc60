"""The released I-JEPA code itself, from a checkout outside this repository: `--released CHECKOUT`."""
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.baselines.step import Provider, need_rectangles
from bench.baselines.straight import straight_ema, straight_optimizer
from bench.harness.compare import NotRun
from bench.harness.workload import IMAGE_SIZE, Setup


@contextmanager
def importable(checkout: Path) -> Iterator[None]:
    """`src` of the checkout is on the import path for as long as the block runs."""
    if not (checkout / "src" / "models" / "vision_transformer.py").is_file():
        raise NotRun(f"{checkout.name} is no checkout of the released code")
    path = str(checkout.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


class Released(Provider):
    """The released modules in the order of the released loop.

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
        self.optimizer = straight_optimizer(self.encoder, self.predictor, self.lr, self.weight_decay)
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
        straight_ema(self.target_encoder, self.encoder, self.momentum)
