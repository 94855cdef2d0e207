"""Retention (Sun et al. 2023): linear attention with a fixed decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t / sqrt(K);  y_t = W_o [RMSNorm(o_t) * SiLU(W_g x_t)]

gamma_h = 1 - 2^(-5-h) for head h = 0, 1, ..: nothing of it is learned. q and k are turned by their positions.

    H heads   K key width   V value width   S [K, V] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import Heads, Readout, key_width
from memarch.layers.parts.rope import rotate


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(LayerConfig):
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
        require(key % 2 == 0, f"rotary positions turn pairs, so head_dim must be even, got {key}.")
        return key, self.value_dim or 2 * key

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "RetNet":
        return RetNet(self, dim)

    def num_params(self, dim: int) -> int:
        key, value = self.widths(dim)
        return Heads.num_params(dim, self.heads, key, value) + Readout.num_params(dim, self.heads, value)

    def span(self) -> int:
        return CHUNK

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=3, head_dim=4, value_dim=6, rope_base=500.0)]


class RetNetState(NamedTuple):
    memory: Tensor  # [B, H, K, V], fp32 at least
    pos: Tensor  # [B] int64: tokens seen


class RetNet(SequenceMixer):
    def __init__(self, cfg: RetNetConfig, dim: int):
        super().__init__()
        self.cfg = cfg
        self.key, self.value = cfg.widths(dim)
        self.into = Heads(dim, cfg.heads, self.key, self.value, act=False)
        self.read = Readout(dim, cfg.heads, self.value)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator)
        self.read.init_(depth, generator)

    def start(self, batch: int) -> RetNetState:
        memory = self.read.memory(batch, self.cfg.heads, self.key, self.value)
        return RetNetState(memory, torch.zeros(batch, dtype=torch.int64, device=memory.device))

    def forward(self, x: Tensor, state: RetNetState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        B, T, _ = x.shape
        memory, pos = self.start(B) if state is None else state
        q, k, v, _ = self.into(x, None, lengths)  # [B, T, H, K or V]
        at = pos[:, None] + torch.arange(T, device=x.device)  # [B, T]
        q, k = rotate(q, at, self.cfg.rope_base), rotate(k, at, self.cfg.rope_base)
        rate = torch.log1p(-(2.0 ** -(5 + torch.arange(self.cfg.heads, device=x.device, dtype=memory.dtype))))  # log gamma [H]
        o, memory = delta_rule(q * self.key**-0.5, k, v, None, rate.expand(B, T, -1), memory, lengths=lengths)
        return Mixed(self.read(o, x), RetNetState(memory, pos + (T if lengths is None else lengths)))
