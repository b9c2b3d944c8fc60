"""Whether a folder of images holds the splits of a set, train beside val or test, of which a run wants one."""
import os
from pathlib import Path

from ijepa_fast.errors import UserError

NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_DEEP, _WIDE = 4, 20  # levels looked at, and sub-folders of one: more are classes


def check_one_split(root: Path) -> None:
    """Raise UserError where two folders with names of splits stand side by side in `root` or not far below it.

    A folder with more than 20 others is one of classes, and not looked into. What cannot be listed is left to whoever
    indexes it.
    """
    level = [root]
    for _ in range(_DEEP):
        below: list[Path] = []
        for folder in level:
            inner = _folders(folder)
            splits = [path for path in inner if path.name.lower() in NAMES]
            if len(splits) > 1:
                names = ", ".join(path.name for path in splits)
                where = "" if folder == root else f" in {folder}"
                # The larger part is trained on, whatever the order of the letters.
                wanted = next((path for path in splits if path.name.lower().startswith("train")), splits[0])
                raise UserError(f"data.root={root} holds splits of a set{where}: {names}; name one: data.root={wanted}")
            below += inner if len(inner) <= _WIDE else []
        level = below[: _WIDE * _WIDE]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
