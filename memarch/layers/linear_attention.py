"""Linear attention: a sum of outer products, read with the query.

    S_t = S_{t-1} + phi(k_t) v_t^T;  o_t = S_t^T phi(q_t)

feature "elu" is Katharopoulos et al. 2020: phi(x) = elu(x) + 1 is positive, and o_t is divided by phi(q_t) . sum phi(k), as attention
divides by its weights. feature "product" learns phi as the product of two linear maps; its sums may vanish, so nothing is divided, the
read is scaled by 1 / sqrt(K), and the norm of every head decides its size.

    H heads   K key width   V value width   S [K, V] memory of one head, with a column for the normaliser if there is one
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import State
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.linear import normal_
from memarch.layers.parts.recurrent import Ends, Recurrent, RecurrentConfig, Rule


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(RecurrentConfig):
    kind: Literal["linear_attention"] = "linear_attention"
    heads: int = 4
    head_dim: int | None = None  # width of keys; None: dim / heads
    value_dim: int | None = None  # width of values of one head; None: head_dim
    feature: Literal["elu", "product"] = "elu"

    paper: ClassVar[str] = "Katharopoulos et al. 2020, arXiv 2006.16236"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")

    def widths(self, dim: int) -> tuple[int, int]:
        key = key_width(self.heads, self.head_dim, dim)
        return key, self.value_dim or key

    def rule(self, dim: int) -> "LinearAttentionRule":
        return LinearAttentionRule(self.heads, *self.widths(dim), self.feature)

    def ends(self) -> Ends:
        return Ends(act=False, gate=False)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "LinearAttention":
        return LinearAttention(dim, self)

    def span(self) -> int:
        return CHUNK

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, feature="product")]


class LinearAttentionRule(Rule):
    def __init__(self, heads: int, key: int, value: int, feature: str = "elu"):
        super().__init__(heads, key, value)
        self.product = feature == "product"

    def make(self, owner: Any) -> None:
        owner.maps = nn.Parameter(torch.empty(4, self.key, self.key)) if self.product else None  # two for q, two for k, all heads

    def num_params(self) -> int:
        return 4 * self.key**2 if self.product else 0

    def init_(self, owner: Any, generator: torch.Generator) -> None:
        if self.product:
            normal_(owner.maps, self.key**-0.5, generator)

    def start(self, batch: int, like: Tensor) -> Tensor:
        return self.zeros(batch, like, self.value + (not self.product))

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Any, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        if self.product:
            a, b, c, d = owner.maps.to(q.dtype)
            return delta_rule((q @ a) * (q @ b) * self.key**-0.5, (k @ c) * (k @ d), v, None, None, memory, lengths=lengths)
        v = F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)  # the normaliser is a long sum: fp32 at least
        o, memory = delta_rule(F.elu(q) + 1, F.elu(k) + 1, v, None, None, memory, lengths=lengths)
        o, total = o[..., :-1], o[..., -1:]
        return o / torch.where(total > 0, total, 1.0), memory  # 0 at pads only


class LinearAttention(Recurrent):
    """A matrix memory that only adds."""
