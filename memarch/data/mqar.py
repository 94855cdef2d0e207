"""Multi-query associative recall (Arora, Eyuboglu et al., "Zoology", 2023; also the recall figure of Based, 2024).

    k1 v1 k2 v2 .. kn vn | . . k2 . . . . . k1 . .        at every key of the second part the model must say its value,
                             v2          v1               at that same position; the value itself is not shown again

    V vocab_size   L length   n pairs   a power   S = (L - 2n)/2 two-token slots behind the pairs

Keys are distinct in 1 .. V/2 - 1, values distinct in V/2 .. V - 1. Key j gets the j-th slot drawn without replacement with
p_i ~ i^(a - 1), i = 1 .. S, and stands on the slot's first token: a = 1 is uniform, a small a asks soon, and earlier keys sooner. When
4n = L every slot is taken. All other positions hold uniform noise over the whole vocabulary (which may look like a key) or 0.

Same distribution as the published generator, made another way: slots without replacement are the order in which exponential clocks of
rate p_i ring (the Gumbel trick without the Gumbels), so a batch needs no loop over rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch
from memarch.data.draw import Array, Draw
from memarch.data.order import permute


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR:
    """`settings` is a mixture of (length, pairs): every batch comes from one of them, and `len(settings)` steps in a row visit each
    once, in an order drawn anew every time. A setting that is listed five times is visited five times as often, so the Based paper's
    training mix is ((64, 4),) * 5 + ((128, 8), (256, 16), (256, 32), (256, 64)) with vocab_size 8192."""

    kind: Literal["mqar"] = "mqar"
    settings: tuple[tuple[int, int], ...] = ((64, 8),)
    vocab_size: int = 256
    power: float = 0.01
    filler: Literal["random", "zero"] = "random"  # random in Based's configs, zero in Zoology's figure 2

    def __post_init__(self) -> None:
        require(len(self.settings) > 0, "mqar: settings is empty: give at least one (length, pairs), such as [[64, 8]].")
        require(self.vocab_size >= 4 and self.vocab_size % 2 == 0, f"mqar: vocab_size = {self.vocab_size}: must be even and at least 4.")
        require(self.power > 0, f"mqar: power = {self.power}: must be above 0; 1 spreads the queries evenly, 0.01 is the paper's.")
        require(self.filler in ("random", "zero"), f"mqar: filler = {self.filler!r}: must be 'random' or 'zero'.")
        for length, pairs in self.settings:
            where = f"mqar: settings has (length, pairs) = ({length}, {pairs})"
            require(length % 2 == 0, f"{where}: length must be even, because keys stand on every second position.")
            fits = pairs >= 1 and 4 * pairs <= length
            require(fits, f"{where}: needs 1 <= pairs <= length / 4 = {length // 4}: a pair takes two tokens to tell and two to ask.")
            # Zoology asks for length < vocab_size, which is sufficient and not necessary: distinct keys are all that the definition needs.
            most = self.vocab_size // 2 - 1
            require(pairs <= most, f"{where}: vocab_size {self.vocab_size} has {most} distinct keys: raise vocab_size (papers: 8192) or ask fewer pairs.")

    @property
    def length(self) -> int:
        """The longest row."""
        return max(length for length, _ in self.settings)

    def parts(self) -> "tuple[MQAR, ...]":
        """One config per setting, in the order listed: what a report over settings runs on."""
        return tuple(dataclasses.replace(self, settings=(setting,)) for setting in self.settings)

    def at(self, seed: int, step: int) -> "MQAR":
        """The setting of a step: the same for all rows and all processes."""
        cycle, place = divmod(step, len(self.settings))
        return self.parts()[permute(len(self.settings), seed, cycle, np.array([place]))[0]]

    def step(self, seed: int, step: int, rows: range, size: int) -> Batch:
        return self.at(seed, step).batch(seed, range(step * size + rows.start, step * size + rows.stop))

    def rows(self, seed: int) -> int | None:
        return None

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        require(
            len(self.settings) == 1,
            f"mqar: a mixture of {len(self.settings)} settings has rows of several lengths and no batch of its own: "
            "use one of .parts(), or .step(seed, step, rows, size), which takes the setting of that step.",
        )
        (length, pairs), half = self.settings[0], self.vocab_size // 2
        draw = Draw(seed, indices)
        keys = draw.distinct("keys", pairs, 1, half)  # [B, n]
        values = draw.distinct("values", pairs, half, self.vocab_size)
        asked = 2 * pairs + 2 * self._slots(draw, (length - 2 * pairs) // 2, pairs)  # [B, n] where each key stands again
        told = np.broadcast_to(np.arange(1, 2 * pairs, 2), asked.shape)  # where its value stands

        shape = (len(keys), length)
        tokens = draw.integers("filler", length, 0, self.vocab_size) if self.filler == "random" else np.zeros(shape, dtype=np.int64)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        targets, gap = np.full(shape, -100, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for into, what in ((tokens, keys), (targets, values), (gap, asked - told)):
            np.put_along_axis(into, asked, what, axis=1)
        meta = {"pairs": torch.full((len(keys),), pairs), "gap": torch.from_numpy(gap)}
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), meta=meta)

    def _slots(self, draw: Draw, slots: int, pairs: int) -> Array:
        rate = np.arange(1, slots + 1) ** (self.power - 1.0)
        rings = -np.log(draw.uniform("slots", slots)) / rate
        return np.argsort(rings, axis=1)[:, :pairs]
