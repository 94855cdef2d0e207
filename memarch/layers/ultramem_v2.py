"""UltraMemV2 (Huang et al. 2025): a feed-forward and, beside it, a small memory; one in every block.

    scores s, rows: parts/tucker_keys.py; a query for every rank, all E addresses of a row alike
    p_r = <P[r], W_pre x>                            pre-values, as PEER's experts have, but without an activation
    y = SwiGLU(x) + W_out sum over rows of s p V[r]  slice c of the columns weighed with core c's own score

The paper's models have 1 head and rows of 1 : 1 to 1 : 3 pre-values to values. A layer keeps at most 128 rows and columns of its keys, among whose
cells it takes `topk`. Its layers may share their rows as a ring, each seeing a window: pools of `window` keys^2 (parts/pool.py), one for
values and one for pre-values.

At init, after the paper's appendix A: every linear map has standard deviation sqrt(2 / 5D), that back into the residual stream of the feed-forward
1 / sqrt(2L) of it; kept scores have mean 1 and, measured here, deviation sigma; and the tables have

    sigma_V^4 = 0.2 hidden / (topk H (1 + sigma^2) D_p V L)

so that the memory's output starts with the variance of the feed-forward's, which the paper takes to be 0.064 (hidden / D) / 2L. That counts SiLU's
second moment as 0.4; it is 0.123, so the memory starts 1.8 times as large. match "measured" puts that right.

    D width   H heads   D_p pre-value width   V value width   E addresses of a row   L depth
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import Fed, under
from memarch.layers.parts import Linear
from memarch.layers.parts.linear import normal_, small
from memarch.layers.parts.pool import Borrowed, ValuePool, claim
from memarch.layers.parts.tucker_keys import TuckerKeys, check_slices, check_tucker
from memarch.layers.swiglu import SwiGLU, SwiGLUConfig

AXIS = 128  # rows and columns kept at most


@dataclass(frozen=True, kw_only=True)
class UltraMemV2Config(LayerConfig):
    kind: Literal["ultramem_v2"] = "ultramem_v2"
    hidden: int | None = None  # of the feed-forward; None: as in swiglu. 0: the memory alone
    keys: int = 128  # n: the layer sees keys^2 rows
    heads: int = 1
    topk: int = 32  # cells a head
    axis_topk: int | None = None  # rows and columns among which they are sought; None: as many as topk, up to 128
    rank: int = 2
    key_dim: int | None = None  # of one rank; None: a quarter of the width
    pre_dim: int | None = None  # None: a quarter of the width
    value_dim: int | None = None  # None: a quarter of the width
    expand: int = 1  # E, a square: keys of an axis are sqrt(E) n
    cores: int = 2
    match: Literal["paper", "measured"] = "paper"
    pool: str | None = None  # values: a pool of the model; None: a table of its own
    pre_pool: str | None = None  # pre-values

    paper: ClassVar[str] = "Huang et al. 2025, arXiv 2508.18756"

    def __post_init__(self) -> None:
        check_tucker(self.keys, self.heads, self.rank, self.expand, self.cores, self.topk, self.axis())
        require(self.hidden is None or self.hidden >= 0, f"hidden must be at least 1, or 0 for no feed-forward, got {self.hidden}.")
        require(self.pool is None or self.pool != self.pre_pool, f"values and pre-values need a pool each, and both are {self.pool!r}.")

    def axis(self) -> int:
        return self.axis_topk or min(self.topk, AXIS, math.isqrt(self.expand) * self.keys)

    def widths(self, dim: int) -> tuple[int, int, int]:
        """Of a key of one rank, a pre-value, a value."""
        quarter = max(1, dim // 4)
        check_slices(self.cores, self.value_dim or quarter)
        return self.key_dim or quarter, self.pre_dim or quarter, self.value_dim or quarter

    def ffn(self) -> SwiGLUConfig | None:
        return None if self.hidden == 0 else SwiGLUConfig(hidden=self.hidden)

    def keys_of(self, dim: int) -> dict[str, int]:
        """What TuckerKeys is made of."""
        shape = {"heads": self.heads, "keys": self.keys, "expand": self.expand, "rank": self.rank, "cores": self.cores}
        return {**shape, "key_dim": self.widths(dim)[0], "queries": self.rank}

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "UltraMemV2":
        return UltraMemV2(self, dim, pools)

    def pool_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, self.widths(dim)[2]

    def pre_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, self.widths(dim)[1]

    def borrows(self, dim: int) -> dict[str, tuple[int, int]]:
        return super().borrows(dim) | ({} if self.pre_pool is None else {self.pre_pool: self.pre_size(dim)})

    def _dense(self, dim: int) -> int:
        _, pre, value = self.widths(dim)
        ffn = self.ffn()
        return TuckerKeys.size(dim, **self.keys_of(dim)) + dim * (pre + value) + (0 if ffn is None else ffn.num_params(dim))

    def num_params(self, dim: int) -> int:
        own = (None if self.pool else self.pool_size(dim), None if self.pre_pool else self.pre_size(dim))
        return self._dense(dim) + sum(math.prod(size) for size in own if size)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * sum(self.widths(dim)[1:])

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=6, topk=4, key_dim=4, hidden=24),
            cls(keys=6, heads=2, topk=9, axis_topk=3, rank=3, pre_dim=3, value_dim=6, expand=4, cores=3, match="measured"),
            cls(keys=5, topk=20, axis_topk=5, rank=1, cores=1, hidden=0, pool="cells", pre_pool="gates"),
        ]


class UltraMemV2(TuckerKeys):
    def __init__(self, cfg: UltraMemV2Config, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__(dim, **cfg.keys_of(dim), topk=cfg.topk, axis=cfg.axis())
        self.cfg = cfg
        _, pre, value = cfg.widths(dim)
        self.pre = Linear(dim, pre)
        self.gates: ValuePool | Borrowed = claim(cfg.pre_pool, *cfg.pre_size(dim), pools)
        self.values: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)
        self.out = Linear(value, dim)
        ffn = cfg.ffn()
        self.ffn = None if ffn is None else SwiGLU(ffn, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        cfg, dim = self.cfg, self.query.in_features
        _, pre, value = cfg.widths(dim)
        self.init_keys_(generator)
        spread = self.calibrate_(generator)
        hidden = (cfg.ffn() or SwiGLUConfig()).width(dim)
        std = (0.2 * hidden / (cfg.topk * cfg.heads * (1 + spread**2) * pre * value * depth)) ** 0.25
        if cfg.match == "measured":
            std *= (second_moment() / 0.4) ** 0.25
        for table in (self.gates, self.values):
            table.init_(generator, std)
        self.pre.init_(generator)
        normal_(self.out.weight, small(dim), generator)
        if self.ffn is not None:
            self.ffn.init_(depth, generator)
            normal_(self.ffn.down.weight, small(dim) / math.sqrt(2 * depth), generator)

    def forward(self, x: Tensor) -> Fed:
        found = self.find(x)
        p = self.gates.dot(found.rows, self.pre(x))  # [B, T, H k]
        y = self.out(self.values.bag(found.rows, found.own * p[..., None], x))
        aux = found.gauges | self.values.gauges(found.rows, found.own)
        if self.ffn is None:
            return Fed(y, aux)
        fed = self.ffn(x)
        return Fed(y + fed.y, aux | under("ffn", fed.aux))


def second_moment() -> float:
    """E[silu(g)^2] for the gate's g at init, of variance 0.4; by quadrature."""
    g = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-g.square() / 0.8)
    return float((F.silu(g).square() * density).sum() / density.sum())
