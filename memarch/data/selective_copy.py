"""Selective copying (the MAD suite, 2024, after Mamba, Gu and Dao, 2023): copying.py with the data scattered among the blanks.

    _ x1 _ _ x2 .. _ xn  C  _ _ .. _

Each blank goes to one of the n gaps in front of x1 .. xn, all equally likely. That is the published rule, and its quirk: no blank ever
stands between xn and the marker. The published code draws the gaps from numpy's global generator, so its seed does not fix its samples;
here it does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from memarch.data.batch import Batch, Endless
from memarch.data.copying import assemble, check
from memarch.data.draw import Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Endless):
    kind: Literal["selective_copy"] = "selective_copy"
    length: int = 256
    copies: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        check(self.kind, self.length, self.copies, self.vocab_size)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        draw, n = Draw(seed, indices), self.copies
        data = draw.integers("data", n, 0, self.vocab_size - 2)
        gaps = draw.integers("gaps", self.length - 2 * n - 1, 0, n)  # [B, blanks] the gap each blank goes to
        flat = gaps + n * np.arange(len(gaps))[:, None]
        blanks = np.bincount(flat.reshape(-1), minlength=data.size).reshape(data.shape)  # [B, n] blanks in each gap
        return assemble(data, np.arange(n) + blanks.cumsum(axis=1), self.length, self.vocab_size)
