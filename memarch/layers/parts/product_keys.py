"""Finding rows of a table of n^2 by product keys: a query in two halves, n sub-keys for each, and the k best sums of one score of either side.

The search is exact: no row of the k best lies outside the k best of either axis.

    B rows   T tokens   H heads   n sub-keys an axis   k rows a head   Q query width (both halves)
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from memarch.config import require
from memarch.contracts import ChannelMixer
from memarch.kernels.product_key_topk import product_key_topk
from memarch.layers.parts.linear import Linear, uniform

QueryNorm = Literal["layer", "half", "none"]


class ProductKeys(ChannelMixer):
    """The retrieval half of PKM and its descendants; they say what is done with the rows. Not `per_head`: all heads search the same sub-keys.

    norm "layer": a LayerNorm over all queries of a token. "half": queries and sub-keys have unit root mean square in each half, times a learned gain that
    starts at (Q/2)^(-1/4), so that a score starts with a spread of about 1."""

    def __init__(self, dim: int, heads: int, keys: int, topk: int, query_dim: int, norm: QueryNorm, per_head: bool = True):
        super().__init__()
        self.heads, self.topk, self.side = heads, topk, query_dim // 2
        self.query = Linear(dim, heads * query_dim, bias=True)
        self.norm = nn.LayerNorm(heads * query_dim) if norm == "layer" else None
        self.keys = nn.Parameter(torch.empty(2, heads if per_head else 1, keys, self.side))
        self.gains = nn.Parameter(torch.empty(2, self.side)) if norm == "half" else None  # of queries, of sub-keys

    @staticmethod
    def size(dim: int, heads: int, keys: int, query_dim: int, norm: QueryNorm, per_head: bool = True) -> int:
        width = heads * query_dim
        return dim * width + width + (width if per_head else query_dim) * keys + {"layer": 2 * width, "half": query_dim, "none": 0}[norm]

    def init_keys_(self, generator: torch.Generator) -> None:
        self.query.init_(generator)
        if self.norm is not None:
            self.norm.reset_parameters()
        bound = 1 / math.sqrt(self.side)
        self.keys.copy_(uniform(tuple(self.keys.shape), -bound, bound, generator))
        if self.gains is not None:
            self.gains.fill_(self.side**-0.25)

    def find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> scores and row numbers [B, T, H, k], the best first. Scores are fp32 at least: bf16 scores tie often, and a tie is an
        arbitrary choice of rows."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q = self.query(x)
        q = (q if self.norm is None else self.norm(q)).to(wide).unflatten(-1, (self.heads, 2, self.side))  # [B, T, H, 2, Q/2]
        keys = self.keys.to(wide)
        if self.gains is not None:
            q, keys = (nn.functional.rms_norm(y, [self.side], gain.to(wide), 1e-6) for y, gain in zip((q, keys), self.gains, strict=True))
        s1, s2 = torch.einsum("bthaq,ahnq->abthn", q, keys.expand(-1, self.heads, -1, -1)).unbind(0)  # [B, T, H, n]
        return product_key_topk(s1, s2, self.topk)


def check_keys(keys: int, heads: int, topk: int, query_dim: int) -> None:
    require(keys > 0 and heads > 0, f"keys and heads must be at least 1, got {keys} and {heads}.")
    require(0 < topk <= keys, f"topk must be between 1 and keys ({keys}), got {topk}: only then is the search exact.")
    require(query_dim > 0 and query_dim % 2 == 0, f"query_dim is two halves, so it must be even, got {query_dim}.")


def gauges(scores: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """How sharply a token picks: the entropy of its weights in nats, the largest of them, the mean score that was kept."""
    weights = weights.detach()
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean()
    return {"entropy": entropy, "top1": weights[..., 0].mean(), "kept": scores.detach().mean()}
