"""Value tables as objects: who shares one says so by name, and nobody shares by accident.

A table is the one place where rows live. A layer that names a pool of its model reads that pool; a layer that names none owns its table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from memarch.config import allowed, require
from memarch.layers.parts.linear import normal_


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    rows: int
    width: int | None = None  # None: the model's width

    def __post_init__(self) -> None:
        require(self.rows > 0, f"a pool needs at least 1 row, got {self.rows}.")

    def num_params(self, dim: int) -> int:
        return self.rows * (self.width or dim)


class ValuePool(nn.Module):
    """One table [rows, width]. `memory_table` marks it for the optimiser: no weight decay, its own clip group."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.rows, self.width = rows, width
        self.table = nn.Parameter(torch.empty(rows, width))

    def init_(self, generator: torch.Generator, std: float | None = None) -> None:
        normal_(self.table, std or 1 / math.sqrt(self.width), generator)


class Borrowed:
    """A pool that belongs to the model: held without being registered, so that it is saved, moved and counted once."""

    def __init__(self, pool: ValuePool):
        self.pool = pool


def claim(name: str | None, rows: int, width: int, pools: Mapping[str, nn.Module]) -> ValuePool | Borrowed:
    """The pool called `name`, checked for size, or a table of the layer's own."""
    if name is None:
        return ValuePool(rows, width)
    require(name in pools, f"{allowed('pool', name, pools)} Declare it under `pools` of the model.")
    pool = pools[name]
    assert isinstance(pool, ValuePool)
    require((pool.rows, pool.width) == (rows, width), f"pool {name!r} is {pool.rows} x {pool.width}; this layer needs {rows} x {width}.")
    return Borrowed(pool)


def rows_of(pool: ValuePool | Borrowed) -> nn.Parameter:
    """The table, owned or borrowed."""
    return pool.pool.table if isinstance(pool, Borrowed) else pool.table
