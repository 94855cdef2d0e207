"""Which samples a step gets: the same whatever the number of processes and workers, and wherever a run starts."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from memarch.data import MQAR, Copy, Steps, share, split_seed
from memarch.data.order import permute

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MIX = MQAR(settings=((16, 2), (24, 4), (32, 8)), vocab_size=40)


def take(steps, n, workers=0):
    loader = DataLoader(steps, batch_size=None, num_workers=workers, generator=torch.Generator())
    return list(itertools.islice(loader, n))


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_a_bijection(n):
    for seed, epoch in ((0, 0), (1, 0), (0, 1)):
        assert sorted(permute(n, seed, epoch, np.arange(n)).tolist()) == list(range(n))


def test_permutation_is_random_access_and_huge():
    n = 10**12 + 7
    place = np.array([0, 5, n - 1, 12345678901])
    rows = permute(n, 3, 2, place)
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < n
    assert permute(n, 3, 2, place[2:3])[0] == rows[2]


def test_permutation_changes_with_seed_and_epoch():
    orders = [tuple(permute(50, seed, epoch, np.arange(50)).tolist()) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_all_about_as_likely(n):
    orders = [tuple(permute(n, 0, epoch, np.arange(n)).tolist()) for epoch in range(2400)]
    _, counts = np.unique([hash(order) for order in orders], return_counts=True)
    expected = 2400 / np.prod(np.arange(1, n + 1))
    assert len(counts) == np.prod(np.arange(1, n + 1))
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_permutation_leaves_no_trace_of_order():
    n = 20000
    rows = permute(n, 0, 0, np.arange(n))
    assert abs(np.corrcoef(rows, np.arange(n))[0, 1]) < 0.03
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.03
    assert abs((rows == np.arange(n)).sum() - 1) < 7


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(workers):
    want = take(Steps(MIX, 5, 6), 7)
    assert equal(take(Steps(MIX, 5, 6), 7, workers), want)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_finite_pass_ends_and_repeats_itself(workers):
    steps = Steps(MIX, 5, 6, steps=5)
    first = take(steps, 100, workers)
    assert len(first) == 5
    assert equal(first, take(steps, 100))
    assert equal(first, take(Steps(MIX, 5, 6), 5))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_same_global_batches(world):
    want = take(Steps(MIX, 5, 6), 5)
    parts = [take(Steps(MIX, 5, 6, rank=rank, world=world), 5) for rank in range(world)]
    together = [type(batch)(*(torch.cat([part[s][i] for part in parts]) for i in (0, 1))) for s, batch in enumerate(want)]
    assert equal(together, want)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_skipping_to_it(workers):
    whole = take(Steps(MIX, 5, 6), 9)
    assert equal(take(Steps(MIX, 5, 6, start_step=4), 5, workers), whole[4:])
    assert equal([Steps(MIX, 5, 6)[7]], whole[7:8])
    assert len(take(Steps(MIX, 5, 6, start_step=10**12), 1)) == 1  # nothing is replayed on the way


def test_no_sample_is_seen_twice():
    seen = [tuple(row) for batch in take(Steps(Copy(length=60, copies=20), split_seed(0, "train"), 8), 50) for row in batch.tokens.tolist()]
    assert len(set(seen)) == len(seen)


def test_steps_travel_to_a_worker_as_a_few_numbers():
    assert len(pickle.dumps(Steps(MIX, 5, 6))) < 2000


def test_shares():
    assert [list(share(6, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"batch size 6 does not divide by 4 processes.*take 4 or 8"):
        share(6, 0, 4)
    with pytest.raises(ValueError, match=r"batch size 2 does not divide by 4 processes.*take 4 or 4"):
        share(2, 0, 4)
    with pytest.raises(ValueError, match=r"batch size 0: must be at least 1"):
        share(0, 0, 1)
    with pytest.raises(ValueError, match=r"start_step = -1"):
        Steps(MIX, 0, 4, start_step=-1)
