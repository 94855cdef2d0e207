"""Titans, memory as a layer (Behrouz et al. 2024): a long-term memory below a window of attention.

    x~ = [P ; x]      y = LMM(x~)      o = attention(RMSNorm(y))

P are learned persistent tokens at the start of every stream. The memory reads them once; for attention they are the first tokens, which the window
leaves behind, unless `prefix` keeps them in sight. The norm is not in the paper: it gives attention inputs of the size that every other one has.

    P persistent tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig
from memarch.contracts import Mixed, under
from memarch.layers.attention import AttentionConfig, AttentionState
from memarch.layers.parts.norm import RMSNorm
from memarch.layers.parts.persistent import Persistent
from memarch.layers.parts.recurrent import RecurrentState
from memarch.layers.titans_lmm import TitansLMMConfig
from memarch.layers.titans_mag import check


@dataclass(frozen=True, kw_only=True)
class TitansMALConfig(LayerConfig):
    kind: Literal["titans_mal"] = "titans_mal"
    persistent: int = 4  # tokens; 0 for none
    prefix: bool = False  # attention sees them for ever
    attention: AttentionConfig = field(default_factory=lambda: AttentionConfig(window=64))
    memory: TitansLMMConfig = field(default_factory=TitansLMMConfig)

    paper: ClassVar[str] = "Behrouz et al. 2024, arXiv 2501.00663"

    def __post_init__(self) -> None:
        check(self.persistent, self.attention)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "TitansMAL":
        return TitansMAL(self, dim)

    def num_params(self, dim: int) -> int:
        return (self.persistent + 1) * dim + self.attention.num_params(dim) + self.memory.num_params(dim)

    def span(self) -> int:
        return max(self.attention.span(), self.memory.span(), self.persistent)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(attention=AttentionConfig(heads=2, window=5), memory=TitansLMMConfig(heads=2, chunk=6)),
            cls(persistent=3, prefix=True, attention=AttentionConfig(heads=2, window=4), memory=TitansLMMConfig(heads=2, depth=1)),
            cls(persistent=0, attention=AttentionConfig(heads=2, window=7, conv=3), memory=TitansLMMConfig(heads=2, depth=1, shift=True)),
        ]


class MALState(NamedTuple):
    memory: RecurrentState
    attention: AttentionState


class TitansMAL(Persistent):
    def __init__(self, cfg: TitansMALConfig, dim: int):
        super().__init__(dim, cfg.persistent)
        self.memory = cfg.memory.make(dim, {})
        self.norm = RMSNorm(dim)
        self.attention = replace(cfg.attention, prefix=cfg.persistent * cfg.prefix).make(dim, {})

    def init_(self, depth: int, generator: torch.Generator) -> None:
        super().init_(depth, generator)
        self.memory.init_(depth, generator)
        self.norm.init_()
        self.attention.init_(depth, generator)

    def grows(self) -> int | None:
        return self.attention.grows()

    def before(self, batch: int) -> MALState:
        return MALState(self.memory.start(batch), self.attention.start(batch))

    def run(self, x: Tensor, state: MALState, lengths: Tensor | None) -> Mixed:
        m = self.memory(x, state.memory, lengths=lengths)
        y = self.attention(self.norm(m.y).to(x.dtype), state.attention, lengths=lengths)
        return Mixed(y.y, MALState(m.state, y.state), under("memory", m.aux))
