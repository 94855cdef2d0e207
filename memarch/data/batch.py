"""What every source of data hands out, and what it must offer.

B rows   T positions   G rows of one global batch (all processes together)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

EMPTY: Mapping[str, Tensor] = {}


class Batch(NamedTuple):
    """Every tensor has the row as its dim 0, so a batch can be moved, sliced and pinned without knowing what it is about.

    `targets[b, t]` is what the output at position t must predict: the shift by one, where a task has one, is already done, and nobody
    shifts again. Token tasks hold int64. A continuous task holds floats: tokens [B, T, inputs], targets [B, T, outputs], and NaN is to them what
    -100 is to tokens: a position with a NaN in it is not scored."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]; -100 is not scored
    starts: Tensor | None = None  # bool [B, T]: a packed document begins here; None means that each row is one document
    lengths: Tensor | None = None  # int64 [B]: real tokens of each row, right padding; None means that all are
    meta: Mapping[str, Tensor] = EMPTY  # for reports, not for models. "gap" [B, T]: how many tokens back the answer stands, 0 if unscored


class Source(Protocol):
    """A config of memarch.data. It holds no open file and no generator, so it travels to a worker process as the few numbers it is.

    `seed` names an endless list of samples, and the split is a part of it (`split_seed`)."""

    @property
    def vocab_size(self) -> int: ...

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        """Samples by number. A pure function: a row depends on (config, seed, its index) and on nothing else."""
        ...

    def step(self, seed: int, step: int, rows: range, size: int) -> Batch:
        """`rows` of global batch number `step` when global batches have `size` rows."""
        ...

    def rows(self, seed: int) -> int | None:
        """Samples before they repeat; None: they do not."""
        ...


class Endless:
    """For generators that never run out and have one shape of sample: global batch s is samples s*G .. (s+1)*G - 1."""

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        raise NotImplementedError

    def step(self, seed: int, step: int, rows: range, size: int) -> Batch:
        return self.batch(seed, range(step * size + rows.start, step * size + rows.stop))

    def rows(self, seed: int) -> int | None:
        return None
