"""Retrieval of hidden blocks: an oracle picks right, whoever knows nothing is at chance, and the picture shows both."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import ImageSource
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.model import build_encoder, build_predictor
from ijepa_fast.objective import TARGET_NORM_EPS
from ijepa_fast.retrieval import (
    CANDIDATES,
    Questions,
    accuracy,
    ask,
    photograph_accuracy,
    retrieve,
    retrieve_by_colour,
)
from ijepa_fast.retrieval_sheet import retrieval_sheet

CROPS, PHOTOGRAPHS, SIZE, PATCH, GRID = 3, 4, 64, 8, 8
MASK = MaskConfig(sampler="corrected", collate="ragged", min_keep=6)


@pytest.fixture(scope="module")
def questions() -> Questions:
    """Noise, over a shade of its own in every crop, so that a block tells which crop it is of."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 10, (CROPS, PHOTOGRAPHS, SIZE, SIZE, 3))
    shade = 18 * np.arange(CROPS * PHOTOGRAPHS).reshape(CROPS, PHOTOGRAPHS, 1, 1, 1)
    masks = MultiBlockMasks(MASK, GRID, 0, PHOTOGRAPHS).sample(0, 0, PHOTOGRAPHS)
    return Questions(torch.from_numpy((noise + shade).astype(np.uint8)), masks)


class Pixels(nn.Module):
    """An encoder whose features of a patch are its pixels, and its shade once more in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, packed: object = None) -> Tensor:
        patches = images.double().unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH)).transpose(2, 3)
        patches = patches.flatten(3).flatten(1, 2)  # [B, N, patch^2 * 3]
        shade = patches.mean(-1, keepdim=True) / 20
        features = torch.cat([patches / 255, shade.sin(), shade.cos()], dim=-1)
        return features if packed is None else images


class Oracle(nn.Module):
    """A predictor that looks: its "tokens" are the images that it was shown."""

    def forward(self, images: Tensor, context: object, target, context_of: Tensor) -> Tensor:
        dense = Pixels()(images)
        return F.layer_norm(dense, dense.shape[-1:], eps=TARGET_NORM_EPS).flatten(0, 1)[target.rows(GRID**2)]


class Ignorant(nn.Module):
    def forward(self, images: Tensor, context: object, target, context_of: Tensor) -> Tensor:
        return torch.zeros(len(target.indices), PATCH**2 * 3 + 2, dtype=torch.float64)


def test_an_oracle_is_always_right(questions):
    picks = retrieve(questions, Pixels(), Oracle(), Pixels())
    assert picks.shape == (CROPS, PHOTOGRAPHS * MASK.num_targets)
    assert accuracy(questions, picks) == photograph_accuracy(questions, picks) == 1


def test_an_oracle_shown_another_photograph_is_never_right(questions):
    picks = retrieve(questions, Pixels(), Oracle(), Pixels(), wrong_context=True)
    assert accuracy(questions, picks) == photograph_accuracy(questions, picks) == 0


def test_who_predicts_the_same_always_is_at_chance(questions):
    """Masks differ between photographs, so of one photograph's blocks each has one candidate picked for all crops."""
    picks = retrieve(questions, Pixels(), Ignorant(), Pixels())
    assert (picks == picks[0]).all()
    assert accuracy(questions, picks) <= 1 / CROPS


def test_the_pick_is_the_nearest_in_squared_distance(questions):
    """Against loops in double precision, with real models; no two distances are near enough for rounding to matter."""
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", image_size=SIZE, patch_size=PATCH)
    del encoder.blocks[2:]
    predictor, other = build_predictor(encoder, depth=1, dim=48), build_encoder("vit_tiny", image_size=64, patch_size=8)
    del other.blocks[1:]
    picks = retrieve(questions, encoder, predictor, other)
    context, target, context_of, _ = questions.masks
    with torch.no_grad():
        features = [
            F.layer_norm(other(crops).double(), (192,), eps=TARGET_NORM_EPS) for crops in questions.crops
        ]  # fmt: skip
        for c, crops in enumerate(questions.crops):
            predicted = predictor(encoder(crops, context), context, target, context_of).double()
            for b, rows in enumerate(predicted.split(target.cu_seqlens.diff().tolist())):
                block = target.indices[target.cu_seqlens[b] : target.cu_seqlens[b + 1]].long()
                distance = [
                    ((features[k][p, block] - rows) ** 2).sum().item()
                    for k in range(CROPS) for p in range(PHOTOGRAPHS)
                ]  # fmt: skip
                assert picks[c, b] == np.argmin(distance)


def test_colour_finds_blocks_of_a_shade_of_their_own(questions):
    assert accuracy(questions, retrieve_by_colour(questions, GRID)) == 1


def test_colour_looks_at_the_context_alone(questions):
    """Whatever is hidden is black in every crop: nothing is left to tell the candidates apart by."""
    crops = questions.crops.clone()
    hidden = torch.ones(PHOTOGRAPHS, GRID**2, dtype=torch.bool)
    for photograph, shown in enumerate(questions.contexts()):
        hidden[photograph, shown] = False
    pixels = hidden.view(PHOTOGRAPHS, GRID, GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    crops[:, pixels] = 0
    of_shown = retrieve_by_colour(Questions(crops, questions.masks), GRID)
    crops[:, ~pixels] = 0
    of_nothing = retrieve_by_colour(Questions(crops, questions.masks), GRID)
    assert accuracy(questions, of_nothing) <= 1 / CROPS
    assert not torch.equal(of_shown, of_nothing)


def test_colour_is_that_of_the_nearest_patches(questions):
    """Context patches away from a block turn white, its neighbours stay: then it is found as before."""
    shown, block = questions.contexts()[0], questions.blocks()[0]
    away = [max(abs(int(p) // GRID - int(b) // GRID), abs(int(p) % GRID - int(b) % GRID)) for p in shown for b in block]
    distance = torch.tensor(away).view(len(shown), len(block)).amin(1)
    crops = questions.crops.clone()
    for patch in shown[distance > distance.min()].tolist():
        row, column = (slice(PATCH * part, PATCH * (part + 1)) for part in divmod(patch, GRID))
        crops[:, 0, row, column] = 255
    assert (distance > distance.min()).any()
    picks = retrieve_by_colour(Questions(crops, questions.masks), GRID)
    assert torch.equal(picks[:, 0], questions.answers()[:, 0])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (90 + 10 * i, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def test_questions_are_the_same_at_every_call(photographs):
    source = ImageSource(build_index(photographs), DataConfig(root=photographs, image_size=SIZE, decoder="pillow"))
    first, second = (ask(source, np.arange(3), MASK, GRID, 0.3) for _ in range(2))
    source.close()
    assert first.crops.shape == (CANDIDATES, 3, SIZE, SIZE, 3)
    assert torch.equal(first.crops, second.crops)
    assert torch.equal(first.masks.target.indices, second.masks.target.indices)
    flat = first.crops.flatten(0, 1).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)  # no crop twice, or a question would have two answers
    assert first.answers().unique().tolist() == list(range(3 * CANDIDATES))


def test_an_image_that_cannot_be_decoded_is_named(photographs, tmp_path):
    for path in photographs.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = build_index(tmp_path)
    data = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(data[:200] + bytes(len(data) - 200))
    source = ImageSource(index, DataConfig(root=tmp_path, image_size=SIZE, decoder="pillow"))
    with pytest.raises(UserError, match=r"1\.jpg cannot be decoded"):
        ask(source, np.arange(3), MASK, GRID, 0.3)
    source.close()


def test_the_picture_marks_right_and_wrong_picks(questions, tmp_path):
    right = questions.answers()
    elsewhere = (right + 1) % PHOTOGRAPHS  # of another photograph, always
    path = retrieval_sheet(questions, elsewhere, right, PATCH, tmp_path / "retrieval.png")
    assert [file.name for file in tmp_path.iterdir()] == ["retrieval.png"]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    green, pink = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in ("#8fd14f", "#fe6f9c"))
    panels = slice(104, None)  # below the words, which have these colours too
    counts = {name: (np.abs(pixels[panels] - colour.astype(int)).max(-1) < 8).sum(1).nonzero()[0]
              for name, colour in (("green", green), ("pink", pink))}  # fmt: skip
    assert counts["pink"].size
    assert counts["green"].size
    assert counts["pink"].max() < counts["green"].min()  # before is wrong, and after, the row below, is right
