"""Whether a folder of images holds the splits of a set, train beside val or test, of which a run wants one."""
import os
from pathlib import Path

from ijepa_fast.data.storage import storage
from ijepa_fast.errors import UserError

NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_DEEP, _WIDE = 4, 20  # levels looked at, and sub-folders of one: more are classes


def check_one_split(root: Path | str) -> None:
    """Raise UserError where two folders with names of splits stand side by side in `root` or not far below it.

    A folder with more than 20 others is one of classes, and not looked into. What cannot be listed is left to whoever
    indexes it.
    """
    files, level = storage(str(root)), [""]  # folders relative to the root
    for _ in range(_DEEP):
        below: list[str] = []
        for folder in level:
            inner = [name for name in files.folders(folder) if not name.startswith(".")]
            splits = [name for name in inner if name.lower() in NAMES]
            if len(splits) > 1:
                names = ", ".join(splits)
                where = f" in {os.path.join(root, folder)}" if folder else ""
                # The larger part is trained on, whatever the order of the letters.
                wanted = next((name for name in splits if name.lower().startswith("train")), splits[0])
                wanted = os.path.join(root, folder, wanted)
                raise UserError(f"data.root={root} holds splits of a set{where}: {names}; name one: data.root={wanted}")
            below += [os.path.join(folder, name) for name in inner] if len(inner) <= _WIDE else []
        level = below[: _WIDE * _WIDE]
