"""Splits are known by their usual names at the levels where they stand; classes are not taken for splits."""
import pytest

from ijepa_fast.errors import UserError
from ijepa_fast.splits import check_one_split


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["train", "val"], "train"),
        (["train", "test"], "train"),
        (["Train", "Val", "classes"], "Train"),
        (["training", "validation"], "training"),
        (["test", "val"], "test"),
        (["ILSVRC/Data/CLS-LOC/test", "ILSVRC/Data/CLS-LOC/train", "ILSVRC/Annotations"], "ILSVRC/Data/CLS-LOC/train"),
    ],
)
def test_splits_side_by_side(folders, wanted, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        check_one_split(tmp_path)
    assert str(caught.value).endswith(f"; name one: data.root={tmp_path / wanted}")
    check_one_split(tmp_path / wanted)


@pytest.mark.parametrize("folders", [["train"], ["train", "boat", "bus"], ["a", "b"], [".train", ".val"], []])
def test_no_splits(folders, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
    check_one_split(tmp_path)


def test_a_folder_of_many_classes_is_not_looked_into(tmp_path):
    for number in range(30):
        (tmp_path / f"class_{number}" / "train").mkdir(parents=True)
        (tmp_path / f"class_{number}" / "test").mkdir()
    check_one_split(tmp_path)
    check_one_split(tmp_path / "missing")
