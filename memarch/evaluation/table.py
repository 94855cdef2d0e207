"""What an evaluation answers: cells with a mean and its standard error, and everything needed to measure them again."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Advance = Callable[[int], None]  # told how much of the work is done since the last call


class Estimate(NamedTuple):
    mean: float
    error: float | None  # standard error of the mean; None from a single unit
    values: int  # how many they are


def estimate(values: NDArray[Any], units: NDArray[Any]) -> Estimate:
    """The mean of all values, and its standard error over independent units (examples, documents).

    Answers inside one example share a context and err together, so the unit is the example and not the token. Units of unlike size make the
    mean a ratio of sums; this is the usual linearised error of a ratio, and for units of one size it is std(unit means) / sqrt(units)."""
    mean = float(values.mean(dtype=np.float64))
    _, unit = np.unique(units, return_inverse=True)
    residual = np.bincount(unit, weights=values - mean)
    n = len(residual)
    error = None if n < 2 else math.sqrt(n / (n - 1) * float(residual @ residual)) / len(values)
    return Estimate(mean, error, len(values))


def octave(x: NDArray[Any]) -> NDArray[Any]:
    """The power of two at or below each number: the buckets 1, 2-3, 4-7, 8-15, .."""
    return 2 ** np.floor(np.log2(np.maximum(x, 1))).astype(np.int64)


@dataclass(frozen=True)
class Table:
    """`rows` is one row per cell: the settings (`axes`), the `metric` with its `error`, and further columns. `parts` cuts the same answers
    another way, such as "gap": how far back the answer stands."""

    task: str
    metric: str
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    parts: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # cells that cannot be, with the reason
    about: Mapping[str, Any] = field(default_factory=dict)  # task, model and machine

    def value(self, **settings: Any) -> float:
        """The metric of one cell: table.value(length=64, pairs=8)."""
        found = [row for row in self.rows if all(row[k] == v for k, v in settings.items())]
        if len(found) != 1:
            have = "; ".join(label(self.settings(row)) for row in self.rows)
            raise ValueError(f"{self.task}: {len(found)} cells match {settings}. Cells: {have}.")
        return found[0][self.metric]

    def mean(self) -> float:
        """The mean over cells, each counting the same."""
        return sum(row[self.metric] for row in self.rows) / len(self.rows)

    def part(self, name: str, axes: tuple[str, ...], metric: str = "") -> "Table":
        """The cells of a part as a table of their own."""
        rows, metric = self.parts.get(name, ()), metric or self.metric
        if not rows or metric not in rows[0]:
            raise ValueError(f"{self.task} answered no {metric} by {name}. " + " ".join(self.skipped))
        return Table(self.task, metric, axes, rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metric": self.metric,
            "axes": list(self.axes),
            "rows": list(self.rows),
            "parts": {name: list(rows) for name, rows in self.parts.items()},
            "skipped": list(self.skipped),
            "about": dict(self.about),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Table":
        parts = {name: tuple(rows) for name, rows in data["parts"].items()}
        return cls(data["task"], data["metric"], tuple(data["axes"]), tuple(data["rows"]), parts, tuple(data["skipped"]), data["about"])

    def settings(self, row: Row) -> Row:
        return {axis: row[axis] for axis in self.axes}


def label(settings: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
