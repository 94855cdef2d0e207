"""BaseConv as in Based's language models (Arora et al. 2024): a gated short convolution, the layer between its memories and windows.

    u, z = halves of W_in x + b;   y = W_out [SiLU(conv(u)) * z] + c

Zoology's recall experiments use another layer of the same name: that one is `base_conv_mqar`.

    D width   E = expand D
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.layers.parts import Linear, ShortConv


@dataclass(frozen=True, kw_only=True)
class BaseConvConfig(LayerConfig):
    kind: Literal["base_conv"] = "base_conv"
    taps: int = 3
    expand: int = 2
    bias: bool = False  # of the convolution; the two maps always have one

    paper: ClassVar[str] = "Arora et al. 2024, arXiv 2402.18668"

    def __post_init__(self) -> None:
        require(self.taps > 0 and self.expand > 0, f"taps and expand must be at least 1, got {self.taps} and {self.expand}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "BaseConv":
        return BaseConv(self, dim)

    def num_params(self, dim: int) -> int:
        wide = self.expand * dim
        return 3 * dim * wide + 2 * wide + dim + wide * (self.taps + self.bias)

    def span(self) -> int:
        return self.taps

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(), cls(taps=2, expand=3, bias=True), cls(taps=1)]


class BaseConvState(NamedTuple):
    tail: Tensor  # [B, taps - 1, E]


class BaseConv(SequenceMixer):
    def __init__(self, cfg: BaseConvConfig, dim: int):
        super().__init__()
        wide = cfg.expand * dim
        self.into = Linear(dim, 2 * wide, bias=True)
        self.conv = ShortConv(wide, cfg.taps, cfg.bias)
        self.out = Linear(wide, dim, bias=True)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator)
        self.conv.init_(generator)
        self.out.init_(generator, depth)

    def start(self, batch: int) -> BaseConvState:
        return BaseConvState(self.conv.start(batch))

    def forward(self, x: Tensor, state: BaseConvState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        u, z = self.into(x).chunk(2, -1)  # [B, T, E]
        u, tail = self.conv(u, None if state is None else state.tail, lengths)
        return Mixed(self.out(F.silu(u) * z), BaseConvState(tail))
