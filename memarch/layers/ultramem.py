"""UltraMem (Huang et al. 2025): a table found by a Tucker-decomposed score, read through more addresses than it has rows.

    scores s, rows, blocks: parts/tucker_keys.py
    o_p = sum over the cells of block p of s V[row],  slice c of the columns weighed with core c's own score;   y = W_out [o_1 .. o_E]

Each of a row's E addresses lies in a block of its own, and blocks are projected apart: E values for the memory of one. The paper places few of
these beside the blocks: reading one block's feed-forward input, added some blocks later. That is a branch of the model:
branches: [{reads: 2, adds: 4, layer: {kind: ultramem}}].

At init the mean kept score is 1, and the values have variance E / (2 topk H L), so that the output has 1 / (2 L).
A loss keeps the core near rank 1, where the filter is exact: core_loss / (r - 1) sum_{i>1} max(0, lambda_i - 0.15)^2.

    H heads   r rank   n keys an axis, N = n^2 rows   E addresses of a row   V value width   h cores   L depth
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import Fed
from memarch.layers.parts import Linear
from memarch.layers.parts.linear import normal_
from memarch.layers.parts.pool import Borrowed, ValuePool, claim
from memarch.layers.parts.tucker_keys import TuckerKeys, check_slices, check_tucker

TAU = 0.15  # a singular value of the core below this costs nothing


@dataclass(frozen=True, kw_only=True)
class UltraMemConfig(LayerConfig):
    kind: Literal["ultramem"] = "ultramem"
    keys: int = 128  # n: the table has keys^2 rows
    heads: int = 2
    topk: int = 32  # cells a head
    rank: int = 2
    key_dim: int | None = None  # of one rank; None: dim / (2 rank)
    value_dim: int | None = None  # None: half of the width
    expand: int = 4  # E, a square
    cores: int = 2
    query: Literal["split", "shared"] = "split"  # a query for each rank, as in the paper, or one for all, as in the released code
    core_loss: float = 1e-3
    pool: str | None = None  # a pool of the model; None: a table of its own

    paper: ClassVar[str] = "Huang et al. 2025, arXiv 2411.12364"

    def __post_init__(self) -> None:
        check_tucker(self.keys, self.heads, self.rank, self.expand, self.cores, self.topk, self.topk)
        require(self.core_loss >= 0, f"core_loss must not be negative, got {self.core_loss}.")

    def widths(self, dim: int) -> tuple[int, int]:
        """Of a key of one rank, of a value."""
        value = self.value_dim or max(1, dim // 2)
        check_slices(self.cores, value)
        return self.key_dim or max(1, dim // (2 * self.rank)), value

    def keys_of(self, dim: int) -> dict[str, int]:
        """What TuckerKeys is made of."""
        queries = self.rank if self.query == "split" else 1
        shape = {"heads": self.heads, "keys": self.keys, "expand": self.expand, "rank": self.rank, "cores": self.cores}
        return {**shape, "key_dim": self.widths(dim)[0], "queries": queries}

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "UltraMem":
        return UltraMem(self, dim, pools)

    def pool_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, self.widths(dim)[1]

    def _dense(self, dim: int) -> int:
        return TuckerKeys.size(dim, **self.keys_of(dim)) + self.expand * self.widths(dim)[1] * dim

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (math.prod(self.pool_size(dim)) if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * self.widths(dim)[1]

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=6, topk=4),
            cls(keys=5, heads=1, topk=5, rank=3, key_dim=4, value_dim=6, expand=1, cores=3, query="shared", core_loss=0.0),
            cls(keys=8, heads=3, topk=2, rank=1, value_dim=16, cores=1, expand=9, pool="slots"),
        ]


class UltraMem(TuckerKeys):
    def __init__(self, cfg: UltraMemConfig, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__(dim, **cfg.keys_of(dim), topk=cfg.topk, axis=cfg.topk)
        self.cfg = cfg
        self.values: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)
        self.out = Linear(cfg.expand * cfg.widths(dim)[1], dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        cfg = self.cfg
        self.init_keys_(generator)
        self.values.init_(generator, std=math.sqrt(cfg.expand / (2 * cfg.topk * cfg.heads * depth)))
        normal_(self.out.weight, 1 / math.sqrt(self.out.in_features), generator)
        self.calibrate_(generator)

    def forward(self, x: Tensor) -> Fed:
        found = self.find(x)
        o = self.values.bag(found.rows, found.own, x, groups=found.blocks, n_groups=self.cfg.expand)  # [B, T, E, V]
        aux = found.gauges | self.values.gauges(found.rows, found.own)
        if self.cfg.core_loss and self.rank > 1:
            over = (torch.linalg.svdvals(found.core)[:, 1:] - TAU).clamp(min=0)  # [H, r - 1]
            aux["loss/core"] = self.cfg.core_loss / (self.rank - 1) * over.square().sum(-1).mean()
        return Fed(self.out(o.flatten(-2)), aux)
