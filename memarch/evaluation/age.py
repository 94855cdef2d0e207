"""What is in a memory: pairs go by one after the other, and then every one of them is asked for, the oldest as well as the newest.

    k1 v1 . . . k2 v2 . . . . . kn vn . . .        the state after this is copied n times, and each copy is shown one key
                                           k_i     it must say v_i

No question comes before another and no answer is shown, so what is measured is the state as it stands. What a memory has not held on to, has
forgotten, or has overwritten by later pairs shows as a fall towards old age; what a window holds, as a step.

    n pairs   B rows   age tokens from a value to the question about it
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from memarch import state as states
from memarch.config import require
from memarch.data import split_seed
from memarch.data.draw import Array, Draw
from memarch.evaluation.stream import CHUNK, quiet
from memarch.evaluation.table import Advance, Row, Table, estimate, octave

ROWS = 64  # streams read at once, and questions asked at once, unless a batch size is asked for


@dataclass(frozen=True, kw_only=True)
class AgeTask:
    kind: Literal["age"] = "age"
    pairs: int = 64
    every: int = 16  # tokens from one pair to the next; what is between them is 0
    examples: int = 64
    seed: int = 0
    vocab_size: int | None = None  # None: the model's

    metric: ClassVar[str] = "accuracy"
    grid: ClassVar[dict[str, str]] = {"age": "pairs"}

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("every", 2), ("examples", 1)):
            require(getattr(self, name) >= least, f"{name} = {getattr(self, name)}: must be at least {least}.")

    def plan(self, vocab_size: int) -> int:
        """The vocabulary asked with; a ConfigError says why it cannot be."""
        vocab = vocab_size if self.vocab_size is None else self.vocab_size
        require(vocab <= vocab_size, f"vocab_size = {vocab}: the model knows {vocab_size} tokens; take at most that.")
        require(self.pairs < vocab // 2, f"pairs = {self.pairs}: a vocabulary of {vocab} has {vocab // 2 - 1} distinct keys.")
        return vocab

    def ages(self) -> Array:
        """Of the pairs, oldest first."""
        return self.every * np.arange(self.pairs, 0, -1) - 1

    def work(self, model: Any) -> int:
        return self.examples

    def stream(self, vocab: int, index: range) -> tuple[Tensor, Tensor, Tensor]:
        """-> tokens [B, n every], keys and values [B, n]"""
        draw = Draw(split_seed(self.seed, "test"), index)
        keys, values = draw.distinct("keys", self.pairs, 1, vocab // 2), draw.distinct("values", self.pairs, vocab // 2, vocab)
        tokens = np.zeros((len(keys), self.pairs, self.every), dtype=np.int64)
        tokens[:, :, 0], tokens[:, :, 1] = keys, values
        return torch.from_numpy(tokens.reshape(len(keys), -1)), torch.from_numpy(keys), torch.from_numpy(values)

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        vocab, size, device = self.plan(model.config.vocab_size), batch_size or ROWS, next(model.parameters()).device
        hits = []
        with quiet(model):
            for first in range(0, self.examples, size):
                tokens, keys, values = self.stream(vocab, range(first, min(first + size, self.examples)))
                state: Any = None
                for piece in tokens.split(chunk or CHUNK, 1):
                    state = model(piece.to(device), state).state
                who = torch.arange(len(keys)).repeat_interleave(self.pairs)
                said = [
                    model(key[:, None].to(device), states.take(state, rows)).logits[:, -1].argmax(-1).cpu()
                    for rows, key in zip(who.split(size), keys.flatten().split(size), strict=True)
                ]
                hits.append((torch.cat(said).view_as(values) == values).numpy())
                advance(len(keys))
        hit = np.concatenate(hits)  # [examples, n]
        age, example = np.broadcast_to(self.ages(), hit.shape), np.broadcast_to(np.arange(len(hit))[:, None], hit.shape)
        buckets = octave(age)
        cells = [self._row(int(low), hit[buckets == low], example[buckets == low]) for low in np.unique(buckets)]
        return Table(self.kind, self.metric, tuple(self.grid), tuple(cells))

    def _row(self, low: int, hit: Array, example: Array) -> Row:
        mean, error, answers = estimate(hit, example)
        return {"age": low, self.metric: mean, "error": error, "answers": answers}
