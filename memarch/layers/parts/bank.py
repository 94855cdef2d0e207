"""Linear maps of one shape, one for each of several memories."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from memarch.layers.parts.linear import normal_, small


class Bank(nn.Module):
    """x [M, n, D] -> [M, n, E], map m on the rows x[m]. `memories` 1 with any M: all go through the one map there is."""

    def __init__(self, memories: int, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(memories, fan_in, fan_out))

    def init_(self, generator: torch.Generator, depth: int | None = None) -> None:
        """With `depth`, these maps write into the residual stream: see `Linear`."""
        normal_(self.weight, small(self.weight.shape[1]) / (math.sqrt(2 * depth) if depth else 1.0), generator)

    def forward(self, x: Tensor, which: Any) -> Tensor:
        """The maps of `which`, as many as x has."""
        weight = self.weight[which] if len(self.weight) > 1 else self.weight.expand(x.shape[0], -1, -1)
        return torch.bmm(x, weight)
