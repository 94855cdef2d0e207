"""Gated linear attention (Yang et al. 2023): every channel of a key forgets at its own rate, chosen by the token.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t / sqrt(K);  y_t = W_o [RMSNorm(o_t) * SiLU(W_g x_t)]

a_t = sigmoid(W_2 W_1 x_t + b)^(1/temper) in (0, 1)^K, through a bottleneck of `rank`. The paper has keys of half the model's width, no positions and no
convolution. `conv`, `init` and another `bias` than 0 are ours, for small recall runs.

    H heads   K key width   V value width   S [K, V] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import State
from memarch.kernels.gated_linear import gated_linear
from memarch.kernels.gated_linear.torch_impl import CHUNK
from memarch.layers.parts import Linear
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.recurrent import Ends, Recurrent, RecurrentConfig, Rule


@dataclass(frozen=True, kw_only=True)
class GLAConfig(RecurrentConfig):
    kind: Literal["gla"] = "gla"
    heads: int = 4
    head_dim: int | None = None  # width of keys; None: half of dim / heads, as in the paper
    value_dim: int | None = None  # width of values of one head; None: dim / heads
    rank: int = 16
    temper: float = 16.0  # the larger, the slower everything is forgotten
    bias: float = 0.0  # b at init: a large one starts with a memory that keeps
    conv: int = 0  # taps of a short convolution on q, k, v, then SiLU; 0 for none
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2312.06635"

    def __post_init__(self) -> None:
        require(self.heads > 0 and self.rank > 0, f"heads and rank must be at least 1, got {self.heads} and {self.rank}.")
        require(self.temper > 0, f"temper must be above 0, got {self.temper}.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")

    def rule(self, dim: int) -> "GLARule":
        value = key_width(self.heads, self.value_dim, dim)
        return GLARule(self.heads, self.head_dim or max(1, value // 2), value, self.rank, self.temper, self.bias)

    def ends(self) -> Ends:
        return Ends(self.conv, act=self.conv > 0, recall=self.init == "recall")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "GLA":
        return GLA(dim, self)

    def span(self) -> int:
        return max(CHUNK, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2, rank=3), cls(heads=3, head_dim=4, value_dim=6, rank=2, temper=4.0, bias=2.0, conv=2, init="recall")]


class GLARule(Rule):
    gates = "low"  # W_1

    def __init__(self, heads: int, key: int, value: int, rank: int = 16, temper: float = 16.0, bias: float = 0.0):
        super().__init__(heads, key, value)
        self.raw, self.temper, self.bias = rank, temper, bias

    def make(self, owner: Any) -> None:
        owner.up = Linear(self.raw, self.heads * self.key, bias=True)  # W_2, b

    def num_params(self) -> int:
        return (self.raw + 1) * self.heads * self.key

    def init_(self, owner: Any, generator: torch.Generator) -> None:
        owner.up.init_(generator)
        owner.up.bias.fill_(self.bias)

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Any, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        wide = torch.promote_types(v.dtype, torch.float32)
        g = F.logsigmoid(owner.up(raw).to(wide)).unflatten(-1, (self.heads, -1)) / self.temper  # [B, T, H, K]
        return gated_linear(q * self.key**-0.5, k, v, g, memory, lengths=lengths)


class GLA(Recurrent):
    """A matrix memory that forgets by the key channel."""
