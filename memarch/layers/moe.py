"""A small mixture of experts (Shazeer et al. 2017; the router as in Mixtral): the baseline that sparse memories are compared with.

    p = softmax(W_r x);   the topk largest are chosen, w_e = p_e / their sum;   y = sum_e w_e W_down^e [SiLU(W_gate^e x) * W_up^e x]

Every token gets its experts: nothing is dropped, so one position never depends on another. `balance` weighs E sum_e f_e P_e (f the share of tokens
that chose e, P its mean probability), which is topk when all are used alike.

    B rows   T tokens   E experts   k chosen   h hidden width of one expert
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import ChannelMixer, Fed
from memarch.layers.parts import Linear
from memarch.layers.parts.bank import Bank
from memarch.layers.parts.buckets import Move, sort
from memarch.layers.parts.router import balance, choose


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LayerConfig):
    kind: Literal["moe"] = "moe"
    experts: int = 8
    topk: int = 2
    hidden: int | None = None  # of one expert; None: topk of them are as wide as a swiglu of the default width
    balance: float = 1e-2  # weight of the loss that keeps all experts in use

    paper: ClassVar[str] = "Shazeer et al. 2017, arXiv 1701.06538"

    def __post_init__(self) -> None:
        require(self.experts > 0, f"experts must be at least 1, got {self.experts}.")
        require(0 < self.topk <= self.experts, f"topk must be between 1 and experts ({self.experts}), got {self.topk}.")
        require(self.hidden is None or self.hidden > 0, f"hidden must be at least 1, got {self.hidden}.")
        require(self.balance >= 0, f"balance must not be negative, got {self.balance}.")

    def width(self, dim: int) -> int:
        return self.hidden or max(1, -(-8 * dim // 96) * 32 // self.topk)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "MoE":
        return MoE(self, dim)

    def num_params(self, dim: int) -> int:
        return dim * self.experts + 3 * self.experts * dim * self.width(dim)

    def active_params(self, dim: int) -> int:
        return dim * self.experts + 3 * self.topk * dim * self.width(dim)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(experts=4, hidden=8), cls(experts=3, topk=1, balance=0.0), cls(experts=3, topk=3, hidden=4)]


class MoE(ChannelMixer):
    def __init__(self, cfg: MoEConfig, dim: int):
        super().__init__()
        self.cfg = cfg
        hidden = cfg.width(dim)
        self.router = Linear(dim, cfg.experts)
        self.up = Bank(cfg.experts, dim, 2 * hidden)  # the gate's columns first
        self.down = Bank(cfg.experts, hidden, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.router.init_(generator)
        self.up.init_(generator)
        self.down.init_(generator, depth)

    def forward(self, x: Tensor) -> Fed:
        cfg = self.cfg
        flat = x.reshape(1, -1, x.shape[-1])  # to experts all rows are one
        p, weight, ids = choose(flat, self.router.weight, cfg.topk)  # [1, B T, E], [1, B T, k]
        f, loss = balance(p, ids)
        aux = {"busiest": f.max().detach()} | ({"loss/balance": cfg.balance * loss} if cfg.balance else {})

        buckets = sort(ids, cfg.experts)
        rows, outs, begin = Move.apply(flat[0], buckets.pairs, buckets.slots, cfg.topk), [], 0
        for which, count, width, _ in buckets.groups:
            some = rows[begin : begin + count * width].view(count, width, -1)
            gate, up = self.up(some, which).chunk(2, -1)
            outs.append(self.down(F.silu(gate) * up, which).flatten(0, 1))
            begin += count * width
        y = Move.apply(torch.cat(outs), buckets.slots, buckets.pairs, 1).view(*ids.shape[1:], -1)  # [B T, k, D]
        return Fed((y * weight[0, :, :, None].to(y.dtype)).sum(1).view_as(x).to(x.dtype), aux)
