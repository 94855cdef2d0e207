"""The short convolution alone, gated: the local mixer of hybrids (LFM2's block; Poli et al. 2023 trace it to H3).

y_t = W_o [ c_t * conv(b * v)_t ],   b, c, v = W_in x
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.layers.parts import Linear, ShortConv


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(LayerConfig):
    kind: Literal["short_conv"] = "short_conv"
    taps: int = 4
    bias: bool = False

    paper: ClassVar[str] = "Fu et al. 2023, arXiv 2212.14052"

    def __post_init__(self) -> None:
        require(self.taps > 0, f"taps must be at least 1, got {self.taps}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "ShortConvMixer":
        return ShortConvMixer(self, dim)

    def num_params(self, dim: int) -> int:
        return 4 * dim * dim + dim * (self.taps + self.bias)

    def span(self) -> int:
        return self.taps

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(), cls(taps=3, bias=True), cls(taps=1)]


class ShortConvState(NamedTuple):
    tail: Tensor  # [B, taps - 1, D]


class ShortConvMixer(SequenceMixer):
    def __init__(self, cfg: ShortConvConfig, dim: int):
        super().__init__()
        self.into = Linear(dim, 3 * dim)
        self.conv = ShortConv(dim, cfg.taps, cfg.bias)
        self.out = Linear(dim, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator)
        self.conv.init_(generator)
        self.out.init_(generator, depth)

    def start(self, batch: int) -> ShortConvState:
        return ShortConvState(self.conv.start(batch))

    def forward(self, x: Tensor, state: ShortConvState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        b, c, v = self.into(x).chunk(3, -1)  # [B, T, D]
        y, tail = self.conv(b * v, None if state is None else state.tail, lengths)
        return Mixed(self.out(c * y), ShortConvState(tail))
