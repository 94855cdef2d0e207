"""Product-key memory (Lample et al. 2019): a table of n^2 rows, found by the sum of two scores over n sub-keys each.

    q = LayerNorm(W_q x + b), halves q1, q2;  s1 = K1 q1, s2 = K2 q2;  rows = the k best of s1[i] + s2[j], row i n + j
    y = sum over heads and rows of softmax(s)_r V[r]

Batch norm on the query, the paper's choice, sees later
tokens in training; layer norm keeps the layer causal.

    H heads   n sub-keys an axis   k rows a head   Q query width (both halves)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig
from memarch.contracts import Fed
from memarch.layers.parts.pool import Borrowed, ValuePool, claim
from memarch.layers.parts.product_keys import ProductKeys, check_keys, gauges


@dataclass(frozen=True, kw_only=True)
class PKMConfig(LayerConfig):
    kind: Literal["pkm"] = "pkm"
    keys: int = 128  # sub-keys an axis: the table has keys^2 rows
    heads: int = 4
    topk: int = 32
    query_dim: int = 128  # both halves
    query_norm: Literal["layer", "half", "none"] = "layer"
    pool: str | None = None  # a pool of the model; None: a table of its own

    paper: ClassVar[str] = "Lample et al. 2019, arXiv 1907.05242"

    def __post_init__(self) -> None:
        check_keys(self.keys, self.heads, self.topk, self.query_dim)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "PKM":
        return PKM(self, dim, pools)

    def _dense(self, dim: int) -> int:
        return ProductKeys.size(dim, self.heads, self.keys, self.query_dim, self.query_norm)

    def pool_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, dim

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (self.keys**2 * dim if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * dim

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=8, heads=2, topk=4, query_dim=8),
            cls(keys=5, heads=3, topk=5, query_dim=6, query_norm="none"),
            cls(keys=8, heads=1, topk=2, query_dim=4, query_norm="half", pool="facts"),
        ]


class PKM(ProductKeys):
    def __init__(self, cfg: PKMConfig, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__(dim, cfg.heads, cfg.keys, cfg.topk, cfg.query_dim, cfg.query_norm)
        self.values: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.init_keys_(generator)
        self.values.init_(generator)

    def forward(self, x: Tensor) -> Fed:
        scores, ids = self.find(x)  # [B, T, H, k]
        weights = F.softmax(scores, -1)
        y = self.values.bag(ids.flatten(-2), weights.flatten(-2), x)  # [B, T, D]
        return Fed(y, gauges(scores, weights) | self.values.gauges(ids, weights))
