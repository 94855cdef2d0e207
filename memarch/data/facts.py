"""Random facts, for memories that keep them in weights: bits of knowledge as Allen-Zhu and Li count them ("Knowledge capacity scaling laws", 2024).

    a b  c d  a e ..        a key is `key_length` symbols
      x    y    z           its value is asked for at its last symbol; no value stands in the input, so nothing can be copied

    F facts   f number of a fact   V vocab_size   B rows   n asked

The key of fact f is p(f) written in base V, p a bijection of 0 .. V^key_length - 1; its value is any of the V symbols. Both are hashes of
(world, f): no table is made. The seed decides in which order facts are asked and nothing else, so all splits ask about the same world.

Every fact comes once in a pass, then every fact again in another order. (Drawn with replacement, a third of them would be missing after one
pass, and a capacity would be measured through the luck of the draw.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch, Endless
from memarch.data.draw import Array, Draw, split_of
from memarch.data.order import permute

WORLDS = 1 << 60  # above every seed: what the world is has nothing to do with the order in which it is asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(Endless):
    """With `passes`, training is staged: so many passes over the first of `sets` equal sets, then over the second, and so on; the last one stays. A
    stage takes passes * facts / (sets * asked) rows. Validation and test always ask about all facts. Meta: "fact" [B, n], their numbers."""

    kind: Literal["facts"] = "facts"
    facts: int = 65536
    asked: int = 128  # of one row
    key_length: int = 2
    vocab_size: int = 256
    world: int = 0
    sets: int = 1  # fact f belongs to set f // (facts / sets)
    passes: int | None = None  # None: training asks about all sets at once

    def __post_init__(self) -> None:
        for name in ("facts", "asked", "key_length", "sets"):
            require(getattr(self, name) >= 1, f"facts: {name} = {getattr(self, name)}: must be at least 1.")
        require(self.vocab_size >= 2, f"facts: vocab_size = {self.vocab_size}: must be at least 2: one value is nothing to remember.")
        keys = self.vocab_size**self.key_length
        require(keys < 1 << 63, f"facts: key_length = {self.key_length}: {self.vocab_size}^{self.key_length} keys are too many to number; take a shorter key.")
        require(
            self.facts <= keys,
            f"facts: facts = {self.facts}: vocab_size {self.vocab_size} and key_length {self.key_length} make {keys} distinct keys: raise one of them.",
        )
        require(self.facts % self.sets == 0, f"facts: sets = {self.sets}: sets are of equal size, so their number must divide facts = {self.facts}.")
        require(self.passes is None or self.passes >= 1, f"facts: passes = {self.passes}: must be at least 1, or null to train on all sets at once.")
        require(self.passes is None or self.sets > 1, f"facts: passes = {self.passes} leads from one set to the next, and there is one set: set sets: 2.")
        require(0 <= self.world < WORLDS, f"facts: world = {self.world}: must lie in 0 .. 2^60 - 1.")

    @property
    def length(self) -> int:
        return self.asked * self.key_length

    def rows(self, seed: int) -> int:
        """Of one pass over all facts."""
        return max(1, self.facts // self.asked)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        question = np.array(indices, dtype=np.int64)[:, None] * self.asked + np.arange(self.asked)  # [B, n]
        fact = self.order(seed, question)
        keys, values = self.tell(fact)
        tokens = keys.reshape(len(fact), self.length)
        targets = np.full(tokens.shape, -100, dtype=np.int64)
        targets[:, self.key_length - 1 :: self.key_length] = values
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), meta={"fact": torch.from_numpy(fact)})

    def order(self, seed: int, question: Array) -> Array:
        """The fact that each question is about."""
        size, passes = self.facts // self.sets, self.passes if split_of(seed) == "train" else None
        n = self.facts if passes is None else size  # asked in one pass
        fact, turn = np.empty_like(question), question // n
        for now in np.unique(turn).tolist():
            first = 0 if passes is None else size * min(now // passes, self.sets - 1)
            here = turn == now
            fact[here] = first + permute(n, seed, now, question[here] % n)
        return fact

    def tell(self, fact: Array) -> tuple[Array, Array]:
        """Keys [.., key_length] and values [..] of facts by number."""
        world, flat = WORLDS + self.world, fact.reshape(-1)
        number = permute(self.vocab_size**self.key_length, world, 0, flat).reshape(*fact.shape, 1)
        keys = number // self.vocab_size ** np.arange(self.key_length - 1, -1, -1) % self.vocab_size
        return keys, Draw(world, flat).integers("value", 1, 0, self.vocab_size).reshape(fact.shape)
