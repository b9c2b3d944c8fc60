"""Says in words when a run's probes look like collapse. The loss does not: it is low after a collapse too."""
from collections.abc import Mapping, Sequence

SHARE = 0.5  # RankMe below this share of its first value is low
IN_A_ROW = 3  # probes that have to be low
RISES = 1.05  # above the lowest of them by as much, it is on its way back
# Runs that end well dip early too and are back after about 900 updates. A shorter run is judged in its second half.
EARLY = 1000
RELATIVE_STD = 0.02  # between images, as a share of the features' root mean square: below it all images look alike
HELP = (
    "what usually helps: a lower optim.lr, a longer warm-up (optim.warmup_epochs), "
    "a slower EMA (optim.momentum nearer to 1)"
)


def collapse_warning(probes: Sequence[Mapping[str, float]], total_steps: int) -> str | None:
    """One sentence about the last of a run's `probes`, or None where nothing looks wrong.

    `probes`: all of the run so far, in order: `step`, `rankme` and, from newer logs, `relative_std` (`rank.spread`).
    Two things are alarming. Features that hardly differ between images, at two probes in a row. And a RankMe below half
    of its first value at three probes in a row, which does not rise and comes later than the dip that good runs show as
    well. What is said depends on the log alone, so a resumed run says the same.
    """
    if len(probes) < 2:
        return None
    start, last = probes[0], probes[-1]
    alike = [row.get("relative_std", 1.0) for row in probes[-2:]]
    if max(alike) < RELATIVE_STD:
        return (
            f"step {last['step']}: this looks like collapse: features differ between images by only "
            f"{alike[-1]:.2%} of their size; {HELP}"
        )
    recent = [row["rankme"] for row in probes[-IN_A_ROW:]]
    low = len(probes) > IN_A_ROW and max(recent) < SHARE * start["rankme"]
    if low and recent[-1] <= RISES * min(recent) and last["step"] > min(EARLY, total_steps // 2):
        return (
            f"step {last['step']}: this looks like collapse: RankMe has been below {SHARE:.0%} of its first "
            f"{start['rankme']:.1f} for {IN_A_ROW} probes and does not rise (now {recent[-1]:.1f}); {HELP}"
        )
    return None
