"""SwiGLU (Shazeer 2020): the gated feed-forward, y = W_down (SiLU(W_gate x) * W_up x)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import ChannelMixer, Fed
from memarch.layers.parts import Linear


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(LayerConfig):
    kind: Literal["swiglu"] = "swiglu"
    hidden: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 32: the parameters of a plain 4x feed-forward

    paper: ClassVar[str] = "Shazeer 2020, arXiv 2002.05202"

    def __post_init__(self) -> None:
        require(self.hidden is None or self.hidden > 0, f"hidden must be at least 1, got {self.hidden}.")

    def width(self, dim: int) -> int:
        return self.hidden or -(-8 * dim // 96) * 32

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "SwiGLU":
        return SwiGLU(self, dim)

    def num_params(self, dim: int) -> int:
        return 3 * dim * self.width(dim)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(), cls(hidden=24)]


class SwiGLU(ChannelMixer):
    def __init__(self, cfg: SwiGLUConfig, dim: int):
        super().__init__()
        hidden = cfg.width(dim)
        self.up = Linear(dim, 2 * hidden)  # the gate's rows first
        self.down = Linear(hidden, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.up.init_(generator)
        self.down.init_(generator, depth)

    def forward(self, x: Tensor) -> Fed:
        gate, up = self.up(x).chunk(2, -1)
        return Fed(self.down(F.silu(gate) * up))
