"""Product-key memory (Lample et al. 2019): a table of n^2 rows, found by the sum of two scores over n sub-keys each.

    q = LayerNorm(W_q x + b), halves q1, q2;  s1 = K1 q1, s2 = K2 q2;  rows = the k best of s1[i] + s2[j], row i n + j
    y = sum over heads and rows of softmax(s)_r V[r]

The top-k is exact: no row of the k best lies outside the k best of either axis. Batch norm on the query, the paper's choice, sees later
tokens in training; layer norm keeps the layer causal.

    H heads   n sub-keys an axis   k rows a head   Q query width (both halves)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import ChannelMixer, Fed
from memarch.kernels.product_key_topk import product_key_topk
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers.parts import Linear
from memarch.layers.parts.linear import uniform
from memarch.layers.parts.pool import Borrowed, ValuePool, claim


@dataclass(frozen=True, kw_only=True)
class PKMConfig(LayerConfig):
    kind: Literal["pkm"] = "pkm"
    keys: int = 128  # sub-keys an axis: the table has keys^2 rows
    heads: int = 4
    topk: int = 32
    query_dim: int = 128  # both halves
    query_norm: Literal["layer", "none"] = "layer"
    pool: str | None = None  # a pool of the model; None: a table of its own

    paper: ClassVar[str] = "Lample et al. 2019, arXiv 1907.05242"

    def __post_init__(self) -> None:
        require(self.keys > 0 and self.heads > 0, f"keys and heads must be at least 1, got {self.keys} and {self.heads}.")
        require(0 < self.topk <= self.keys, f"topk must be between 1 and keys ({self.keys}), got {self.topk}: only then is the search exact.")
        require(self.query_dim > 0 and self.query_dim % 2 == 0, f"query_dim is two halves, so it must be even, got {self.query_dim}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "PKM":
        return PKM(self, dim, pools)

    def _dense(self, dim: int) -> int:
        query = self.heads * self.query_dim
        return dim * query + query + query * self.keys + (2 * query if self.query_norm == "layer" else 0)

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (self.keys**2 * dim if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * dim

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=8, heads=2, topk=4, query_dim=8),
            cls(keys=5, heads=3, topk=5, query_dim=6, query_norm="none"),
            cls(keys=8, heads=1, topk=2, query_dim=4, pool="facts"),
        ]


class PKM(ChannelMixer):
    def __init__(self, cfg: PKMConfig, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__()
        self.cfg = cfg
        size = cfg.heads * cfg.query_dim
        self.query = Linear(dim, size, bias=True)
        self.norm = nn.LayerNorm(size) if cfg.query_norm == "layer" else None
        self.keys = nn.Parameter(torch.empty(2, cfg.heads, cfg.keys, cfg.query_dim // 2))
        self.values: ValuePool | Borrowed = claim(cfg.pool, cfg.keys**2, dim, pools)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.query.init_(generator)
        if self.norm is not None:
            self.norm.reset_parameters()
        bound = 1 / math.sqrt(self.cfg.query_dim // 2)
        self.keys.copy_(uniform(tuple(self.keys.shape), -bound, bound, generator))
        if isinstance(self.values, ValuePool):
            self.values.init_(generator)

    def forward(self, x: Tensor) -> Fed:
        cfg = self.cfg
        q = self.query(x)
        q = q if self.norm is None else self.norm(q)
        # Scores are fp32 at least: bf16 scores tie often, and a tie is an arbitrary choice of rows.
        wide = torch.promote_types(x.dtype, torch.float32)
        halves = q.to(wide).unflatten(-1, (cfg.heads, 2, -1))  # [B, T, H, 2, Q/2]
        s1, s2 = torch.einsum("bthaq,ahnq->abthn", halves, self.keys.to(wide)).unbind(0)  # [B, T, H, n]
        scores, ids = product_key_topk(s1, s2, cfg.topk)  # [B, T, H, k]
        weights = F.softmax(scores, -1)
        table = self.values.pool.table if isinstance(self.values, Borrowed) else self.values.table
        y = weighted_bag(table, ids.flatten(-2), weights.flatten(-2).to(table.dtype))  # [B, T, D]
        return Fed(y.to(x.dtype), {"entropy": -(weights * scores.log_softmax(-1)).sum(-1).mean().detach()})
