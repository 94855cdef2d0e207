"""Recall: multi-query recall, copying, selective copying, a needle in a haystack. Each is a grid of cells, each cell a generator of memarch.data.

The examples are those of the test split, so no model has trained on them, and example i is the same for every model and on every machine.
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from memarch.config import ConfigError, require
from memarch.data import MQAR, Copy, Needle, SelectiveCopy, Source, split_seed
from memarch.evaluation.stream import score
from memarch.evaluation.table import Advance, Row, Table, estimate, label, octave

TOKENS = 2**15  # of one batch, unless a batch size is asked for


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What the four have in common. A task holds everything that decides the numbers, and nothing else."""

    kind: str
    examples: int = 256  # per cell
    seed: int = 0
    vocab_size: int | None = None  # None: the model's

    metric: ClassVar[str] = "accuracy"
    grid: ClassVar[dict[str, str]]  # column of the table -> the field that lists its values

    def __post_init__(self) -> None:
        require(self.examples >= 1, f"examples = {self.examples}: must be at least 1.")
        for field in self.grid.values():
            require(len(getattr(self, field)) > 0, f"{field} is empty: give at least one value.")

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What the cells of a part differ in."""
        return {"gap": (*self.grid, "gap")}

    def source(self, vocab_size: int, **settings: Any) -> Source:
        """The generator of one cell; a ConfigError says why the cell cannot be."""
        raise NotImplementedError

    def plan(self, vocab_size: int) -> tuple[list[tuple[Row, Source]], list[str]]:
        """The cells that can be, and for each of the others a sentence why not."""
        vocab = vocab_size if self.vocab_size is None else self.vocab_size
        require(vocab <= vocab_size, f"vocab_size = {vocab}: the model knows {vocab_size} tokens; take at most that.")
        cells, skipped = [], []
        for values in itertools.product(*(getattr(self, field) for field in self.grid.values())):
            settings = dict(zip(self.grid, values, strict=True))
            try:
                cells.append((settings, self.source(vocab, **settings)))
            except ConfigError as error:
                skipped.append(f"{label(settings)}: {str(error).removeprefix(f'{self.kind}: ')}")
        require(bool(cells), "no cell of the grid is possible. " + " ".join(skipped[:3]))
        return cells, skipped

    def work(self, model: Any) -> int:
        return len(self.plan(model.config.vocab_size)[0]) * self.examples

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        cells, skipped = self.plan(model.config.vocab_size)
        rows: list[Row] = []
        gaps: list[Row] = []
        for settings, source in cells:
            row, by_gap = self._cell(model, settings, source, batch_size, chunk, advance)
            rows.append(row)
            gaps += by_gap
        return Table(self.kind, self.metric, tuple(self.grid), tuple(rows), {"gap": tuple(gaps)}, tuple(skipped))

    def _cell(self, model: Any, settings: Row, source: Source, batch_size: int | None, chunk: int | None, advance: Advance) -> tuple[Row, list[Row]]:
        size = batch_size or max(1, TOKENS // settings["length"])
        found: list[tuple[Any, ...]] = []
        for first in range(0, self.examples, size):
            index = np.arange(first, min(first + size, self.examples))
            batch = source.batch(split_seed(self.seed, "test"), index.tolist())
            hit = score(model, batch.tokens, batch.targets, batch.lengths, chunk).hit
            example, place = (batch.targets != -100).nonzero(as_tuple=True)
            found.append((hit[example, place].numpy(), batch.meta["gap"][example, place].numpy(), index[example.numpy()]))
            advance(len(index))
        hits, gaps, units = (np.concatenate(part) for part in zip(*found, strict=True))
        mean, error, count = estimate(hits, units)
        exact = 1 - np.unique(units[~hits]).size / self.examples  # examples in which every answer is right
        row = {**settings, self.metric: mean, "error": error, "exact": exact, "examples": self.examples, "answers": count}
        by_gap, buckets = [], octave(gaps)
        for low in np.unique(buckets).tolist():
            here = buckets == low
            mean, error, count = estimate(hits[here], units[here])
            by_gap.append({**settings, "gap": low, "below": 2 * low, self.metric: mean, "error": error, "answers": count})
        return row, by_gap


@dataclass(frozen=True, kw_only=True)
class MQARTask(RecallTask):
    kind: Literal["mqar"] = "mqar"
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    power: float = 0.01
    filler: Literal["random", "zero"] = "random"

    grid: ClassVar[dict[str, str]] = {"length": "lengths", "pairs": "pairs"}

    def source(self, vocab_size: int, *, length: int, pairs: int) -> Source:  # type: ignore[override]
        return MQAR(settings=((length, pairs),), vocab_size=vocab_size, power=self.power, filler=self.filler)


@dataclass(frozen=True, kw_only=True)
class CopyTask(RecallTask):
    kind: Literal["copy"] = "copy"
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    copies: tuple[int, ...] = (8, 16)

    grid: ClassVar[dict[str, str]] = {"length": "lengths", "copies": "copies"}

    def source(self, vocab_size: int, *, length: int, copies: int) -> Source:  # type: ignore[override]
        return Copy(length=length, copies=copies, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyTask(RecallTask):
    kind: Literal["selective_copy"] = "selective_copy"
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    copies: tuple[int, ...] = (8, 16)

    grid: ClassVar[dict[str, str]] = {"length": "lengths", "copies": "copies"}

    def source(self, vocab_size: int, *, length: int, copies: int) -> Source:  # type: ignore[override]
        return SelectiveCopy(length=length, copies=copies, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class NeedleTask(RecallTask):
    kind: Literal["needle"] = "needle"
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 1
    value_len: int = 1

    grid: ClassVar[dict[str, str]] = {"length": "lengths", "depth": "depths"}

    def source(self, vocab_size: int, *, length: int, depth: float) -> Source:  # type: ignore[override]
        return Needle(length=length, depth=depth, needles=self.needles, value_len=self.value_len, vocab_size=vocab_size)
