"""Linear attention: a sum of outer products, read with the query.

    S_t = S_{t-1} + phi(k_t) v_t^T;  o_t = S_t^T phi(q_t)

feature "elu" is Katharopoulos et al. 2020: phi(x) = elu(x) + 1 is positive, and o_t is divided by phi(q_t) . sum phi(k), as attention
divides by its weights. feature "product" learns phi as the product of two linear maps; its sums may vanish, so nothing is divided, the
read is scaled by 1 / sqrt(K), and the norm of every head decides its size.

    H heads   K key width   V value width   S [K, V] memory of one head, with a column for the normaliser if there is one
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import Heads, Readout, key_width
from memarch.layers.parts.linear import normal_


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(LayerConfig):
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

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "LinearAttention":
        return LinearAttention(self, dim)

    def num_params(self, dim: int) -> int:
        key, value = self.widths(dim)
        maps = 4 * key * key if self.feature == "product" else 0
        return Heads.num_params(dim, self.heads, key, value) + maps + Readout.num_params(dim, self.heads, value, gate=False)

    def span(self) -> int:
        return CHUNK

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, feature="product")]


class LinearAttentionState(NamedTuple):
    memory: Tensor  # [B, H, K, V (+ 1)], fp32 at least


class LinearAttention(SequenceMixer):
    def __init__(self, cfg: LinearAttentionConfig, dim: int):
        super().__init__()
        self.cfg = cfg
        self.key, self.value = cfg.widths(dim)
        self.into = Heads(dim, cfg.heads, self.key, self.value, act=False)
        self.maps = nn.Parameter(torch.empty(4, self.key, self.key)) if cfg.feature == "product" else None  # two for q, two for k, all heads
        self.read = Readout(dim, cfg.heads, self.value, gate=False)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator)
        if self.maps is not None:
            normal_(self.maps, self.key**-0.5, generator)
        self.read.init_(depth, generator)

    def start(self, batch: int) -> LinearAttentionState:
        return LinearAttentionState(self.read.memory(batch, self.cfg.heads, self.key, self.value + (self.maps is None)))

    def forward(self, x: Tensor, state: LinearAttentionState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        q, k, v, _ = self.into(x, None, lengths)  # [B, T, H, K or V]
        if self.maps is not None:
            a, b, c, d = self.maps.to(x.dtype)
            q, k = (q @ a) * (q @ b) * self.key**-0.5, (k @ c) * (k @ d)
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            v = F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)  # the normaliser is a long sum: fp32 at least
        o, memory = delta_rule(q, k, v, None, None, None if state is None else state.memory, lengths=lengths)
        if self.maps is None:
            o, total = o[..., :-1], o[..., -1:]
            o = o / torch.where(total > 0, total, 1.0)  # 0 at pads only
        return Mixed(self.read(o, x), LinearAttentionState(memory))
