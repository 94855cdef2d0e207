"""DeltaNet (Yang et al. 2024): a matrix memory that overwrites what it stored under a key, and never forgets by itself.

    S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T;  o_t = S_t^T q_t / sqrt(K);  y_t = W_o RMSNorm(o_t)

q, k, v come through a short convolution and SiLU, q and k have unit length. b_t = sigmoid(w_b x_t), twice that if `negative`: an erasure
beyond zero lets the memory track parity (Grazzi et al. 2024).

    H heads   K key width   V value width   S [K, V] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import State
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.norm import l2_norm
from memarch.layers.parts.recurrent import Ends, Recurrent, RecurrentConfig, Rule


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(RecurrentConfig):
    kind: Literal["delta_net"] = "delta_net"
    heads: int = 4
    head_dim: int | None = None  # width of keys; None: dim / heads
    value_dim: int | None = None  # width of values of one head; None: head_dim
    conv: int = 4  # taps; 0 for none
    negative: bool = False  # write strengths up to 2
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2406.06484"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")

    def widths(self, dim: int) -> tuple[int, int]:
        key = key_width(self.heads, self.head_dim, dim)
        return key, self.value_dim or key

    def rule(self, dim: int) -> "DeltaNetRule":
        return DeltaNetRule(self.heads, *self.widths(dim), self.negative)

    def ends(self) -> Ends:
        return Ends(self.conv, gate=False, recall=self.init == "recall")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "DeltaNet":
        return DeltaNet(dim, self)

    def span(self) -> int:
        return max(CHUNK, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, conv=0, negative=True), cls(heads=2, conv=2, init="recall")]


class DeltaNetRule(Rule):
    gates = "b"  # the raw write strength

    def __init__(self, heads: int, key: int, value: int, negative: bool = False):
        super().__init__(heads, key, value)
        self.raw, self.negative = heads, negative

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Any, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        beta = raw.to(torch.promote_types(v.dtype, torch.float32)).sigmoid() * (2 if self.negative else 1)  # [B, T, H]
        return delta_rule(l2_norm(q, self.key**-0.5), l2_norm(k), v, beta, None, memory, lengths=lengths)


class DeltaNet(Recurrent):
    """A matrix memory that overwrites."""
