"""Random numbers as a function of place.

A number is a hash of (seed, index of the sample, name of the draw, place in it). Nothing is consumed, so a sample cannot depend on what was
drawn before it, on how samples are grouped into batches, or on which process asks; and whole batches are drawn with a few array operations.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).

    B samples   n numbers of one draw
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memarch.config import allowed, require

Array = NDArray[Any]

SPLITS = ("train", "val", "test")
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of SplitMix64's counter
SEED_BITS = 48


def split_seed(seed: int, split: str) -> int:
    """The seed of one split. The split sits above the bits of the seed, so no two (seed, split) share a list of samples; a plain
    seed is its own training split."""
    require(split in SPLITS, allowed("split", split, SPLITS))
    require(0 <= seed < 1 << SEED_BITS, f"seed = {seed}: must lie in 0 .. 2^{SEED_BITS} - 1; the bits above name the split.")
    return SPLITS.index(split) << SEED_BITS | seed


def split_of(seed: int) -> str:
    """Which split a seed belongs to: sources with held-out documents choose the documents by it."""
    require(0 <= seed < len(SPLITS) << SEED_BITS, f"seed = {seed}: not a seed; make it with split_seed(seed, split).")
    return SPLITS[seed >> SEED_BITS]


def mix(x: Array) -> Array:
    """Hash a uint64 array in place: every input bit changes every output bit with probability about one half; a bijection."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def words(*values: int) -> Array:
    return np.array([v & 0xFFFFFFFFFFFFFFFF for v in values], dtype=np.uint64)


class Draw:
    """The random numbers of some samples: every method returns [B, n], and rows never mix. Two draws of one name are the same numbers."""

    def __init__(self, seed: int, indices: Sequence[int] | Array):
        index = np.array(indices, dtype=np.uint64).reshape(-1)
        self.base = mix(mix(index + np.uint64(GOLDEN)) + mix(words(seed + 2 * GOLDEN)))

    def bits(self, name: str, n: int, rows: Array | slice = slice(None)) -> Array:
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        places = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(salt)
        return mix(self.base[rows, None] + places)

    def uniform(self, name: str, n: int) -> Array:
        """In the open interval (0, 1): a logarithm of it is finite."""
        return ((self.bits(name, n) >> np.uint64(11)) + 0.5) * 2.0**-53

    def integers(self, name: str, n: int, low: int, high: int, rows: Array | slice = slice(None)) -> Array:
        """In low .. high - 1. Multiply-shift on 32 bits: three times faster than a remainder, uneven by (high - low) / 2^32 at most."""
        spread = np.uint64(high - low)
        return ((self.bits(name, n, rows) >> np.uint64(32)) * spread >> np.uint64(32)).astype(np.int64) + low

    def distinct(self, name: str, n: int, low: int, high: int) -> Array:
        """n different numbers of low .. high - 1, in random order, all such lists equally likely.

        Few out of many: draw, then draw again whatever repeats an earlier one. Which entries are drawn again depends only on which are
        equal, never on which numbers they are, so no list is favoured. Many out of few: sort the whole range by random keys."""
        assert n <= high - low, f"{name}: {n} different numbers do not exist in {low} .. {high - 1}"
        if 4 * n > high - low:
            return np.argsort(self.bits(name, high - low), axis=1)[:, :n] + low
        drawn = self.integers(name, n, low, high)
        rows, attempt = np.arange(len(drawn)), 0
        while True:
            again = _repeats(drawn[rows])
            unfinished = again.any(axis=1)
            if not unfinished.any():
                return drawn
            rows, again, attempt = rows[unfinished], again[unfinished], attempt + 1
            drawn[rows] = np.where(again, self.integers(f"{name} again {attempt}", n, low, high, rows), drawn[rows])


def _repeats(x: Array) -> Array:
    """True where a number stood earlier in its row. Sorting number and place in one word is 30 times faster than a stable argsort."""
    n = x.shape[1]
    low = n.bit_length()
    ranked = np.sort(x << low | np.arange(n), axis=1)
    number, place = ranked >> low, ranked & ((1 << low) - 1)
    repeats = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(repeats, place[:, 1:], number[:, 1:] == number[:, :-1], axis=1)
    return repeats
