"""Copying (the MAD suite, Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024).

    x1 x2 .. xn  _ _ .. _  C  _ _ .. _        n = copies; blank _ = V - 2, marker C = V - 1, data tokens 0 .. V - 3
                              x1 x2 .. xn     asked for at the last n positions, in order

Positions hold blanks while the answer is spoken: the model does not see what it has said, so it must count.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch, Endless
from memarch.data.draw import Array, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Endless):
    kind: Literal["copy"] = "copy"
    length: int = 256
    copies: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        check(self.kind, self.length, self.copies, self.vocab_size)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        data = Draw(seed, indices).integers("data", self.copies, 0, self.vocab_size - 2)
        return assemble(data, np.broadcast_to(np.arange(self.copies), data.shape), self.length, self.vocab_size)


def check(kind: str, length: int, copies: int, vocab_size: int) -> None:
    require(copies >= 1, f"{kind}: copies = {copies}: there must be at least 1 token to copy.")
    require(vocab_size >= 4, f"{kind}: vocab_size = {vocab_size}: must be at least 4: a blank, a marker and two different data tokens.")
    shortest = 2 * copies + 2
    require(length >= shortest, f"{kind}: length = {length}: {copies} tokens, a blank, the marker and the answer need at least {shortest}.")


def assemble(data: Array, places: Array, length: int, vocab_size: int) -> Batch:
    """data [B, n] at `places` [B, n], blanks elsewhere, the marker, then n positions at which to say the data."""
    rows, copies = data.shape
    answer = length - copies
    tokens = np.full((rows, length), vocab_size - 2, dtype=np.int64)
    targets, gap = np.full((rows, length), -100, dtype=np.int64), np.zeros((rows, length), dtype=np.int64)
    np.put_along_axis(tokens, places, data, axis=1)
    tokens[:, answer - 1] = vocab_size - 1
    targets[:, answer:] = data
    gap[:, answer:] = np.arange(answer, length) - places
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), meta={"gap": torch.from_numpy(gap)})
