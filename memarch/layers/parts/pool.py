"""Value tables as objects: who shares one says so by name, and nobody shares by accident.

A table is the one place where rows live. A layer that names a pool of its model reads that pool; a layer that names none owns its table. Either
way it reads through `bag` and `dot` and never sees the table itself.

Layers that share a pool may each see a window of it, row `start + i` of the pool being row i of the layer. The l-th layer to ask for it, from 0, gets

    ring    start = l step, and the last rows are followed by the first         (UltraMemV2's choice: neighbours share most of their rows)
    clamp   start = l step, but the last windows end where the pool ends
    block   start = the multiple of `window` at or below l step: layers in groups, no row in two groups
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from memarch.config import ConfigError, allowed, require
from memarch.kernels.row_dot import row_dot
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers.parts.linear import normal_
from memarch.layers.parts.usage import Usage
from memarch.units import size

DTYPES = {"model": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    rows: int
    width: int | None = None  # None: the model's width
    std: float | None = None  # of the rows at init; None: as the first layer that reads it wants
    dtype: Literal["model", "bfloat16"] = "model"  # bfloat16 halves the bytes; sums and weights stay as wide as the model
    window: int | None = None  # rows one layer sees; None: all
    step: int | None = None  # rows from the window of one layer to that of the next; None: `window`, side by side
    shift: Literal["ring", "clamp", "block"] = "ring"

    def __post_init__(self) -> None:
        require(self.rows > 0, f"a pool needs at least 1 row, got {self.rows}.")
        require(self.width is None or self.width > 0, f"width must be at least 1, got {self.width}.")
        require(self.std is None or self.std > 0, f"std must be above 0, got {self.std}.")
        require(self.window is None or 0 < self.window <= self.rows, f"window must be between 1 and rows ({self.rows}), got {self.window}.")
        require(self.step is None or (self.window is not None and self.step > 0), f"step moves a window: set window, and step above 0 (got {self.step}).")

    def num_params(self, dim: int) -> int:
        return self.rows * (self.width or dim)

    def seen(self) -> int:
        """Rows of one layer."""
        return self.window or self.rows

    def start(self, layer: int) -> int:
        """Where the window of the l-th layer begins."""
        window, at = self.seen(), layer * (self.step or self.seen())
        if self.shift == "ring":
            return at % self.rows
        if self.shift == "clamp":
            return min(at, self.rows - window)
        begin = at // window * window
        require(begin + window <= self.rows, f"the pool of {self.rows} rows has {self.rows // window} blocks of {window}, too few for layer {layer} of it.")
        return begin

    def make(self, dim: int) -> "ValuePool":
        return ValuePool(self.rows, self.width or dim, self)


class Rows:
    """What a layer holds: rows 0 .. count - 1 of its own, wherever they lie."""

    pool: "ValuePool"
    usage: Usage | None = None  # counts what is read, when somebody asks (layers/parts/usage.py)

    def at(self, ids: Tensor) -> Tensor:
        """Rows of the pool."""
        return ids

    def bag(self, ids: Tensor, weights: Tensor, like: Tensor, *, groups: Tensor | None = None, n_groups: int = 1) -> Tensor:
        """`weighted_bag` in the dtype of `like`."""
        table = self.pool.table
        scales = weights.to(torch.promote_types(table.dtype, like.dtype))
        return weighted_bag(table, self.at(ids), scales, groups=groups, n_groups=n_groups, sparse_grad=self.pool.sparse_grad).to(like.dtype)

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """`row_dot`, as wide as the wider of table and x."""
        table = self.pool.table
        return row_dot(table, self.at(ids), x.to(torch.promote_types(table.dtype, x.dtype)), sparse_grad=self.pool.sparse_grad)

    def init_(self, generator: torch.Generator, std: float | None = None) -> None:
        raise NotImplementedError

    def gauges(self, ids: Tensor, weights: Tensor, count: int | None = None) -> dict[str, Tensor]:
        """Counts what a training step reads, of `count` things (None: the rows); tells it when it is time to."""
        if self.usage is None or not torch.is_grad_enabled():
            return {}
        return self.usage.add(ids, weights, count or self.pool.cfg.seen())


class ValuePool(nn.Module, Rows):
    """One table [rows, width]. Being one is what marks it for the optimiser: a rate of its own, no weight decay, its own clip group.

    sparse_grad: the gradient of the table holds only the rows that were read; the optimiser that can take it says so here."""

    def __init__(self, rows: int, width: int, cfg: PoolConfig | None = None):
        super().__init__()
        self.rows, self.width, self.cfg = rows, width, cfg or PoolConfig(rows=rows)
        self.claims = 0  # layers that have asked for it
        self.sparse_grad = False
        dtype = DTYPES[self.cfg.dtype] or torch.get_default_dtype()
        afford(rows, width, dtype)
        self.table = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    @property
    def pool(self) -> "ValuePool":  # type: ignore[override]
        return self

    def init_(self, generator: torch.Generator, std: float | None = None) -> None:
        normal_(self.table, self.cfg.std or std or 1 / math.sqrt(self.width), generator)


class Borrowed(Rows):
    """A pool that belongs to the model: held without being registered, so that it is saved, moved and counted once."""

    def __init__(self, pool: ValuePool):
        self.pool, self.first = pool, pool.claims == 0
        self.start = pool.cfg.start(pool.claims)
        pool.claims += 1

    def at(self, ids: Tensor) -> Tensor:
        return (ids + self.start) % self.pool.rows if self.start else ids

    def init_(self, generator: torch.Generator, std: float | None = None) -> None:
        """The model has filled the pool. If nobody has said how, the first layer that has a wish is granted it."""
        if self.first and std is not None and self.pool.cfg.std is None:
            self.pool.init_(generator, std)


def claim(name: str | None, rows: int, width: int, pools: Mapping[str, nn.Module]) -> ValuePool | Borrowed:
    """The pool called `name`, checked for size, or a table of the layer's own."""
    if name is None:
        return ValuePool(rows, width)
    require(name in pools, f"{allowed('pool', name, pools)} Declare it under `pools` of the model.")
    pool = pools[name]
    assert isinstance(pool, ValuePool)
    found = pool.cfg.seen(), pool.width
    require(found == (rows, width), f"pool {name!r} shows a layer {found[0]} x {found[1]}; this layer needs {rows} x {width}.")
    return Borrowed(pool)


def readers(model: nn.Module) -> list[Rows]:
    """What the layers of a model hold, in their order."""
    layers = (module for module in model.modules() if not isinstance(module, nn.ModuleDict))
    return [held for layer in layers for held in (*layer.children(), *vars(layer).values()) if isinstance(held, Rows)]


def watch(model: nn.Module) -> list[Usage]:
    """From now on every layer that reads a table counts what it reads; `reader.usage = None` ends it."""
    for reader in (found := readers(model)):
        reader.usage = Usage()
    return [reader.usage for reader in found if reader.usage is not None]


# ------------------------------------------------------------------------------------------------ size


def afford(rows: int, width: int, dtype: torch.dtype) -> None:
    """A table that cannot be held is refused in words: Linux would promise the memory and kill the process once it is filled."""
    device = torch.get_default_device()
    free, need = free_memory(device), rows * width * dtype.itemsize
    if free is not None and need > free:
        raise ConfigError(
            f"a table of {rows:,} x {width} values of {dtype} takes {size(need)}; {device} has {size(free)} free. "
            "Take fewer keys, a narrower row or a pool of dtype bfloat16; with device='meta' a model of any size can be looked at."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
