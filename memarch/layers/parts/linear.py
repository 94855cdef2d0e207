"""A linear map that is made empty and filled once, by init_."""

import math

import torch
from torch import Tensor, nn


def normal_(x: Tensor, std: float, generator: torch.Generator, mean: float = 0.0) -> Tensor:
    """Numbers are drawn in fp32 on the generator's device and copied, so a seed means the same weights on every device and in every dtype."""
    return x.copy_(torch.empty(x.shape, dtype=torch.float32, device=generator.device).normal_(mean, std, generator=generator))


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=generator.device).uniform_(low, high, generator=generator)


def uniform_(x: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """torch's own init of a linear map, on which Mamba's published runs rest."""
    x.copy_(uniform(tuple(x.shape), -(fan_in**-0.5), fan_in**-0.5, generator))


def small(fan_in: int) -> float:
    """ "Small init" (Nguyen & Salazar 2019), sqrt(2 / 5d): the customary 0.02 at width 1024, and right for small widths too."""
    return math.sqrt(0.4 / fan_in)


class Linear(nn.Linear):
    def __init__(self, fan_in: int, fan_out: int, bias: bool = False):
        super().__init__(fan_in, fan_out, bias=bias)

    def reset_parameters(self) -> None:
        """Nothing: init_ fills, so that nothing is drawn twice and nothing comes from the global generator."""

    def init_(self, generator: torch.Generator, depth: int | None = None) -> None:
        """With `depth`, this map writes into the residual stream: 2 x depth such maps add up, and the sum keeps its size."""
        normal_(self.weight, small(self.in_features) / (math.sqrt(2 * depth) if depth else 1.0), generator)
        if self.bias is not None:
            self.bias.zero_()
