"""Recurrent Memory Transformer (Bulatov et al. 2022): m memory vectors go from segment to segment through the backbone itself.

    X_n = [M_{n-1} ; E_n ; M_{n-1}],   Y_n = BB(X_n),   M_n = the last m rows of Y_n,   M_{-1} learned

The first copy is read by every token of the segment, the second sees all of it and is written. Positions restart in every segment.
Memory comes from earlier segments only, so the wrapper is causal, and a segment may be fed in any pieces.

    m memory vectors   L segment
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import SequenceMixer, State
from memarch.layers.parts import normal_
from memarch.layers.parts.segment import SegmentWrapper


@dataclass(frozen=True, kw_only=True)
class RMTConfig(LayerConfig):
    kind: Literal["rmt"] = "rmt"
    segment: int = 512
    memory: int = 10

    paper: ClassVar[str] = "Bulatov et al. 2022, arXiv 2207.06881"

    def __post_init__(self) -> None:
        require(self.segment > 0, f"segment must be at least 1 token, got {self.segment}.")
        require(self.memory >= 0, f"memory counts vectors, 0 for none, got {self.memory}.")

    def wrap(self, inner: SequenceMixer, dim: int) -> "RMT":
        return RMT(self, inner, dim)

    def num_params(self, dim: int) -> int:
        return self.memory * dim

    def span(self) -> int:
        return self.segment

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(segment=6, memory=2), cls(segment=5, memory=0)]


class RMTMemory(NamedTuple):
    rows: Tensor  # [B, m, D]


class RMT(SegmentWrapper):
    def __init__(self, cfg: RMTConfig, inner: SequenceMixer, dim: int):
        super().__init__(inner, cfg.segment, 2 * cfg.memory)
        self.first = nn.Parameter(torch.empty(cfg.memory, dim))

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.inner.init_(depth, generator)
        normal_(self.first, 0.02, generator)

    def memory(self, batch: int) -> RMTMemory:
        return RMTMemory(self.first.expand(batch, -1, -1).clone())

    def open(self, memory: RMTMemory, batch: int) -> State:
        inner = self.inner.start(batch)
        return self.inner(memory.rows, inner).state if memory.rows.shape[1] else inner

    def close(self, inner: State, memory: RMTMemory) -> RMTMemory:
        return RMTMemory(self.inner(memory.rows, inner).y) if memory.rows.shape[1] else memory
