"""Pictures: `masks` and `curves` of a run. The command is `python -m ijepa_fast.view`, see `__main__`."""
from ijepa_fast.view.curves import draw_curves
from ijepa_fast.view.masks import masks_sheet, masks_title

__all__ = ["draw_curves", "masks_sheet", "masks_title"]
