"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024): a matrix memory that forgets, and overwrites what it stored under a key.

    S_t = a_t S_{t-1};  S_t <- S_t + b_t k_t (v_t - S_t^T k_t)^T;  o_t = S_t^T q_t / sqrt(K)

q, k, v come through a short convolution and SiLU; q and k have unit length. a_t = exp(-A softplus(w_a x_t + dt)), b_t = sigmoid(w_b x_t).
The read is normalised per head and gated, y_t = W_o [RMSNorm(o_t) * SiLU(W_g x_t)].

    H heads   K key width   V value width   S [K, V] memory of one head
"""

import math
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
from memarch.layers.parts import Linear
from memarch.layers.parts.heads import Heads, Readout, key_width
from memarch.layers.parts.linear import uniform
from memarch.layers.parts.norm import l2_norm

DT = (1e-3, 0.1)  # the range of softplus(dt) at init, log-uniform: Mamba's, and everybody's since


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(LayerConfig):
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

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "GatedDelta":
        return GatedDelta(self, dim)

    def num_params(self, dim: int) -> int:
        key, value = self.widths(dim)
        gates = 2 * self.heads * dim + 2 * self.heads
        return Heads.num_params(dim, self.heads, key, value, self.conv) + gates + Readout.num_params(dim, self.heads, value, self.gate)

    def span(self) -> int:
        return max(CHUNK, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, conv=0, gate=False), cls(heads=2, conv=2, decay=(1e-3, 1.0), init="recall")]


class GatedDeltaState(NamedTuple):
    memory: Tensor  # [B, H, K, V], fp32 at least
    tail: Tensor  # [B, conv - 1, H (2K + V)]


class GatedDelta(SequenceMixer):
    def __init__(self, cfg: GatedDeltaConfig, dim: int):
        super().__init__()
        self.cfg, self.heads = cfg, cfg.heads
        self.key, self.value = cfg.widths(dim)
        self.into = Heads(dim, cfg.heads, self.key, self.value, cfg.conv)
        self.ab = Linear(dim, 2 * self.heads)  # the raw decay and the raw write strength
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.read = Readout(dim, cfg.heads, self.value, cfg.gate)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator, self.cfg.init == "recall")
        self.ab.init_(generator)
        low, high = self.cfg.decay
        self.A_log.copy_(uniform((self.heads,), low, high, generator).clamp(min=1e-4).log())
        dt = uniform((self.heads,), math.log(DT[0]), math.log(DT[1]), generator).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.read.init_(depth, generator)

    def start(self, batch: int) -> GatedDeltaState:
        return GatedDeltaState(self.read.memory(batch, self.heads, self.key, self.value), self.into.start(batch))

    def forward(self, x: Tensor, state: GatedDeltaState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        q, k, v, tail = self.into(x, tail, lengths)  # [B, T, H, K or V]
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = self.ab(x).to(wide).chunk(2, -1)  # [B, T, H]
        g = -self.A_log.to(wide).exp() * F.softplus(a + self.dt_bias.to(wide))
        o, memory = delta_rule(l2_norm(q) * self.key**-0.5, l2_norm(k), v, b.sigmoid(), g, memory, lengths=lengths)
        return Mixed(self.read(o, x), GatedDeltaState(memory, tail))
