"""The recall generators and random facts: pure functions of (config, seed, index), solved by a program that knows the definition, distributed as defined."""

import random

import numpy as np
import pytest
import torch

from memarch.data import DATA, MQAR, SPLITS, Copy, Facts, Needle, SelectiveCopy, split_of, split_seed
from memarch.data.draw import Draw

RECALL = [  # the answer stands in the row
    MQAR(settings=((32, 4),), vocab_size=64),
    MQAR(settings=((32, 8),), vocab_size=40, filler="zero"),  # every slot is taken
    MQAR(settings=((128, 20),), vocab_size=8192, power=1.0),
    Copy(length=20, copies=5, vocab_size=6),
    Copy(length=12, copies=5),
    SelectiveCopy(length=40, copies=7),
    SelectiveCopy(length=12, copies=5),
    Needle(length=50),
    Needle(length=80, needles=5, value_len=3, depth=0.25),
    Needle(length=6, value_len=1, vocab_size=10, depth=1.0),
    Needle(length=60, needles=12, value_len=1, depth=0.0),
]
FACTS = [
    Facts(facts=4096, asked=32),
    Facts(facts=250, asked=7, vocab_size=19, world=5),  # rows end where passes do not
    Facts(facts=600, asked=10, key_length=3, vocab_size=10, sets=3, passes=2),
    Facts(facts=64, asked=5, key_length=1, vocab_size=64, sets=2),  # every key is taken
]
GENERATORS = [*RECALL, *FACTS]
each = pytest.mark.parametrize("source", GENERATORS, ids=[f"{g.kind}-{i}" for i, g in enumerate(GENERATORS)])
each_recall = pytest.mark.parametrize("source", RECALL, ids=[f"{g.kind}-{i}" for i, g in enumerate(RECALL)])
each_facts = pytest.mark.parametrize("source", FACTS, ids=range(len(FACTS)))


def same(a, b):
    """Equal batches, row for row."""
    assert a.meta.keys() == b.meta.keys()
    for x, y in [*zip(a[:4], b[:4], strict=True), *((a.meta[name], b.meta[name]) for name in a.meta)]:
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))


def rows_of(batch, rows):
    return type(batch)(*(x if x is None else x[rows] for x in batch[:4]), meta={name: x[rows] for name, x in batch.meta.items()})


# ------------------------------------------------------------------------------------------------ every generator


@each
def test_a_row_depends_on_its_index_alone(source):
    whole = source.batch(3, range(20))
    same(whole, source.batch(3, range(20)))
    same(rows_of(whole, torch.arange(7, 12)), source.batch(3, range(7, 12)))
    order = random.Random(0).sample(range(20), 20)
    same(rows_of(whole, torch.tensor(order)), source.batch(3, order))
    for i in (0, 13, 19):
        same(rows_of(whole, torch.tensor([i])), source.batch(3, [i]))
    same(source.batch(3, [5 * 10**11]), rows_of(source.batch(3, [5 * 10**11, 4]), torch.tensor([0])))


@each
def test_global_generators_are_neither_read_nor_moved(source):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    first = source.batch(1, range(4))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    same(first, source.batch(1, range(4)))


@each
def test_shapes_and_ranges(source):
    batch = source.batch(0, range(50))
    length = source.length
    assert batch.tokens.shape == batch.targets.shape == (50, length)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.starts is None
    assert batch.lengths is None
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < source.vocab_size
    scored = batch.targets != -100
    assert scored.any(dim=1).all()
    assert batch.targets[scored].min() >= 0
    assert batch.targets[scored].max() < source.vocab_size


@each_recall
def test_the_answer_stands_gap_tokens_back(source):
    batch = source.batch(5, range(50))
    scored = batch.targets != -100
    assert batch.meta["gap"].shape == batch.tokens.shape
    assert (batch.meta["gap"][scored] > 0).all()
    assert (batch.meta["gap"][~scored] == 0).all()
    assert source.rows(0) is None
    b, t = torch.nonzero(batch.targets != -100, as_tuple=True)
    assert torch.equal(batch.tokens[b, t - batch.meta["gap"][b, t]], batch.targets[b, t])


@each
def test_splits_and_seeds_share_no_samples(source):
    batches = [source.batch(split_seed(seed, split), range(200)) for seed in (0, 1) for split in SPLITS]
    assert not any(torch.equal(a.tokens, b.tokens) for i, a in enumerate(batches) for b in batches[:i])
    if source.vocab_size**source.length > 1e30 and isinstance(source, MQAR):
        rows = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
        assert len(set(rows)) == len(rows)


@each
def test_a_step_is_the_next_slice_of_samples(source):
    same(source.step(2, 3, range(4, 8), 16), source.batch(2, range(52, 56)))


def test_split_seeds_are_different_numbers():
    seeds = [split_seed(seed, split) for seed in (0, 1, 2, 2**48 - 1) for split in SPLITS]
    assert len(set(seeds)) == len(seeds)
    assert [split_of(seed) for seed in seeds] == list(SPLITS) * 4
    assert split_seed(7, "train") == 7
    with pytest.raises(ValueError, match=r"unknown split 'valid'.*Did you mean 'val'"):
        split_seed(0, "valid")
    for bad in (-1, 2**48):
        with pytest.raises(ValueError, match=r"must lie in 0"):
            split_seed(bad, "train")


GOLDEN = {
    "mqar": [[7, 12, 6, 10, 6, 5, 7, 13, 6, 5, 13, 12], [1, 12, 5, 15, 1, 3, 5, 14, 12, 0, 4, 8]],
    "copy": [[2, 6, 2, 14, 14, 14, 15, 14, 14, 14]],
    "selective_copy": [[14, 14, 14, 14, 2, 6, 14, 2, 15, 14, 14, 14]],
    "needle": [[0, 8, 21, 45, 53, 43, 62, 0, 10, 26, 1, 10]],
    "facts": [[14, 8, 9, 28, 31, 19, 5, 13]],
    "values": [[26, 0, 4, 29]],
}


def test_samples_of_a_seed_never_change():
    """Runs on record name their data by a seed: if this fails, published numbers no longer say what was run."""
    assert MQAR(settings=((12, 2),), vocab_size=16).batch(0, [0, 1]).tokens.tolist() == GOLDEN["mqar"]
    assert Copy(length=10, copies=3).batch(0, [0]).tokens.tolist() == GOLDEN["copy"]
    assert SelectiveCopy(length=12, copies=3).batch(0, [0]).tokens.tolist() == GOLDEN["selective_copy"]
    assert Needle(length=12, needles=2).batch(0, [0]).tokens.tolist() == GOLDEN["needle"]
    facts = Facts(facts=100, asked=4, vocab_size=32).batch(0, [0])
    assert facts.tokens.tolist() == GOLDEN["facts"]
    assert facts.targets[:, 1::2].tolist() == GOLDEN["values"]


def test_the_table_names_every_kind():
    assert {kind: cls.__dataclass_fields__["kind"].default for kind, cls in DATA.items()} == {kind: kind for kind in DATA}


# ------------------------------------------------------------------------------------------------ solvers


def solve(source, tokens):
    """The scored positions and their answers, from the tokens and the definition alone."""
    tokens, length = list(tokens), len(tokens)
    if isinstance(source, MQAR):
        pairs = source.settings[0][1]
        told = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        return lambda t: told[tokens[t]]
    if isinstance(source, Needle):
        ask = length - 1 - source.value_len
        assert tokens[ask] == 1
        key = tokens[ask + 1]
        (found,) = [t for t in range(ask) if tokens[t] == 0 and tokens[t + 1] == key]
        return lambda t: tokens[found + 2 + (t - ask - 1)]
    blank, marker = source.vocab_size - 2, source.vocab_size - 1
    data = [x for x in tokens[: tokens.index(marker)] if x != blank]
    assert len(data) == source.copies
    return lambda t: data[t - (length - source.copies)]


@each_recall
def test_a_solver_scores_every_sample(source):
    batch = source.batch(9, range(300))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        answer = solve(source, tokens)
        for t, target in enumerate(targets):
            assert target == -100 or answer(t) == target


def test_answers_of_other_samples_score_at_chance():
    batch = MQAR(settings=((64, 8),), vocab_size=256).batch(0, range(500))
    hits = [
        t == u
        for a, b in zip(batch.targets.tolist(), batch.targets.roll(1, 0).tolist(), strict=True)
        for t, u in zip([x for x in a if x >= 0], [x for x in b if x >= 0], strict=True)
    ]
    assert abs(np.mean(hits) - 1 / 128) < 0.006


# ------------------------------------------------------------------------------------------------ distributions


def chi_square(observed, expected):
    """Far above its degrees of freedom only if the distribution is another one: the bound is six standard deviations."""
    observed, expected = np.asarray(observed, float).ravel(), np.asarray(expected, float).ravel()
    assert expected.min() > 5
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("n", [2, 4])  # few out of many, many out of few
def test_distinct_is_uniform_over_ordered_lists(n):
    size, count = (9, 2) if n == 2 else (5, 4)
    lists = Draw(1, range(30000)).distinct("x", count, 0, size)
    assert all(len(set(row)) == count for row in lists[:2000].tolist())
    code = (lists * size ** np.arange(count)).sum(axis=1)
    _, observed = np.unique(code, return_counts=True)
    possible = np.prod(np.arange(size, size - count, -1))
    assert len(observed) == possible
    chi_square(observed, np.full(possible, 30000 / possible))


def test_draws_are_uniform_and_unrelated():
    draw = Draw(0, range(20000))
    chi_square(np.bincount(draw.integers("a", 1, 0, 37)[:, 0], minlength=37), np.full(37, 20000 / 37))
    u, v, w = draw.uniform("a", 2)[:, 0], draw.uniform("a", 2)[:, 1], Draw(1, range(20000)).uniform("a", 1)[:, 0]
    for x, y in ((u, v), (u, w), (u[1:], u[:-1]), (u, draw.uniform("b", 1)[:, 0])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03
    assert u.min() > 0
    assert u.max() < 1


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_mqar_slots_follow_the_power_law(power):
    """First and second drawn slot against their exact probabilities."""
    rows, pairs, length = 40000, 3, 32
    batch = MQAR(settings=((length, pairs),), vocab_size=64, power=power, filler="zero").batch(2, range(rows))
    slots = (length - 2 * pairs) // 2
    p = np.arange(1, slots + 1) ** (power - 1)
    p /= p.sum()
    asked = np.array([[row.index(row[2 * j], 2 * pairs) for j in range(2)] for row in batch.tokens.tolist()])
    drawn = (asked - 2 * pairs) // 2
    chi_square(np.bincount(drawn[:, 0], minlength=slots), rows * p)
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(slots) if j != i) for i in range(slots)])
    chi_square(np.bincount(drawn[:, 1], minlength=slots), rows * second)


def test_mqar_keys_values_and_places():
    length, pairs, vocab = 64, 8, 256
    batch = MQAR(settings=((length, pairs),), vocab_size=vocab).batch(0, range(500))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(range(1, vocab // 2))
        assert set(values) <= set(range(vocab // 2, vocab))
        asked = [t for t, target in enumerate(targets) if target >= 0]
        assert sorted(tokens[t] for t in asked) == sorted(keys)
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)
    assert set(batch.meta["pairs"].tolist()) == {pairs}


def test_mqar_with_every_slot_taken():
    batch = MQAR(settings=((32, 8),), vocab_size=40, filler="zero").batch(0, range(100))
    assert (batch.targets[:, 16::2] != -100).all()
    assert (batch.tokens[:, 17::2] == 0).all()


def test_mqar_filler():
    zero = MQAR(vocab_size=256, filler="zero").batch(0, range(200))
    noise = MQAR(vocab_size=256, filler="random").batch(0, range(2000))
    assert torch.equal(zero.targets, noise.targets[:200])  # the filler changes nothing else
    free = noise.targets[:, 16:] == -100
    assert (zero.tokens[:, 16:][free[:200]] == 0).all()
    seen = noise.tokens[:, 16:][free]
    chi_square(torch.bincount(seen, minlength=256).numpy(), np.full(256, len(seen) / 256))


def test_mqar_mixture_takes_one_setting_per_step():
    mix = MQAR(settings=((32, 2), (64, 4), (64, 8), (64, 8)), vocab_size=128)
    shapes = []
    for cycle in range(25):
        seen = []
        for step in range(4 * cycle, 4 * cycle + 4):
            halves = [mix.step(0, step, rows, 8) for rows in (range(4), range(4, 8))]
            assert len({tuple(half.tokens.shape) for half in halves}) == 1
            seen.append((halves[0].tokens.shape[1], halves[0].meta["pairs"][0].item()))
        assert sorted(seen) == sorted(mix.settings)
        shapes.append(tuple(seen))
    assert len(set(shapes)) > 5  # another order every time
    assert mix.at(0, 5) == mix.at(0, 5)
    assert [part.settings for part in mix.parts()] == [(setting,) for setting in mix.settings]
    assert mix.length == 64
    with pytest.raises(ValueError, match=r"use one of \.parts\(\), or \.step"):
        mix.batch(0, range(4))


def test_selective_copy_spreads_blanks_as_published():
    n, length = 4, 30
    tokens = SelectiveCopy(length=length, copies=n).batch(0, range(20000)).tokens.numpy()
    blanks = length - 2 * n - 1
    assert (tokens[:, length - n - 2] < 14).all()  # the last data token stands right before the marker
    leading = (np.cumsum(tokens[:, : length - n - 1] != 14, axis=1) == 0).sum(axis=1)  # blanks in the first gap: binomial(blanks, 1/n)
    assert abs(leading.mean() - blanks / n) < 0.05
    assert abs(leading.var() - blanks * (1 / n) * (1 - 1 / n)) < 0.15


def test_needle_depth():
    n = Needle(length=101, needles=3, value_len=2)
    batch = n.batch(0, range(20000))
    place, depth = batch.meta["place"], batch.meta["depth"]
    assert (batch.tokens.gather(1, place[:, None]) == 0).all()
    assert torch.equal((batch.tokens == 0).sum(1), torch.full((20000,), 3))
    assert torch.equal((batch.tokens == 1).sum(1), torch.full((20000,), 1))
    chi_square(torch.bincount((depth * n.filler).round().long(), minlength=n.filler + 1).numpy(), np.full(n.filler + 1, 20000 / (n.filler + 1)))
    for fixed in (0.0, 0.5, 1.0):
        some = Needle(length=101, needles=1, depth=fixed).batch(0, range(50))
        assert set(some.meta["place"].tolist()) == {round(fixed * 96)}
        assert some.meta["depth"].sub(fixed).abs().max() < 0.01


def test_needle_filler_holds_no_key_and_no_value():
    n = Needle(length=90, needles=4, value_len=2)
    for row in n.batch(1, range(200)).tokens.tolist():
        assert sum(t < 2 + 2 * n.keys for t in row) == 4 * 4 + 3  # the needles and the question, nothing else


# ------------------------------------------------------------------------------------------------ facts


def questions(source, seed, count):
    """The first questions of a seed, in order: keys [count, key_length], values and numbers of facts [count]."""
    batch = source.batch(seed, range(-(-count // source.asked)))
    keys = batch.tokens.reshape(-1, source.key_length)[:count]
    values = batch.targets[:, source.key_length - 1 :: source.key_length].flatten()[:count]
    assert (batch.targets != -100).sum() == batch.meta["fact"].numel()
    return [tuple(key) for key in keys.tolist()], values.tolist(), batch.meta["fact"].flatten()[:count].tolist()


@each_facts
@pytest.mark.parametrize("split", SPLITS)
def test_a_key_has_one_value_whoever_asks(source, split):
    """What was learned from one seed answers every other: keys never collide, and the world is the same."""
    known = {}
    for seed in (split_seed(0, "train"), split_seed(3, split)):
        for key, value, fact in zip(*questions(source, seed, 2 * source.sets * source.facts), strict=True):
            assert known.setdefault(key, (value, fact)) == (value, fact)
    assert len(known) == source.facts
    assert sorted(fact for _, fact in known.values()) == list(range(source.facts))


@each_facts
def test_a_pass_asks_every_fact_once_and_the_next_in_another_order(source):
    _, _, facts = questions(source, split_seed(1, "val"), 3 * source.facts)
    passes = [facts[i * source.facts : (i + 1) * source.facts] for i in range(3)]
    assert all(sorted(one) == list(range(source.facts)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert questions(source, split_seed(2, "val"), source.facts)[2] != passes[0]
    assert source.rows(split_seed(1, "val")) == source.facts // source.asked


def test_stages_follow_one_another_in_training_alone():
    source = Facts(facts=600, asked=10, key_length=3, vocab_size=10, sets=3, passes=2)
    stage = source.passes * source.facts // (source.sets * source.asked)  # rows
    for number, first in ((0, 0), (1, stage), (2, 2 * stage), (2, 50 * stage)):
        asked = source.batch(0, range(first, first + stage)).meta["fact"].flatten().tolist()
        assert sorted(asked) == sorted(2 * list(range(200 * number, 200 * number + 200)))
    mixed = Facts(facts=600, asked=10, key_length=3, vocab_size=10, sets=3)
    for split in ("val", "test"):
        same(source.batch(split_seed(0, split), range(60)), mixed.batch(split_seed(0, split), range(60)))
    assert set(mixed.batch(0, range(5)).meta["fact"].flatten().div(200, rounding_mode="floor").tolist()) == {0, 1, 2}


def test_worlds_are_random_and_unrelated():
    """Values are uniform and say nothing about their key; another world has other keys and values for the same facts."""
    numbers = np.arange(20000)
    (keys, values), (others, different) = (Facts(world=world).tell(numbers) for world in (0, 1))
    for x in (values, keys[:, 0], keys[:, 1]):
        chi_square(np.bincount(x, minlength=256), np.full(256, 20000 / 256))
    for x, y in ((keys[:, 0], values), (keys[:, 1], values), (keys[:, 0], keys[:, 1]), (values[1:], values[:-1]), (values, different), (keys, others)):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.03
    codes = keys @ [256, 1]
    assert (Facts(world=0).order(0, numbers) != codes).mean() > 0.99  # the world's hash is not the one that orders questions
    few = Facts(facts=16).tell(np.arange(16))
    assert all((a == b[:16]).all() for a, b in zip(few, (keys, values), strict=True))  # more facts are a larger part of the same world


# ------------------------------------------------------------------------------------------------ errors that teach

BAD = [
    (lambda: MQAR(settings=()), r"settings is empty"),
    (lambda: MQAR(vocab_size=255), r"vocab_size = 255: must be even"),
    (lambda: MQAR(settings=((63, 2),)), r"\(63, 2\): length must be even"),
    (lambda: MQAR(settings=((64, 17),)), r"needs 1 <= pairs <= length / 4 = 16"),
    (lambda: MQAR(settings=((64, 0),)), r"needs 1 <= pairs"),
    (lambda: MQAR(settings=((256, 40),), vocab_size=64), r"vocab_size 64 has 31 distinct keys: raise vocab_size"),
    (lambda: MQAR(power=0.0), r"power = 0\.0: must be above 0"),
    (lambda: MQAR(filler="none"), r"must be 'random' or 'zero'"),
    (lambda: Copy(copies=0), r"copy: copies = 0"),
    (lambda: Copy(length=33), r"copy: length = 33: .* need at least 34"),
    (lambda: SelectiveCopy(vocab_size=3), r"selective_copy: vocab_size = 3: must be at least 4"),
    (lambda: Needle(length=4), r"needles and question need at least 6"),
    (lambda: Needle(needles=0), r"needles = 0"),
    (lambda: Needle(needles=20), r"raise vocab_size to 82 or more"),
    (lambda: Needle(value_len=0), r"value_len = 0"),
    (lambda: Needle(depth=1.5), r"depth = 1\.5: must lie in 0 \.\. 1"),
    (lambda: Needle(vocab_size=9), r"vocab_size = 9: must be at least 10"),
    (lambda: Facts(facts=0), r"facts = 0: must be at least 1"),
    (lambda: Facts(asked=0), r"asked = 0: must be at least 1"),
    (lambda: Facts(vocab_size=1, facts=1), r"vocab_size = 1: must be at least 2"),
    (lambda: Facts(facts=65537), r"facts = 65537: vocab_size 256 and key_length 2 make 65536 distinct keys: raise one of them"),
    (lambda: Facts(key_length=8), r"256\^8 keys are too many to number; take a shorter key"),
    (lambda: Facts(sets=3), r"sets = 3: .* must divide facts = 65536"),
    (lambda: Facts(sets=2, passes=0), r"passes = 0: must be at least 1, or null"),
    (lambda: Facts(passes=5), r"there is one set: set sets: 2"),
    (lambda: Facts(world=-1), r"world = -1: must lie in 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_a_bad_config_says_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
