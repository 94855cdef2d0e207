"""Retention (Sun et al. 2023): linear attention with a fixed decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t / sqrt(K);  y_t = W_o [RMSNorm(o_t) * SiLU(W_g x_t)]

gamma_h = 1 - 2^(-5-h) for head h = 0, 1, ..: nothing of it is learned. q and k are turned by their positions.

    H heads   K key width   V value width   S [K, V] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import State
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.recurrent import Ends, Recurrent, RecurrentConfig, Rule
from memarch.layers.parts.rope import rotate


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(RecurrentConfig):
    kind: Literal["retnet"] = "retnet"
    heads: int = 4
    head_dim: int | None = None  # width of keys; None: dim / heads
    value_dim: int | None = None  # width of values of one head; None: twice head_dim, as in the paper
    rope_base: float = 10000.0

    paper: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")

    def widths(self, dim: int) -> tuple[int, int]:
        key = key_width(self.heads, self.head_dim, dim)
        return key, self.value_dim or 2 * key

    def rule(self, dim: int) -> "RetNetRule":
        return RetNetRule(self.heads, *self.widths(dim), self.rope_base)

    def ends(self) -> Ends:
        return Ends(act=False)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "RetNet":
        return RetNet(dim, self)

    def span(self) -> int:
        return CHUNK

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, rope_base=500.0)]


class RetNetMemory(NamedTuple):
    memory: Tensor  # [B, H, K, V], fp32 at least
    pos: Tensor  # [B] int64: tokens seen


class RetNetRule(Rule):
    def __init__(self, heads: int, key: int, value: int, base: float = 10000.0):
        super().__init__(heads, key, value)
        require(key % 2 == 0, f"rotary positions turn pairs, so head_dim must be even, got {key}.")
        self.base = base

    def start(self, batch: int, like: Tensor) -> RetNetMemory:
        return RetNetMemory(self.zeros(batch, like, self.value), torch.zeros(batch, dtype=torch.int64, device=like.device))

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Any, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        B, T = q.shape[:2]
        S, pos = self.start(B, v) if memory is None else memory
        at = pos[:, None] + torch.arange(T, device=q.device)  # [B, T]
        q, k = rotate(q, at, self.base), rotate(k, at, self.base)
        rate = torch.log1p(-(2.0 ** -(5 + torch.arange(self.heads, device=q.device, dtype=S.dtype))))  # log gamma [H]
        o, S = delta_rule(q * self.key**-0.5, k, v, None, rate.expand(B, T, -1), S, lengths=lengths)
        return o, RetNetMemory(S, pos + (T if lengths is None else lengths))


class RetNet(Recurrent):
    """A matrix memory with fixed decays."""
