"""How decays and steps start: Mamba's choices, and everybody's since. A decay is e^{-A step}, step = softplus(raw + bias)."""

import math

import torch
from torch import Tensor

from memarch.layers.parts.linear import uniform

STEP = (1e-3, 0.1)  # softplus(bias) at init is log-uniform in here


def decay_(A_log: Tensor, limits: tuple[float, float], generator: torch.Generator) -> None:
    """A uniform between the limits; 1e-4 at least, so that its logarithm is a number one can train."""
    A_log.copy_(uniform(tuple(A_log.shape), *limits, generator).clamp(min=1e-4).log())


def step_bias_(bias: Tensor, generator: torch.Generator, limits: tuple[float, float] = STEP) -> None:
    step = uniform(tuple(bias.shape), math.log(limits[0]), math.log(limits[1]), generator).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
