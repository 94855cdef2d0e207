"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024): a matrix memory that forgets, and overwrites what it stored under a key.

    S_t = a_t S_{t-1};  S_t <- S_t + b_t k_t (v_t - S_t^T k_t)^T;  o_t = S_t^T q_t / sqrt(K)

q, k, v come through a short convolution and SiLU; q and k have unit length. a_t = exp(-A softplus(w_a x_t + dt)), b_t = sigmoid(w_b x_t).
The read is normalised per head and gated, y_t = W_o [RMSNorm(o_t) * SiLU(W_g x_t)].

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
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.gates import decay_, step_bias_
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.norm import l2_norm
from memarch.layers.parts.recurrent import Ends, Recurrent, RecurrentConfig, Rule


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(RecurrentConfig):
    kind: Literal["gated_delta"] = "gated_delta"
    heads: int = 4
    head_dim: int | None = None  # width of keys; None: dim / heads
    value_dim: int | None = None  # width of values of one head; None: head_dim
    conv: int = 4  # taps; 0 for none
    gate: bool = True  # gate the output
    decay: tuple[float, float] = (0.0, 16.0)  # A at init is uniform in here; small values forget slowly
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2412.06464"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")
        require(0 <= self.decay[0] <= self.decay[1], f"decay is a range (low, high) with 0 <= low <= high, got {self.decay}.")

    def widths(self, dim: int) -> tuple[int, int]:
        key = key_width(self.heads, self.head_dim, dim)
        return key, self.value_dim or key

    def rule(self, dim: int) -> "GatedDeltaRule":
        return GatedDeltaRule(self.heads, *self.widths(dim), self.decay)

    def ends(self) -> Ends:
        return Ends(self.conv, gate=self.gate, recall=self.init == "recall")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "GatedDelta":
        return GatedDelta(dim, self)

    def span(self) -> int:
        return max(CHUNK, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, conv=0, gate=False), cls(heads=2, conv=2, decay=(1e-3, 1.0), init="recall")]


class GatedDeltaRule(Rule):
    gates = "ab"  # the raw decay and the raw write strength

    def __init__(self, heads: int, key: int, value: int, decay: tuple[float, float] = (0.0, 16.0)):
        super().__init__(heads, key, value)
        self.raw, self.decay = 2 * heads, decay

    def make(self, owner: Any) -> None:
        owner.A_log = nn.Parameter(torch.empty(self.heads))
        owner.dt_bias = nn.Parameter(torch.empty(self.heads))

    def num_params(self) -> int:
        return 2 * self.heads

    def init_(self, owner: Any, generator: torch.Generator) -> None:
        decay_(owner.A_log, self.decay, generator)
        step_bias_(owner.dt_bias, generator)

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Any, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        wide = torch.promote_types(v.dtype, torch.float32)
        a, b = raw.to(wide).chunk(2, -1)  # [B, T, H]
        g = -owner.A_log.to(wide).exp() * F.softplus(a + owner.dt_bias.to(wide))
        return delta_rule(l2_norm(q, self.key**-0.5), l2_norm(k), v, b.sigmoid(), g, memory, lengths=lengths)


class GatedDelta(Recurrent):
    """A matrix memory that forgets and overwrites."""
