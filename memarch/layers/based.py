"""Based's linear attention (Arora et al. 2024): softmax attention with exp replaced by its Taylor expansion, so the past is a matrix.

    w_tj = 1 + a + a^2/2,  a = q_t . k_j / sqrt(F)      y_t = W_o [ sum_{j<=t} w_tj v_j / sum_{j<=t} w_tj ]

F is small (16): the expansion has 1 + F + F (F + 1) / 2 features (153), and the state is that many times the width of a value, plus one for
the normaliser. No positions; the paper's models put short convolutions and small windows beside it. The authors' fast kernel leaves the
denominator out and normalises every head instead: normalize "rms". `conv` and `init` are ours, for small recall runs.

    H heads   F feature width   V value width   E features   S [E, V + 1] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.taylor_attention import features, taylor_attention
from memarch.kernels.taylor_attention.torch_impl import QUADRATIC
from memarch.layers.parts import Linear, RMSNorm
from memarch.layers.parts.heads import Heads, key_width


@dataclass(frozen=True, kw_only=True)
class BasedConfig(LayerConfig):
    kind: Literal["based"] = "based"
    heads: int = 4
    feature_dim: int = 16  # width of queries and keys of one head
    head_dim: int | None = None  # width of values of one head; None: dim / heads
    normalize: Literal["denominator", "rms"] = "denominator"
    conv: int = 0  # taps of a short convolution on q, k, v; 0 for none
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Arora et al. 2024, arXiv 2402.18668"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")
        require(self.feature_dim > 0, f"feature_dim must be at least 1, got {self.feature_dim}.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")

    def width(self, dim: int) -> int:
        return key_width(self.heads, self.head_dim, dim)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "Based":
        return Based(self, dim)

    def num_params(self, dim: int) -> int:
        value = self.width(dim)
        into = Heads.num_params(dim, self.heads, self.feature_dim, value, self.conv)
        return into + self.heads * value * dim + value * (self.normalize == "rms")

    def span(self) -> int:
        return max(QUADRATIC // 3 + 1, self.conv)  # three of them are more than the op does as one square

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2, feature_dim=4), cls(heads=3, feature_dim=3, head_dim=6, normalize="rms"), cls(heads=2, feature_dim=5, conv=3, init="recall")]


class BasedState(NamedTuple):
    memory: Tensor  # [B, H, E, V + 1], fp32 at least
    tail: Tensor  # [B, conv - 1, H (2F + V)]


class Based(SequenceMixer):
    def __init__(self, cfg: BasedConfig, dim: int):
        super().__init__()
        self.heads, self.feature, self.value, self.recall = cfg.heads, cfg.feature_dim, cfg.width(dim), cfg.init == "recall"
        self.into = Heads(dim, self.heads, self.feature, self.value, cfg.conv, act=False)
        self.norm = RMSNorm(self.value, eps=1e-5) if cfg.normalize == "rms" else None
        self.out = Linear(self.heads * self.value, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator, self.recall)
        if self.norm is not None:
            self.norm.init_()
        self.out.init_(generator, depth)

    def start(self, batch: int) -> BasedState:
        weight = self.out.weight
        memory = weight.new_zeros(batch, self.heads, features(self.feature), self.value + 1, dtype=torch.promote_types(weight.dtype, torch.float32))
        return BasedState(memory, self.into.start(batch))

    def forward(self, x: Tensor, state: BasedState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        q, k, v, tail = self.into(x, tail, lengths)  # [B, T, H, F or V]
        o, total, memory = taylor_attention(q * self.feature**-0.5, k, v, memory, lengths=lengths)
        o = o / total.clamp(min=0.25)[..., None] if self.norm is None else self.norm(o)  # a weight is at least 1/2; at pads the total is 0
        return Mixed(self.out(o.flatten(2).to(x.dtype)), BasedState(memory, tail))
