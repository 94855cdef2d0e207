"""Facts in weights: how many of a world of random facts a model has remembered, set by set.

stored  n (accuracy - 1/V) / (1 - 1/V)       the facts known, without those that were guessed
bits    n (log2 V - cross entropy in bits)   what the model's probabilities say about the values, beyond that there are V of them

n facts of the set   V vocab_size            both are 0 where chance would do better
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from memarch.config import require
from memarch.data import Facts, split_seed
from memarch.data.draw import Array
from memarch.evaluation.stream import score
from memarch.evaluation.table import Advance, Row, Table, estimate

TOKENS = 2**15  # of one batch, unless a batch size is asked for


@dataclass(frozen=True, kw_only=True)
class FactsTask:
    kind: Literal["facts"] = "facts"
    facts: int = 65536
    asked: int = 128  # in one row
    key_length: int = 2
    world: int = 0
    sets: int = 1
    questions: int | None = 2**18  # each about another fact; None: about all
    seed: int = 0  # which of them, when they are more
    vocab_size: int | None = None  # None: the model's

    metric: ClassVar[str] = "accuracy"
    grid: ClassVar[dict[str, str]] = {"set": "sets"}

    def __post_init__(self) -> None:
        require(self.questions is None or self.questions >= 1, f"questions = {self.questions}: must be at least 1, or null for every fact.")

    def plan(self, vocab_size: int) -> Facts:
        """The world asked about; a ConfigError says why it cannot be."""
        vocab = vocab_size if self.vocab_size is None else self.vocab_size
        require(vocab <= vocab_size, f"vocab_size = {vocab}: the model knows {vocab_size} tokens; take at most that.")
        return Facts(facts=self.facts, asked=self.asked, key_length=self.key_length, vocab_size=vocab, world=self.world, sets=self.sets)

    def count(self) -> int:
        return self.facts if self.questions is None else min(self.facts, self.questions)

    def work(self, model: Any) -> int:
        """Rows."""
        return -(-self.count() // self.asked)

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        source, rows = self.plan(model.config.vocab_size), self.work(model)
        size = batch_size or max(1, TOKENS // source.length)
        found: list[tuple[Array, Array, Array]] = []
        for first in range(0, rows, size):
            batch = source.batch(split_seed(self.seed, "test"), range(first, min(first + size, rows)))
            scores, asked = score(model, batch.tokens, batch.targets, chunk=chunk), batch.targets != -100
            found.append((scores.hit[asked].numpy(), scores.nats[asked].numpy(), batch.meta["fact"].flatten().numpy()))
            advance(len(batch.tokens))
        hit, nats, fact = (np.concatenate(part)[: self.count()] for part in zip(*found, strict=True))  # one pass: no fact twice
        which = fact // (self.facts // self.sets)
        cells = (self._row(model.config, source, int(s), hit[which == s], nats[which == s]) for s in np.unique(which))
        return Table(self.kind, self.metric, tuple(self.grid), tuple(cells))

    def _row(self, config: Any, source: Facts, which: int, hit: Array, nats: Array) -> Row:
        n, chance = self.facts // self.sets, 1 / source.vocab_size
        mean, error, answers = estimate(hit, np.arange(len(hit)))
        bits = n * max(0.0, math.log2(source.vocab_size) - float(nats.mean(dtype=np.float64)) / math.log(2))
        return {
            "set": which,
            self.metric: mean,
            "error": error,
            "stored": n * max(0.0, (mean - chance) / (1 - chance)),
            "bits": bits,
            "bits_per_parameter": bits / config.num_params(),
            "bits_per_active_parameter": bits / config.active_params(),
            "facts": n,
            "answers": answers,
        }
