"""Parts of an index: by number, class and list."""
import numpy as np
import odd_images
import pytest
from test_index_containers import JPEG, labels, write_tar

from ijepa_fast.config import DataConfig
from ijepa_fast.data.index import build_index
from ijepa_fast.data.subset import select
from ijepa_fast.errors import UserError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("subset") / "r"
    for label in "abc":
        (root / label).mkdir(parents=True)
        for n in range(4):
            (root / label / f"{n}.jpg").write_bytes(JPEG)
    write_tar(root / "d.tar", {"x.jpg": JPEG, "y.jpg": JPEG})
    return build_index(root, cache_dir=root.parent / "cache")


def part(index, tmp_path, text=None, **options):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
        options["list"] = tmp_path / "list.txt"
    return select(index, DataConfig(root=index.root, **options))


def names(index):
    return [index.path(i).removeprefix(index.root + "/") for i in range(len(index))]


def test_nothing_asked_for_is_the_index_itself(index, tmp_path):
    assert part(index, tmp_path) is index
    assert part(index, tmp_path, limit=100) is index


def test_a_limit_is_spread_evenly(index, tmp_path):
    some = part(index, tmp_path, limit=7)
    assert labels(some) == ["a", "a", "b", "b", "c", "c", "d"]
    assert some.fingerprint() != index.fingerprint()
    assert some.fingerprint() != part(index, tmp_path, classes=["a", "b"], limit=7).fingerprint()


def test_classes_are_numbered_anew(index, tmp_path):
    some = part(index, tmp_path, classes=["d", "b"])
    assert some.class_names == ("b", "d")
    assert some.records["label"].tolist() == [0, 0, 0, 0, 1, 1]
    assert labels(index).count("c") == 4  # the whole one is as it was
    with pytest.raises(UserError, match=r"data\.classes names 'e', and .* has 4 other classes"):
        part(index, tmp_path, classes=["e"])


def test_a_list_names_files_members_and_whole_tars(index, tmp_path):
    assert names(part(index, tmp_path, f"c/1.jpg\n\n{index.root}/a/0.jpg\nd.tar: y.jpg\n")) == [
        "a/0.jpg", "c/1.jpg", "d.tar: y.jpg"]  # fmt: skip
    assert names(part(index, tmp_path, "d.tar\n")) == ["d.tar: x.jpg", "d.tar: y.jpg"]
    for line in ("a/9.jpg", "d.tar: z.jpg", "e.tar"):
        with pytest.raises(UserError, match=f"line 2: .* holds no image {line}"):
            part(index, tmp_path, f"a/0.jpg\n{line}\n")
    with pytest.raises(UserError, match="names no image"):
        part(index, tmp_path, "\n")


def test_a_list_may_give_labels(index, tmp_path):
    some = part(index, tmp_path, "path,label\na/0.jpg,dog\nb/1.jpg,cat\nc/2.jpg\n")
    assert labels(some) == ["dog", "cat", None]
    assert some.class_names == ("cat", "dog")
    assert part(index, tmp_path, "a/0.jpg,10\nb/1.jpg, 9").records["label"].tolist() == [10, 9]
    assert np.array_equal(some.records["width"], [odd_images.WIDTH] * 3)
