"""The parts bin: what several layers are made of."""

from memarch.layers.parts.conv import ShortConv
from memarch.layers.parts.linear import Linear, normal_, small
from memarch.layers.parts.norm import RMSNorm

__all__ = ["Linear", "RMSNorm", "ShortConv", "normal_", "small"]
