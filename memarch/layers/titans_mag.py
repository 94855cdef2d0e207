"""Titans, memory as a gate (Behrouz et al. 2024): a window of attention and a long-term memory side by side, over the same tokens.

    x~ = [P ; x]      y = attention(x~)      m = LMM(x~)      o = RMSNorm(y) * sigmoid(RMSNorm(m))

P are learned persistent tokens at the start of every stream: attention sees them for ever beside its window, the memory reads them once, what they
themselves would answer is dropped. The paper calls the product "gating": both sides normalised, then a nonlinearity. This is one reading of it;
`mix: mean` is the other, half the sum of both.

    P persistent tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import Mixed, under
from memarch.layers.attention import AttentionConfig, AttentionState
from memarch.layers.parts.mix import Mix
from memarch.layers.parts.persistent import Persistent
from memarch.layers.parts.recurrent import RecurrentState
from memarch.layers.titans_lmm import TitansLMMConfig


@dataclass(frozen=True, kw_only=True)
class TitansMAGConfig(LayerConfig):
    kind: Literal["titans_mag"] = "titans_mag"
    persistent: int = 4  # tokens; 0 for none
    mix: Literal["gate", "mean"] = "gate"
    attention: AttentionConfig = field(default_factory=lambda: AttentionConfig(window=64))
    memory: TitansLMMConfig = field(default_factory=TitansLMMConfig)

    paper: ClassVar[str] = "Behrouz et al. 2024, arXiv 2501.00663"

    def __post_init__(self) -> None:
        check(self.persistent, self.attention)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "TitansMAG":
        return TitansMAG(self, dim)

    def num_params(self, dim: int) -> int:
        return self.persistent * dim + self.attention.num_params(dim) + self.memory.num_params(dim) + Mix.num_params(dim)

    def span(self) -> int:
        return max(self.attention.span(), self.memory.span(), self.persistent)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(attention=AttentionConfig(heads=2, window=5), memory=TitansLMMConfig(heads=2, chunk=6)),
            cls(persistent=0, mix="mean", attention=AttentionConfig(heads=2, window=7, conv=3), memory=TitansLMMConfig(heads=2, depth=1, shift=True)),
        ]


def check(persistent: int, attention: AttentionConfig) -> None:
    require(persistent >= 0, f"persistent counts tokens, 0 for none, got {persistent}.")
    require(attention.window is not None, "attention has a window here, the memory is for what lies beyond: set attention.window.")
    require(not attention.prefix and not attention.share, "attention.prefix is for persistent to set, and attention posts no note here: leave both out.")


class MAGState(NamedTuple):
    attention: AttentionState
    memory: RecurrentState


class TitansMAG(Persistent):
    def __init__(self, cfg: TitansMAGConfig, dim: int):
        super().__init__(dim, cfg.persistent)
        self.attention = replace(cfg.attention, prefix=cfg.persistent).make(dim, {})
        self.memory = cfg.memory.make(dim, {})
        self.mix = Mix(dim, cfg.mix)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        super().init_(depth, generator)
        self.attention.init_(depth, generator)
        self.memory.init_(depth, generator)
        self.mix.init_(depth)

    def grows(self) -> int | None:
        return self.attention.grows()

    def before(self, batch: int) -> MAGState:
        return MAGState(self.attention.start(batch), self.memory.start(batch))

    def run(self, x: Tensor, state: MAGState, lengths: Tensor | None) -> Mixed:
        y = self.attention(x, state.attention, lengths=lengths)
        m = self.memory(x, state.memory, lengths=lengths)
        return Mixed(self.mix(y.y, m.y), MAGState(y.state, m.state), under("memory", m.aux))
