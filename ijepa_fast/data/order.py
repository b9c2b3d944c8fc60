"""The order of an epoch, without a list of it: place p of epoch e holds image f(seed, e, p), in constant memory.

`full` is a keyed permutation of all images. `shards` is for storage that is slow at random places: it permutes blocks
of neighbours in the index, and shuffles within windows of some blocks, so that at any time few regions are read.
"""
import numpy as np

from ijepa_fast.counter_rng import mix

VERSION = 2  # of the orders below: part of a checkpoint's identity
BLOCK = 256  # neighbours in the index that stay together in `shards`
WINDOW = 64  # blocks that are shuffled into one another: 16,384 images from 64 regions
# First words of the random keys, so that order, crops and masks never share a stream.
_FULL, _BLOCKS, _WINDOW = 0x6F72, 0x6F62, 0x6F77
_ROUNDS = 12  # four suffice for large domains (Luby, Rackoff 1988); small ones have few bits in each half


class KeyedPermutation:
    """A pseudorandom bijection of 0 ... n-1, a different one for every key.

    A Feistel network over the bits of n-1, whose halves may differ by one, with the finaliser of SplitMix64 as its
    round function. A value beyond n-1 is sent through again until it falls inside: cycle walking (Black, Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002), here fewer than two passes on average.
    """

    def __init__(self, n: int, key: tuple[int, ...]):
        bits = max(2, (n - 1).bit_length())
        self.n, self._low, self._high = n, bits // 2, bits - bits // 2
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """int64 `[k]` of values in [0, n)."""
        y = self._once(np.asarray(x).astype(np.uint64))
        while len(outside := np.flatnonzero(y >= self.n)):
            y[outside] = self._once(y[outside])
        return y.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        low, high = np.uint64(self._low), np.uint64(self._high)
        left, right = x >> low, x & np.uint64((1 << self._low) - 1)
        for i, key in enumerate(self._keys):
            if i % 2:
                right = right ^ (mix(left ^ key) >> (np.uint64(64) - low))
            else:
                left = left ^ (mix(right ^ key) >> (np.uint64(64) - high))
        return (left << low) | right


class FullOrder:
    def __init__(self, images: int, seed: int):
        self.images, self.seed = images, seed

    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Image ids at `places` (int64 `[k]`) of an epoch."""
        return KeyedPermutation(self.images, (_FULL, self.seed, epoch))(places)


class ShardOrder:
    """Blocks of `BLOCK` neighbours (or one more) in a keyed order, and a keyed order within each `WINDOW` blocks."""

    def __init__(self, images: int, seed: int):
        self.images, self.seed = images, seed
        blocks = max(1, images // BLOCK)
        self._starts = np.arange(blocks + 1, dtype=np.int64) * images // blocks  # in the index
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Image ids at `places` (int64 `[k]`) of an epoch."""
        blocks, ends = self._blocks(epoch)
        starts = np.concatenate([[0], ends[:-1]])  # of the blocks, in the epoch
        bounds = np.append(starts[::WINDOW], self.images)
        windows = np.searchsorted(bounds, places, "right") - 1
        mixed = np.empty(len(places), np.int64)
        for window in np.unique(windows).tolist():
            here, first = windows == window, bounds[window]
            inside = KeyedPermutation(int(bounds[window + 1] - first), (_WINDOW, self.seed, epoch, window))
            mixed[here] = first + inside(places[here] - first)
        at = np.searchsorted(ends, mixed, "right")
        return self._starts[blocks[at]] + mixed - starts[at]

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the blocks, and where each ends in the epoch: a number for every 256 images."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = len(self._starts) - 1
            blocks = KeyedPermutation(count, (_BLOCKS, self.seed, epoch))(np.arange(count))
            self._epoch = epoch, blocks, np.cumsum(np.diff(self._starts)[blocks])
        return self._epoch[1:]
