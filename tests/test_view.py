"""The contact sheet says what the masks say, read back from its pixels: crops are of one colour, so that it can be."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.config import MaskConfig
from ijepa_fast.data.sampler import GlobalBatchSampler
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.view import sheet as sheets
from ijepa_fast.view.__main__ import main
from ijepa_fast.view.masks import masks_sheet, masks_title

GRID, PATCH = 14, 8
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 80, 220], [230, 200, 30]], np.uint8)


def one_colour_crops(count):
    crops = np.empty((count, GRID * PATCH, GRID * PATCH, 3), np.uint8)
    crops[:] = COLOURS[np.arange(count) % len(COLOURS), None, None]
    return crops


def read_sheet(path, colours, columns):
    """Which patches each panel shows in the crop's colour: bool [rows, columns, GRID * GRID]."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    cell = sheets.PANEL // GRID
    centres = np.arange(GRID) * cell + cell // 2
    shown = np.empty((len(colours), columns, GRID * GRID), bool)
    for row, column in np.ndindex(shown.shape[:2]):
        top = sheets.HEADER + row * (cell * GRID + sheets.CAPTION + sheets.GAP) + centres
        left = sheets.MARGIN + column * (cell * GRID + sheets.GAP) + centres
        distance = np.abs(sheet[np.ix_(top, left)] - colours[row]).max(-1).ravel()
        assert ((distance < 8) | (distance > 40)).all()  # JPEG may be off by a little; what is hidden is off by much
        shown[row, column] = distance < 8
    return shown


def expected(masks, rows):
    """The same from the masks themselves, whose sequences are listed context by context."""
    parts = []
    for packed in masks[:2]:
        out = np.zeros((len(packed.image), GRID * GRID), bool)
        sequence = np.repeat(np.arange(len(out)), packed.cu_seqlens.diff().numpy())
        out[sequence, packed.indices.numpy()] = True
        parts.append(out)
    context, target = parts
    target = target.reshape(len(context), -1, GRID * GRID)
    return np.concatenate([np.ones_like(context)[:, None], context[:, None], target], axis=1)[:rows]


@pytest.mark.parametrize(
    ("rules", "rows", "as_tensor"),
    [
        ({}, 2, False),
        ({"num_contexts": 2, "views": 2, "sampler": "corrected", "num_targets": 7}, 6, True),
        ({"collate": "ragged", "num_targets": 1}, 99, False),
    ],
)
def test_sheet_shows_the_tokens_of_every_sequence(tmp_path, rules, rows, as_tensor):
    config, images = MaskConfig(group=4, **rules), one_colour_crops(4)
    masks = MultiBlockMasks(config, GRID, seed=1, global_batch=4).sample(0, 0, 4)
    out = tmp_path / "new" / "sheet.png"
    crops = torch.from_numpy(images) if as_tensor else images
    assert masks_sheet(crops, masks, PATCH, out, "title", rows=rows) == out
    rows = min(rows, len(masks.context.image))
    colours = images[masks.context.image.numpy()[:rows], 0, 0].astype(int)
    assert (read_sheet(out, colours, 2 + config.num_targets) == expected(masks, rows)).all()


def test_titles_name_sampler_and_collation():
    truncated = masks_title(MaskConfig(group=32), 7)
    assert truncated == "Masks of step 7: reference sampler, truncated within groups of 32"
    ragged = masks_title(MaskConfig(sampler="corrected", collate="ragged", max_keep=60), 0)
    assert ragged == "Masks of step 0: corrected sampler, ragged, contexts of 60 tokens at most"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """8 JPEGs of one colour each, and a config for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    for i in range(8):
        colour = tuple(COLOURS[i % len(COLOURS)].tolist())
        Image.new("RGB", (150, 130), colour).save(tmp_path / "photographs" / f"{i}.jpg", quality=95)
    (tmp_path / "run.yaml").write_text(
        f"model: {{patch_size: {PATCH}}}\nmask: {{group: 4}}\n"
        f"data: {{root: photographs, image_size: {GRID * PATCH}, decoder: pillow, threads: 1}}\n"
        "optim: {global_batch_size: 8, micro_batch: 8}\n"
    )
    return tmp_path


def test_masks_command_draws_what_the_run_sees(folder, capsys):
    arguments = ["masks", "mask.group=8", "--config", "run.yaml", "--step", "3", "mask.num_contexts=2", "--images", "3"]
    assert main([*arguments, "--out", "a/b.png"]) == 0
    assert capsys.readouterr().out == "a/b.png\n"
    masks = MultiBlockMasks(MaskConfig(group=8, num_contexts=2), GRID, seed=0, global_batch=8).sample(3, 0, 3)
    rows = (Image.open("a/b.png").height - sheets.HEADER) // (sheets.PANEL + sheets.CAPTION)
    assert rows == 6  # 3 images of 2 contexts
    drawn = GlobalBatchSampler(8, 8, seed=0).ids(3)[:3].repeat(2)
    assert (read_sheet("a/b.png", COLOURS[drawn % len(COLOURS)].astype(int), 6) == expected(masks, 6)).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "run.yaml", "mask.min_keep=60"], "mask.min_keep=60 cannot be met"),
        (["--config", "run.yaml", "data.root=nowhere"], "nowhere"),
        (["--config", "run.yaml", "optim.global_batch_size=16"], "8 images are fewer"),
        (["--config", "run.yaml", "--out", "run.yaml/masks.png"], "run.yaml/masks.png cannot be written"),
        (["--config", "run.yaml", "--images", "0"], "--images must be at least 1"),
        (["--config", "run.yaml", "--step", "-1"], "--step at least 0"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(folder, capsys, arguments, sentence):
    assert main(["masks", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["masks"], ["mask"], ["masks", "--config", "run.yaml", "--wide"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.long
def test_matplotlib_is_imported_late_and_without_pyplot(tmp_path):
    """Its import takes a second of a run's start, and pyplot's state is that of whoever else draws in the process."""
    code = (
        "import sys, numpy, ijepa_fast.view.masks as v\n"
        "from ijepa_fast.masks import *; from ijepa_fast.config import *\n"
        "assert 'matplotlib' not in sys.modules\n"
        "masks = MultiBlockMasks(MaskConfig(), 14, 0, 1).sample(0, 0, 1)\n"
        "v.masks_sheet(numpy.zeros((1, 112, 112, 3), 'uint8'), masks, 8, sys.argv[1], 'title')\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sheet.png")], check=True)
