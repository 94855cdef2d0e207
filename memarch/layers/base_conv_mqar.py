"""BaseConv as in Zoology's recall experiments (Arora et al. 2023): a short convolution times a linear map, on top of its own input.

    y = x + conv(x) * (W x + b)

Based's language models use another layer of the same name: that one is `base_conv`.

    D width
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
class BaseConvMQARConfig(LayerConfig):
    kind: Literal["base_conv_mqar"] = "base_conv_mqar"
    taps: int = 3

    paper: ClassVar[str] = "Arora et al. 2023, arXiv 2312.04927"

    def __post_init__(self) -> None:
        require(self.taps > 0, f"taps must be at least 1, got {self.taps}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "BaseConvMQAR":
        return BaseConvMQAR(self, dim)

    def num_params(self, dim: int) -> int:
        return dim * dim + dim + dim * (self.taps + 1)

    def span(self) -> int:
        return self.taps

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(), cls(taps=1)]


class BaseConvMQARState(NamedTuple):
    tail: Tensor  # [B, taps - 1, D]


class BaseConvMQAR(SequenceMixer):
    def __init__(self, cfg: BaseConvMQARConfig, dim: int):
        super().__init__()
        self.conv = ShortConv(dim, cfg.taps, bias=True)
        self.map = Linear(dim, dim, bias=True)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.conv.init_(generator)
        self.map.init_(generator)

    def start(self, batch: int) -> BaseConvMQARState:
        return BaseConvMQARState(self.conv.start(batch))

    def forward(self, x: Tensor, state: BaseConvMQARState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        u, tail = self.conv(x, None if state is None else state.tail, lengths)
        return Mixed(x + u * self.map(x), BaseConvMQARState(tail))
