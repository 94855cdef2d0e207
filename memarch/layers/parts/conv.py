"""The short causal convolution in front of most recurrent mixers."""

import torch
from torch import Tensor, nn

from memarch.kernels.short_conv import short_conv
from memarch.layers.parts.linear import normal_


class ShortConv(nn.Module):
    """Depthwise, causal, `width` taps. The tail it carries is the last width - 1 real inputs."""

    def __init__(self, dim: int, width: int, bias: bool = False):
        super().__init__()
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def init_(self, generator: torch.Generator, recall: bool = False) -> None:
        """`recall`: every tap passes a quarter and the newest half more. A key then meets the value behind it from the first step on,
        which shortens the plateau of recall tasks many times over; the usual uniform init has to find that shift."""
        if recall:
            normal_(self.weight, 0.02, generator, mean=0.25)
            self.weight[:, -1] += 0.5
        else:
            self.weight.copy_(torch.empty(self.weight.shape).uniform_(-(self.width**-0.5), self.width**-0.5, generator=generator))
        if self.bias is not None:
            self.bias.zero_()

    def start(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.width - 1, self.dim)

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> y [B, T, D], the new tail [B, W-1, D]."""
        weight = self.weight
        if weight.dtype == x.dtype and (tail is None or tail.dtype == x.dtype):  # else conversions, which cost one token as much as its products
            return short_conv(x, weight, self.bias, tail, lengths=lengths)
        bias, tail = (None if v is None else v.to(x.dtype) for v in (self.bias, tail))
        y, new = short_conv(x, weight.to(x.dtype), bias, tail, lengths=lengths)
        return y, new.to(weight.dtype)
