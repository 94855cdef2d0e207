"""PEER, a mixture of a million experts (He 2024): product keys find experts that are a single hidden neuron each.

    e_i(x) = act(u_i . x) v_i;   y = sum over heads and chosen experts of g_i e_i(x),  g = softmax over a head's k scores

All heads search the same sub-keys and share the experts; only their queries differ (public code has sub-keys per head: keys_per_head). The paper
normalises queries over the batch, which sees later tokens in training; `query_norm` keeps the layer causal. It replaces the middle block's feed-forward.

An expert is two neighbouring rows of one table, u then v: a pool for it has 2 keys^2 rows.

    H heads   n sub-keys an axis, n^2 experts   k experts a head
"""

import math
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
class PEERConfig(LayerConfig):
    kind: Literal["peer"] = "peer"
    keys: int = 256  # sub-keys an axis: keys^2 experts
    heads: int = 8
    topk: int = 16
    query_dim: int | None = None  # both halves; None: half of the width
    query_norm: Literal["layer", "half", "none"] = "layer"
    keys_per_head: bool = False
    act: Literal["gelu", "relu"] = "gelu"
    score: Literal["softmax", "sigmoid"] = "softmax"
    pool: str | None = None  # a pool of the model with 2 keys^2 rows; None: a table of its own

    paper: ClassVar[str] = "He 2024, arXiv 2407.04153"

    def __post_init__(self) -> None:
        check_keys(self.keys, self.heads, self.topk, self.query_dim or 2)

    def query(self, dim: int) -> int:
        return self.query_dim or max(2, dim // 4 * 2)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "PEER":
        return PEER(self, dim, pools)

    def _dense(self, dim: int) -> int:
        return ProductKeys.size(dim, self.heads, self.keys, self.query(dim), self.query_norm, self.keys_per_head)

    def pool_size(self, dim: int) -> tuple[int, int]:
        return 2 * self.keys**2, dim

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (math.prod(self.pool_size(dim)) if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + 2 * self.heads * self.topk * dim

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=8, heads=2, topk=4),
            cls(keys=5, heads=3, topk=5, query_dim=6, query_norm="none", keys_per_head=True, act="relu", score="sigmoid"),
            cls(keys=8, heads=1, topk=2, query_norm="half", pool="experts"),
        ]


class PEER(ProductKeys):
    def __init__(self, cfg: PEERConfig, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__(dim, cfg.heads, cfg.keys, cfg.topk, cfg.query(dim), cfg.query_norm, cfg.keys_per_head)
        self.cfg = cfg
        self.experts: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.init_keys_(generator)
        self.experts.init_(generator)

    def forward(self, x: Tensor) -> Fed:
        scores, ids = self.find(x)  # [B, T, H, k]
        g = (scores.softmax(-1) if self.cfg.score == "softmax" else scores.sigmoid()).flatten(-2)  # [B, T, H k]
        u = 2 * ids.flatten(-2)
        hidden = self.experts.dot(u, x)
        hidden = (F.gelu(hidden) if self.cfg.act == "gelu" else F.relu(hidden)) * g
        y = self.experts.bag(u + 1, hidden, x)
        return Fed(y, gauges(scores, g.view_as(scores)) | self.experts.gauges(ids, g.view_as(ids), self.keys.shape[2] ** 2))
