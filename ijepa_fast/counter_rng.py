"""Random numbers that are a function of (key, counter): no state to save, no order to keep.

The stream of a key is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
which has random access: its n-th output depends on n alone. So the masks of position 1017 of step 52,000 are drawn
without drawing what comes before, by any rank, thread or resumed run.
"""
import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def uniforms(key: tuple[int, ...], counters: np.ndarray, draws: int) -> np.ndarray:
    """Uniform doubles in [0, 1), float64 `[len(counters), draws]`.

    `key` is a tuple of non-negative integers, for instance (purpose, seed, step); numpy's seeding does not see zeros at
    its end, so the keys of one purpose must have one length. Row i depends on `key` and `counters[i]` only, and draw j
    of it also only on j as long as `draws` is unchanged.
    """
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)
    counters = np.asarray(counters).astype(np.uint64)
    n = counters[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    return (mix(start + n * _GAMMA) >> np.uint64(11)) * 2.0**-53


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every bit of `z` has a part in every bit."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
