"""Memory+ (Berges et al. 2024): product-key memory whose answer is gated by the token, with one table shared by several layers.

    m = sum over heads and rows of softmax(s)_r V[r]      as in PKM
    y = W_2 (m * SiLU(W_1 x))

The paper replaces the feed-forward of three layers far apart and lets them read one table: give them the same `pool`. qk_norm keeps the
scores of small models with large tables from saturating; its form is not printed, ours is in `parts/product_keys.py`.

    H heads   n sub-keys an axis   k rows a head   V value width
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import Fed
from memarch.layers.parts import Linear
from memarch.layers.parts.pool import Borrowed, ValuePool, claim
from memarch.layers.parts.product_keys import ProductKeys, check_keys, gauges


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig(LayerConfig):
    kind: Literal["memory_plus"] = "memory_plus"
    keys: int = 128  # sub-keys an axis: the table has keys^2 rows
    heads: int = 4
    topk: int = 32
    query_dim: int | None = None  # both halves; None: half of the width
    value_dim: int | None = None  # width of a row; None: the width
    qk_norm: bool = False
    gate: bool = True  # False: y = W_2 m
    pool: str | None = None  # a pool of the model; None: a table of its own

    paper: ClassVar[str] = "Berges et al. 2024, arXiv 2412.09764"

    def __post_init__(self) -> None:
        check_keys(self.keys, self.heads, self.topk, self.query_dim or 2)
        require(self.value_dim is None or self.value_dim > 0, f"value_dim must be at least 1, got {self.value_dim}.")

    def widths(self, dim: int) -> tuple[int, int]:
        """Of queries, of values."""
        return self.query_dim or max(2, dim // 4 * 2), self.value_dim or dim

    def norm(self) -> Literal["half", "none"]:
        return "half" if self.qk_norm else "none"

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "MemoryPlus":
        return MemoryPlus(self, dim, pools)

    def _dense(self, dim: int) -> int:
        query, value = self.widths(dim)
        return ProductKeys.size(dim, self.heads, self.keys, query, self.norm()) + (1 + self.gate) * dim * value

    def pool_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, self.widths(dim)[1]

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (math.prod(self.pool_size(dim)) if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * self.widths(dim)[1]

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=8, heads=2, topk=4),
            cls(keys=5, heads=3, topk=5, query_dim=6, value_dim=10, qk_norm=True, gate=False),
            cls(keys=8, heads=1, topk=2, pool="facts"),
        ]


class MemoryPlus(ProductKeys):
    def __init__(self, cfg: MemoryPlusConfig, dim: int, pools: Mapping[str, nn.Module]):
        query, value = cfg.widths(dim)
        super().__init__(dim, cfg.heads, cfg.keys, cfg.topk, query, cfg.norm())
        self.values: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)
        self.gate = Linear(dim, value) if cfg.gate else None
        self.out = Linear(value, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.init_keys_(generator)
        self.values.init_(generator)
        if self.gate is not None:
            self.gate.init_(generator)
        self.out.init_(generator, depth)

    def forward(self, x: Tensor) -> Fed:
        scores, ids = self.find(x)  # [B, T, H, k]
        weights = F.softmax(scores, -1)
        m = self.values.bag(ids.flatten(-2), weights.flatten(-2), x)  # [B, T, V]
        return Fed(self.out(m if self.gate is None else m * F.silu(self.gate(x))), gauges(scores, weights) | self.values.gauges(ids, weights))
