"""Does the predictor know what it cannot see? It is shown the context of a crop, and picks the block that is hidden.

The candidates are the blocks at the same position in every crop of every photograph, so position tells nothing: chance
is one in their number. The pick is the candidate whose features, by the target encoder, are nearest to the predicted
ones in squared distance: what training lowers for the true block and for no other.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.config import MaskConfig
from ijepa_fast.data import library_warnings
from ijepa_fast.data.pipeline import ImageSource
from ijepa_fast.data.sampler import crop_boxes
from ijepa_fast.errors import DecodeError, UserError
from ijepa_fast.masks import Masks, MultiBlockMasks
from ijepa_fast.objective import TARGET_NORM_EPS

CANDIDATES = 10  # crops of a photograph
_SEED = 0  # of crops and masks: the questions are the same whatever a run's seed


class Questions(NamedTuple):
    """Every block of every crop is one question; the right pick is the crop that it was cut from.

    crops: uint8 `[C, P, S, S, 3]`, C crops of each of P photographs.
    masks: of P images, the same for each of the C crops of a photograph: its context and its B hidden blocks.
    """

    crops: Tensor
    masks: Masks

    def blocks(self) -> list[Tensor]:
        """The patch indices of each block, int64: P * B tensors, photograph by photograph."""
        lengths = self.masks.target.cu_seqlens.diff().tolist()
        return list(self.masks.target.indices.long().split(lengths))

    def contexts(self) -> list[Tensor]:
        """The patch indices of each context, int64."""
        return list(self.masks.context.indices.long().split(self.masks.context.cu_seqlens.diff().tolist()))

    def answers(self) -> Tensor:
        """The crop that each question's block was cut from, int64 `[C, P * B]`; crop c of photograph p is c * P + p."""
        crops, photographs = self.crops.shape[:2]
        return torch.arange(crops)[:, None] * photographs + self.masks.target.image.long()


def ask(source: ImageSource, ids: np.ndarray, mask: MaskConfig, grid: int, scale: float) -> Questions:
    """Questions on the images `ids`: random crops of a share `scale` of each, with masks as training draws them.

    Raises UserError where an image cannot be decoded.
    """
    crops = []
    for encoded, record, i in zip(source.reader.read(ids), source.index.records[ids], ids, strict=True):
        width, height = (np.full(CANDIDATES, record[side]) for side in ("width", "height"))
        boxes = crop_boxes(_SEED, 0, i * CANDIDATES + np.arange(CANDIDATES), width, height, (scale, scale))
        try:
            with library_warnings.batch(lambda _: source.index.path(i)):  # noqa: B023 (called in here only)
                crops.append(source.decoder.decode([encoded] * CANDIDATES, boxes, source.image_size))
        except DecodeError as error:
            path = source.index.path(i)
            raise UserError(f"{path} cannot be decoded: {error.reason}; remove or replace it") from None
    masks = MultiBlockMasks(mask, grid, _SEED, len(ids)).sample(0, 0, len(ids))
    return Questions(torch.stack(crops, dim=1), masks)


@torch.no_grad()
def retrieve(
    questions: Questions,
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    *,
    wrong_context: bool = False,
) -> Tensor:
    """Which crop's block the predictor picks for each block of each crop: int64 `[C, P * B]`, numbers as `answers`.

    `wrong_context`, a control: the predictor is shown a crop of another photograph, which tells nothing of the block,
    so what is above chance comes from elsewhere.
    """
    device = next(target_encoder.parameters()).device
    context, target, context_of = (part.to(device) for part in questions.masks[:3])
    predicted, features = [], []
    for images in questions.crops.to(device):
        dense = target_encoder(images).float()
        features.append(F.layer_norm(dense, dense.shape[-1:], eps=TARGET_NORM_EPS))
        shown = images.roll(1, dims=0) if wrong_context else images
        predicted.append(predictor(encoder(shown, context), context, target, context_of).float())
    blocks = questions.blocks()
    guesses = torch.stack(predicted).split([len(block) for block in blocks], dim=1)
    every = torch.cat(features)  # [C * P, N, D]
    return torch.stack([_nearest(guess, every[:, block]) for guess, block in zip(guesses, blocks, strict=True)], 1)


def retrieve_by_colour(questions: Questions, grid: int) -> Tensor:
    """The same picks by colour alone: the mean RGB of the context patches nearest to a block stands for the block."""
    crops, (_, target, context_of, _) = questions.crops.float(), questions.masks
    patch = crops.shape[2] // grid
    colour = crops.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).mean((3, 5)).flatten(2, 3)  # [C, P, N, 3]
    visible, picks = questions.contexts(), []
    for block, photograph, of in zip(questions.blocks(), target.image.tolist(), context_of.tolist(), strict=True):
        rows, columns = (
            (part(visible[of])[:, None] - part(block)).abs() for part in (lambda i: i // grid, lambda i: i % grid)
        )
        distance = torch.maximum(rows, columns).amin(1)  # of each visible patch from the block, in patches
        near = visible[of][distance == distance.min()]
        guess = colour[:, photograph, near].mean(1, keepdim=True)
        picks.append(_nearest(guess, colour.flatten(0, 1)[:, block].mean(1, keepdim=True)))
    return torch.stack(picks, 1)


def accuracy(questions: Questions, picks: Tensor) -> float:
    """The share of right picks."""
    return float((picks.cpu() == questions.answers()).float().mean())


def photograph_accuracy(questions: Questions, picks: Tensor) -> float:
    """The share of picks that come from the right photograph."""
    photographs = questions.crops.shape[1]
    return float((picks.cpu() % photographs == questions.answers() % photographs).float().mean())


def _nearest(guesses: Tensor, candidates: Tensor) -> Tensor:
    """For each guess `[C, K, D]` the candidate `[M, K, D]` nearest in squared distance: int64 `[C]`."""
    return torch.cdist(guesses.flatten(1), candidates.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
