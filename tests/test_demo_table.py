"""The table that ends the demo: from which photograph is a crop? Bank and queries are halves that share no pixel."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ijepa_fast.config import DataConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.pipeline import ImageSource
from ijepa_fast.demo import CROPS, crop_knn

CPU = torch.device("cpu")


class MeanColour(nn.Module):
    """An encoder of one "patch": the mean colour, centred so that cosines tell hues apart."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2))[:, None] - 127.5


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 1, 3)


@pytest.fixture
def source():
    """The images of a folder, in 16 x 16 pixels."""
    opened = []

    def open_images(root):
        data = DataConfig(root=root, image_size=16, threads=1, decoder="pillow")
        opened.append(ImageSource(build_index(root, threads=1), data))
        return opened[-1]

    yield open_images
    for images in opened:
        images.close()


def save(pixels: np.ndarray, path) -> None:
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (33, 33)])  # height, width
def test_bank_and_query_crops_share_no_pixel(shape, source, tmp_path):
    """Each half of each photograph has a colour of its own; one pixel of the other half would tint a crop."""
    height, width = shape
    colours = np.random.default_rng(0).integers(0, 256, (3, 2, 3), dtype=np.uint8)
    for n, (first, second) in enumerate(colours):
        pixels = np.empty((*shape, 3), np.uint8)
        if width >= height:
            pixels[:, : width // 2], pixels[:, width // 2 :] = first, second
        else:
            pixels[: height // 2], pixels[height // 2 :] = first, second
        save(pixels, tmp_path / f"{n}.png")
    images = source(tmp_path)
    seen = []

    class Watch(MeanColour):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    crop_knn({"watch": Watch()}, images, most=3, device=CPU)
    crops = torch.cat(seen).view(2, 3, CROPS, 16, 16, 3).numpy()  # half, photograph, crop
    for half in (0, 1):
        for n in range(3):
            assert (crops[half, n] == colours[n, half]).all()


def test_crops_differ_among_themselves_and_between_halves(source, tmp_path):
    """In a ramp of brightness a crop's mean tells where it lies."""
    ramp = np.linspace(0, 255, 400)[None, :, None] * np.ones((100, 1, 3))
    save(ramp.astype(np.uint8), tmp_path / "0.png")
    save(ramp[:, ::-1].astype(np.uint8), tmp_path / "1.png")
    images = source(tmp_path)
    seen = []

    class Watch(MeanColour):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    crop_knn({"watch": Watch()}, images, most=2, device=CPU)
    means = torch.cat(seen).float().mean(dim=(1, 2, 3)).view(2, 2, CROPS)
    for half in means.flatten(0, 1):
        assert len(half.unique()) > CROPS * 3 // 4  # two crops may share a mean
    # The first photograph is dark on its left half, where its bank lies; the second is its mirror image.
    assert (means[0, 0] < 128).all()
    assert (means[1, 0] > 127).all()
    assert (means[0, 1] > 127).all()


def test_crop_knn_of_photographs_anyone_can_tell_apart(source, tmp_path):
    for n, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]):
        save(np.full((50, 80, 3), colour, np.uint8), tmp_path / f"{n}.png")
    images = source(tmp_path)
    encoders = {"sees colour": MeanColour(), "sees nothing": Constant()}
    accuracy, photographs = crop_knn(encoders, images, most=5, device=CPU)
    assert photographs == 5
    assert list(accuracy) == ["chance", "mean colour", "sees colour", "sees nothing"]
    assert accuracy["chance"] == 0.2
    assert accuracy["mean colour"] == accuracy["sees colour"] == 1
    assert accuracy["sees nothing"] == pytest.approx(0.2)  # a mean in fp32


def test_crop_knn_takes_some_of_many(source, photographs):
    images = source(photographs)
    accuracy, number = crop_knn({}, images, most=7, device=CPU)
    assert number == 7
    assert accuracy["chance"] == 1 / 7
