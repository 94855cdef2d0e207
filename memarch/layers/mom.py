"""Mixture-of-Memories (Du et al. 2025): several memories of one kind, of which every token uses a few, so that facts do not overwrite each other.

    p_t = softmax(W_r x_t);   the topk largest are chosen, w_tm = p_tm / their sum
    a chosen memory m: k, v and gates from maps of its own, S^m <- the inner layer's rule.   A memory not chosen stays as it is: no decay either
    o_t = sum_m w_tm read(S^m, q_t)  (+ read(S^shared, q_t));   y_t = the inner layer's read-out of o_t

q, the short convolution's taps, the decay's constants, norm, gate and output map are shared. Time for a memory is the sequence of its own tokens: the
convolution sees the tokens before in that memory, each memory has a tail of its own. Every token writes the shared memory, with weight 1.

The tokens of a memory become one row with a length, and the rule runs once for all memories: what a token costs depends on topk, not on the number
of memories. (Under torch.compile it does: there every row is as long as the input.) `balance` weighs M sum_m f_m P_m (f the share of tokens that
chose m, P its mean probability), which is topk when all are used alike.

    B rows   T tokens   H heads   K key width   V value width   M memories, the shared one last   C = H (2K + V)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch import state as states
from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State
from memarch.layers.delta_net import DeltaNetConfig
from memarch.layers.gated_delta import GatedDeltaConfig
from memarch.layers.gla import GLAConfig
from memarch.layers.linear_attention import LinearAttentionConfig
from memarch.layers.parts import Linear, ShortConv
from memarch.layers.parts.bank import Bank
from memarch.layers.parts.buckets import Move, sort
from memarch.layers.parts.heads import Readout
from memarch.layers.parts.router import balance, choose
from memarch.layers.retnet import RetNetConfig

InnerConfig = GatedDeltaConfig | DeltaNetConfig | GLAConfig | LinearAttentionConfig | RetNetConfig


@dataclass(frozen=True, kw_only=True)
class MoMConfig(LayerConfig):
    kind: Literal["mom"] = "mom"
    memories: int = 4
    topk: int = 2
    shared: bool = True  # one more memory that every token uses
    separate: bool = True  # maps for k, v and gates per memory; False: routing separates the states only
    balance: float = 1e-3  # weight of the loss that keeps all memories in use
    inner: InnerConfig = field(default_factory=GatedDeltaConfig)  # the recurrence, with its heads, convolution and gate

    paper: ClassVar[str] = "Du et al. 2025, arXiv 2502.13685"

    def __post_init__(self) -> None:
        require(self.memories > 0, f"memories must be at least 1, got {self.memories}.")
        require(0 < self.topk <= self.memories, f"topk must be between 1 and memories ({self.memories}), got {self.topk}.")
        require(self.balance >= 0, f"balance must not be negative, got {self.balance}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "MoM":
        return MoM(self, dim)

    def _count(self, dim: int, memories: int) -> int:
        rule, ends = self.inner.rule(dim), self.inner.ends()
        q, kv = rule.heads * rule.key, rule.heads * (rule.key + rule.value)
        maps = dim * (self.memories + q) + (memories if self.separate else 1) * dim * (kv + rule.raw)
        return maps + (q + kv) * ends.taps + rule.num_params() + Readout.num_params(dim, rule.heads, rule.value, ends.gate)

    def num_params(self, dim: int) -> int:
        return self._count(dim, self.memories + self.shared)

    def active_params(self, dim: int) -> int:
        return self._count(dim, self.topk + self.shared)

    def span(self) -> int:
        return self.inner.span()

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(memories=3, inner=GatedDeltaConfig(heads=2)),
            cls(memories=5, topk=1, shared=False, balance=0.0, inner=DeltaNetConfig(heads=3, head_dim=4, value_dim=6, conv=2)),
            cls(memories=2, separate=False, balance=1e-2, inner=GLAConfig(heads=2, rank=3)),
            cls(memories=3, topk=3, inner=RetNetConfig(heads=2)),
            cls(memories=4, inner=LinearAttentionConfig(heads=2, feature="product"), shared=False),
        ]


class MoMState(NamedTuple):
    memory: State  # of the rule, every leaf [B, M, ..]
    tail: Tensor  # [B, M, taps - 1, C]


class MoM(SequenceMixer):
    def __init__(self, cfg: MoMConfig, dim: int):
        super().__init__()
        self.cfg, self.M = cfg, cfg.memories + cfg.shared
        rule, ends = self.rule, self.ends = cfg.inner.rule(dim), cfg.inner.ends()
        self.sizes = [rule.heads * rule.key, rule.heads * rule.key, rule.heads * rule.value]
        self.router = Linear(dim, cfg.memories)
        self.q = Linear(dim, self.sizes[0])
        self.kv = Bank(self.M if cfg.separate else 1, dim, sum(self.sizes[1:]) + rule.raw)  # and the rule's gates
        self.conv = ShortConv(sum(self.sizes), ends.taps) if ends.taps else None
        rule.make(self)
        self.read = Readout(dim, rule.heads, rule.value, ends.gate)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.router.init_(generator)
        self.q.init_(generator)
        self.kv.init_(generator)
        if self.ends.recall:  # keys start as queries
            self.kv.weight[..., : self.sizes[1]].copy_(self.q.weight.mT)
        if self.conv is not None:
            self.conv.init_(generator, self.ends.recall)
        self.rule.init_(self, generator)
        self.read.init_(depth, generator)

    def start(self, batch: int) -> MoMState:
        weight = self.read.out.weight
        memory = states.tree(lambda x: x.unflatten(0, (batch, self.M)), self.rule.start(batch * self.M, weight))
        tail = weight.new_zeros(batch * self.M, 0, 0) if self.conv is None else self.conv.start(batch * self.M)
        return MoMState(memory, tail.unflatten(0, (batch, self.M)))

    def forward(self, x: Tensor, state: MoMState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        B, T, _ = x.shape
        real = None if lengths is None else torch.arange(T, device=x.device) < lengths[:, None]  # [B, T]
        weight, ids, aux = self.route(x, real)  # [B, T, k]
        k = ids.shape[-1]
        buckets = sort(ids, self.M)
        state = self.start(B) if state is None else state

        rows = Move.apply(x.flatten(0, 1), buckets.pairs, buckets.slots, k)  # [slots, D]
        queries = Move.apply(self.q(x).flatten(0, 1), buckets.pairs, buckets.slots, k)
        outs, begin, new = [], 0, state
        for which, count, width, sizes in buckets.groups:
            at = slice(begin, begin + count * B * width)
            memory, tail = (states.tree(lambda s, which=which: s[:, which].transpose(0, 1).flatten(0, 1), part) for part in state)  # [count B, ..]
            o, *now = self.run(rows[at], queries[at], which, (count, B, width), memory, tail, sizes)
            new = MoMState(*(states.tree(lambda old, n, which=which: self.put(old, n, which), a, b) for a, b in zip(new, now, strict=True)))
            outs.append(o.reshape(count * B * width, -1))
            begin = at.stop
        o = Move.apply(torch.cat(outs), buckets.slots, buckets.pairs, 1).view(B, T, k, -1)  # [B, T, k, H V]
        o = (o * weight[..., None]).sum(2).unflatten(-1, (self.rule.heads, -1))
        return Mixed(self.read(o, x), new, aux)

    def route(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> the weights and the memories of every token [B, T, k], the shared one last; M memories at pads, which is none."""
        cfg = self.cfg
        p, weight, ids = choose(x, self.router.weight, cfg.topk)
        f, loss = balance(p, ids, real)
        aux = {"busiest": f.max().detach()}  # 1: some memory is used by every token
        if cfg.balance:
            aux["loss/balance"] = cfg.balance * loss

        if cfg.shared:
            weight, ids = F.pad(weight, (0, 1), value=1.0), F.pad(ids, (0, 1), value=cfg.memories)
        if real is not None:
            ids = ids.masked_fill(~real[..., None], self.M)
        return weight, ids, aux

    def run(self, x: Tensor, q: Tensor, which: Any, shape: tuple[int, int, int], memory: State, tail: Tensor, lengths: Tensor) -> tuple[Tensor, State, Tensor]:
        """The memories of one group: their rows x, q -> o [rows, width, H, V], the memories and tails afterwards."""
        count, B, width = shape
        kv = self.kv(x.view(count, B * width, -1), which).view(count * B, width, -1)
        kv, raw = kv.split([sum(self.sizes[1:]), self.rule.raw], -1)
        qkv = torch.cat([q.view(count * B, width, -1), kv], -1)  # [rows, width, C]
        if self.conv is not None:
            qkv, tail = self.conv(qkv, tail, lengths)
        parts = (F.silu(qkv) if self.ends.act else qkv).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (self.rule.heads, -1)) for part in parts)
        o, memory = self.rule(self, q, k, v, raw if self.rule.raw else None, memory, lengths)
        return o, memory, tail

    def put(self, old: Tensor, rows: Tensor, which: Any) -> Tensor:
        """The leaf [B, M, ..] with the memories of a group replaced."""
        rows = rows.unflatten(0, (-1, old.shape[0])).transpose(0, 1)
        if rows.shape[1] == self.M:
            return rows.contiguous()
        new = old.clone()
        new[:, which] = rows
        return new
