"""Which samples make up which batch: arithmetic on (seed, step), never a shuffle that somebody must replay.

Step s is micro-batch number s of the run, counted over resumes (with gradient accumulation one optimiser step takes several). All processes
together see the same G rows at step s however many they are; rank r of W takes the r-th slice. Starting at step s costs nothing.
"""

import itertools
from collections.abc import Iterator
from math import isqrt

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from memarch.config import require
from memarch.data.batch import Batch, Source
from memarch.data.draw import GOLDEN, Array, mix, words

ROUNDS = 8


def permute(n: int, seed: int, epoch: int, place: Array) -> Array:
    """place -> row: for every (seed, epoch) a bijection of 0 .. n - 1, without a list of n numbers anywhere.

    A Feistel network on pairs (high, low) of an a x b grid that just covers n: each round adds a hash of one half to the other, which
    can be undone, so all rounds together are a bijection of the grid. What lands beyond n is sent round again until it falls inside."""
    width = isqrt(n - 1) + 1
    height = -(-n // width)
    counter = np.arange(epoch * ROUNDS, (epoch + 1) * ROUNDS, dtype=np.uint64) * np.uint64(GOLDEN)
    keys = mix(mix(words(seed + GOLDEN)) + counter)
    row: Array = np.array(place, dtype=np.uint64).reshape(-1)
    outside = np.ones(len(row), dtype=bool)
    while outside.any():
        row[outside] = _feistel(row[outside], np.uint64(width), np.uint64(height), keys)
        outside = row >= n
    return row.astype(np.int64)


def _feistel(x: Array, width: np.uint64, height: np.uint64, keys: Array) -> Array:
    high: Array = x // width
    low: Array = x % width
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        high = (high + mix(low + even) % height) % height
        low = (low + mix(high + odd) % width) % width
    return high * width + low


def share(size: int, rank: int, world: int) -> range:
    """The rows of a global batch that belong to one process."""
    require(size >= 1, f"batch size {size}: must be at least 1.")
    require(
        size % world == 0,
        f"batch size {size} does not divide by {world} processes. It counts the rows of all of them, so that a run means the same on any "
        f"number: take {(size // world or 1) * world} or {(size // world + 1) * world}, or another number of processes.",
    )
    each = size // world
    return range(rank * each, (rank + 1) * each)


class Steps(IterableDataset[Batch]):
    """Batches `start_step`, `start_step` + 1, ... of a source, one item per step, `steps` of them or without end.

    Give it to `DataLoader(steps, batch_size=None, num_workers=n)`. The loader asks its workers in turn, so worker w of n makes steps
    w, w + n, ... of those that remain and the order is that of no workers at all. Every pass starts at `start_step` again."""

    def __init__(self, source: Source, seed: int, batch_size: int, start_step: int = 0, rank: int = 0, world: int = 1, steps: int | None = None):
        require(start_step >= 0, f"start_step = {start_step}: counts the steps already taken, so it must be 0 or more.")
        self.source, self.seed, self.size = source, seed, batch_size
        self.mine = share(batch_size, rank, world)
        self.start_step, self.steps = start_step, steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step, at any time."""
        return self.source.step(self.seed, step, self.mine, self.size)

    def __iter__(self) -> Iterator[Batch]:
        start, worker = self.start_step, get_worker_info()
        remaining = itertools.count(start) if self.steps is None else range(start, start + self.steps)
        mine = itertools.islice(remaining, worker.id, None, worker.num_workers) if worker else remaining
        return map(self.__getitem__, mine)
