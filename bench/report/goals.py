"""The goals of the project, checked against a record. A goal whose row has no figure is "not measured"."""
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound on one number of one row. `field` leads to it: "ours_is.median" is row["ours_is"]["median"]."""

    what: str
    device: str  # "cpu" or "cuda"
    row: tuple[str, str, str]  # op, case, provider
    field: str
    at_least: float | None = None
    at_most: float | None = None

    def line(self, rows: list[Row], earlier: list[Row]) -> tuple[str, str, str, str]:
        """What, wanted, measured (in `earlier` rows where these do not have it), whether met."""
        value, bound = self.value(rows), self.at_least if self.at_most is None else self.at_most
        since = ""
        if value is None:
            value, since = self.value(earlier), " (earlier)"
        wanted = f"{'at least' if self.at_most is None else 'at most'} {bound:g}"
        if value is None:
            return self.what, wanted, "", "not measured"
        met = value >= bound if self.at_most is None else value <= bound
        return self.what, wanted, f"{value:.3g}{since}", "yes" if met else "**no**"

    def value(self, rows: list[Row]) -> float | None:
        found: Any = next((r for r in rows if (r["op"], r["case"], r["provider"]) == self.row), {})
        for name in self.field.split("."):
            found = found.get(name, {})
        return found if found != {} else None


FASTER, SHARE = "ours_is.median", "share"
CPU_STEP, GPU_STEP = "step, times as fast as", "step at batch 128, times as fast as"
GOALS = (
    Goal(f"S/16 {CPU_STEP} straight", "cpu", ("step", "S16-truncate", "straight"), FASTER, 1.25),
    Goal(f"B/16 {CPU_STEP} straight", "cpu", ("step", "B16-truncate", "straight"), FASTER, 1.1),
    Goal(f"S/16 {CPU_STEP} tuned", "cpu", ("step", "S16-truncate", "tuned"), FASTER, 1.0),
    Goal(f"B/16 {CPU_STEP} tuned", "cpu", ("step", "B16-truncate", "tuned"), FASTER, 1.0),
    Goal("masks, times as fast as an image at a time", "cpu", ("masks", "reference-truncate", "loop"), FASTER, 50),
    Goal("masks, times as fast as released", "cpu", ("masks", "reference-truncate", "released"), FASTER, 50),
    Goal("order and boxes, us an image", "cpu", ("order_and_boxes", "in22k", "ours"), "note.us/image", at_most=20),
    Goal("order, boxes, masks, us an image", "cpu", ("order_and_boxes", "in22k", "with_masks"), "note.us/image",
         at_most=30),
    Goal("batches of JPEGs, times as fast as workers", "cpu", ("loader", "500x375", "workers"), FASTER, 1.5),
    Goal("batches of JPEGs, times as fast as released", "cpu", ("loader", "500x375", "released"), FASTER, 2.5),
    Goal(f"H/14 {GPU_STEP} straight", "cuda", ("step", "H14-truncate", "straight"), FASTER, 1.5),
    Goal(f"H/14 {GPU_STEP} released", "cuda", ("step", "H14-truncate", "released"), FASTER, 1.5),
    Goal(f"H/14 {GPU_STEP} tuned", "cuda", ("step", "H14-truncate", "tuned"), FASTER, 1.1),
    Goal("H/14 step, MFU", "cuda", ("step", "H14-truncate", "ours"), SHARE, 0.55),
    Goal("B/16 step, times as fast as straight", "cuda", ("step", "B16-truncate", "straight"), FASTER, 3),
    Goal("g/16 step, MFU", "cuda", ("step", "g16-truncate", "ours"), SHARE, 0.5),
    Goal("H/14 peak memory over tuned's", "cuda", ("memory", "H14-truncate", "tuned"), "ours_peak", at_most=1.0),
    Goal("H/14 data wait, % of the step", "cuda", ("step_with_loader", "H14", "ours"), "note.% of the step", at_most=1),
    *(
        Goal(f"{op} at {model}, of a copy's speed", "cuda", (op, model, "ours"), SHARE, 0.9)
        for op in ("ema", "gather", "loss")
        for model in ("B16", "L16", "H14", "g16")
    ),
    Goal("ema at H14, times as fast as foreach lerp", "cuda", ("ema", "H14", "foreach_lerp"), FASTER, 1.0),
    Goal("loss at H14, times as fast as eager", "cuda", ("loss", "H14", "eager"), FASTER, 4),
    Goal("patches at H14, times as fast as eager", "cuda", ("gather_patches", "H14-truncate", "eager"), FASTER, 3),
    *(
        Goal(
            f"attention at {case}, times as fast as torch's",
            "cuda",
            ("attention", f"{case}-ragged", "torch_varlen"),
            FASTER,
            1.2,
        )
        for case in ("predictor24", "context80", "context88")
    ),
)


def goal_lines(rows: list[Row], earlier: list[Row], device: str) -> list[tuple[str, str, str, str]]:
    return [goal.line(rows, earlier) for goal in GOALS if goal.device == device]
