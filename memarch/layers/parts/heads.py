"""The two ends that recurrent mixers share: queries, keys and values in, and the read of the memory out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import require
from memarch.layers.parts.conv import ShortConv
from memarch.layers.parts.linear import Linear
from memarch.layers.parts.norm import RMSNorm


class Heads(nn.Module):
    """x -> q, k [B, T, H, K], v [B, T, H, V]: one projection, a short convolution (`taps` 0: none) and SiLU if `act`."""

    def __init__(self, dim: int, heads: int, key: int, value: int, taps: int = 0, act: bool = True):
        super().__init__()
        self.heads, self.act = heads, act
        self.sizes = [heads * key, heads * key, heads * value]
        self.qkv = Linear(dim, sum(self.sizes))
        self.conv = ShortConv(sum(self.sizes), taps) if taps else None

    @staticmethod
    def num_params(dim: int, heads: int, key: int, value: int, taps: int = 0) -> int:
        return heads * (2 * key + value) * (dim + taps)

    def init_(self, generator: torch.Generator, recall: bool = False) -> None:
        """`recall`: keys start as queries, so that a query finds its own key from the first step, and the convolution passes its neighbours."""
        self.qkv.init_(generator)
        if recall:
            q, k, _ = self.qkv.weight.split(self.sizes)
            k.copy_(q)
        if self.conv is not None:
            self.conv.init_(generator, recall)

    def start(self, batch: int) -> Tensor:
        """The tail [B, taps - 1, H (2K + V)]."""
        return self.qkv.weight.new_zeros(batch, 0, 0) if self.conv is None else self.conv.start(batch)

    def forward(self, x: Tensor, tail: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, tail = self.conv(qkv, tail, lengths)
        elif tail is None:
            tail = self.start(x.shape[0])
        parts: Sequence[Tensor] = (F.silu(qkv) if self.act else qkv).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        return q, k, v, tail


class Readout(nn.Module):
    """o [B, T, H, V] -> W_o [RMSNorm(o) * SiLU(W_g x)]: a norm per head, a gate if `gate`, the way back to the model's width."""

    def __init__(self, dim: int, heads: int, value: int, gate: bool = True):
        super().__init__()
        self.gate = Linear(dim, heads * value) if gate else None
        self.norm = RMSNorm(value, eps=1e-5)
        self.out = Linear(heads * value, dim)

    @staticmethod
    def num_params(dim: int, heads: int, value: int, gate: bool = True) -> int:
        return (1 + gate) * heads * value * dim + value

    def init_(self, depth: int, generator: torch.Generator) -> None:
        if self.gate is not None:
            self.gate.init_(generator)
        self.norm.init_()
        self.out.init_(generator, depth)

    def memory(self, batch: int, *shape: int) -> Tensor:
        """Zeros for a recurrence [B, ...], fp32 at least."""
        return self.out.weight.new_zeros(batch, *shape, dtype=torch.promote_types(self.out.weight.dtype, torch.float32))

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.norm(o).flatten(2)  # [B, T, H V]
        if self.gate is not None:
            o = o * F.silu(self.gate(x))
        return self.out(o.to(x.dtype))


def key_width(heads: int, head_dim: int | None, dim: int) -> int:
    """The width of one head: what the config says, or an equal share of the width of the model."""
    require(head_dim is not None or dim % heads == 0, f"heads {heads} must divide dim {dim}, or set head_dim.")
    return head_dim or dim // heads
