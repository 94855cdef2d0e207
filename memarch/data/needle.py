"""A needle in a haystack, at the level of tokens: the passkey test (Mohtashami, Jaggi, 2023) without a tokenizer.

    f f f NEEDLE k v1 .. vm f f f f f ASK k v1 .. v(m-1)
                                          v1 v2 .. vm         scored at the last m positions

    NEEDLE = 0, ASK = 1. The other V - 2 ids are cut in three: keys (a quarter), values (a quarter), filler (the rest), so nothing in the
    filler can be mistaken for a key or a value.

With several `needles`, keys differ and one of them is asked for: the others are distractors, and saying "the only value there is" fails.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch, Endless
from memarch.data.draw import Draw

NEEDLE, ASK = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Endless):
    """Meta: "place" [B] where the asked needle begins, "depth" [B] the share of the filler that stands before it (0 first, 1 last)."""

    kind: Literal["needle"] = "needle"
    length: int = 256
    depth: float | None = None  # None: anywhere, all places equally likely
    needles: int = 1
    value_len: int = 1
    vocab_size: int = 64

    def __post_init__(self) -> None:
        require(self.vocab_size >= 10, f"needle: vocab_size = {self.vocab_size}: must be at least 10 for two keys, two values and filler.")
        require(self.needles >= 1, f"needle: needles = {self.needles}: must be at least 1.")
        require(
            self.needles <= self.keys,
            f"needle: needles = {self.needles}: keys must differ, and vocab_size = {self.vocab_size} leaves {self.keys} of them: "
            f"raise vocab_size to {4 * self.needles + 2} or more.",
        )
        require(self.value_len >= 1, f"needle: value_len = {self.value_len}: must be at least 1.")
        require(self.depth is None or 0 <= self.depth <= 1, f"needle: depth = {self.depth}: must lie in 0 .. 1, or be null for anywhere.")
        require(self.filler >= 1, f"needle: length = {self.length}: needles and question need at least {self.length - self.filler + 1}.")

    @property
    def keys(self) -> int:
        return (self.vocab_size - 2) // 4

    @property
    def filler(self) -> int:
        """Filler tokens in a row."""
        return self.length - self.needles * (2 + self.value_len) - (1 + self.value_len)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        draw, m = Draw(seed, indices), self.value_len
        first_value, first_filler = 2 + self.keys, 2 + 2 * self.keys
        keys = draw.distinct("keys", self.needles, 2, first_value)  # [B, n], the asked one is column 0
        values = draw.integers("values", self.needles * m, first_value, first_filler).reshape(*keys.shape, m)
        before = draw.integers("places", self.needles, 0, self.filler + 1)  # [B, n] filler tokens before each needle
        if self.depth is not None:
            before[:, 0] = round(self.depth * self.filler)
        rank = np.argsort(np.argsort(before, axis=1, kind="stable"), axis=1)
        begins = before + (2 + m) * rank  # [B, n]

        tokens = draw.integers("filler", self.length, first_filler, self.vocab_size)
        targets, gap = np.full(tokens.shape, -100, dtype=np.int64), np.zeros(tokens.shape, dtype=np.int64)
        needles = np.concatenate([np.full((*keys.shape, 1), NEEDLE), keys[..., None], values], axis=2)  # [B, n, 2 + m]
        within = begins[..., None] + np.arange(2 + m)
        np.put_along_axis(tokens, within.reshape(len(tokens), -1), needles.reshape(len(tokens), -1), axis=1)
        tokens[:, -m - 1], tokens[:, -m] = ASK, keys[:, 0]
        tokens[:, self.length - m + 1 :] = values[:, 0, :-1]
        targets[:, -m:] = values[:, 0]
        gap[:, -m:] = np.arange(self.length - m, self.length) - (within[:, 0, 2:])
        meta = {"gap": gap, "place": begins[:, 0], "depth": before[:, 0] / self.filler}
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), meta={name: torch.from_numpy(x) for name, x in meta.items()})
