"""Titans, memory as context (Behrouz et al. 2024): attention inside segments of C tokens, which the long-term memory goes through.

    h_t = RMSNorm(M'(x_t))                                   what the memory at the segment's start knows of the token
    y_t = x_t + attention of x_t over P, h_j, x_j            for j <= t of the same segment
    o_t = RMSNorm(y_t) * sigmoid(RMSNorm(m_t))               m = LMM(RMSNorm(y)): written token by token, read after the write

M' is read with the memory's own queries, without its convolution, and with its own read-out. Read to the letter, the paper shows a token the future twice: h
of later tokens, and a memory that has learned the whole segment. Here a token sees h_j for j <= t only, and m_t is the memory after token t.
The x_t in y_t is one of the residual connections that the paper has "in all blocks" and leaves out of its equations. M' is asked with x_t and told y_t: without
it the two have nothing to do with each other at init, and what is stored is not found.
Positions count from the segment's start, and P have none: so every segment looks alike, wherever it stands. The norms of h and of the memory's input are
not in the paper: they give these inputs the size that every other one has. `mix: mean` is half the sum of both norms in place of the gate.

    B rows   T tokens   H heads   K width of a head   P persistent tokens   n rows of history
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch import state as states
from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State, under
from memarch.layers.parts import Linear, RMSNorm, normal_
from memarch.layers.parts.heads import key_width
from memarch.layers.parts.history import newest
from memarch.layers.parts.mix import Mix
from memarch.layers.parts.recurrent import RecurrentState
from memarch.layers.parts.rope import rotate
from memarch.layers.parts.segment import SegmentWrapper
from memarch.layers.titans_lmm import TitansLMMConfig


@dataclass(frozen=True, kw_only=True)
class TitansMACConfig(LayerConfig):
    kind: Literal["titans_mac"] = "titans_mac"
    segment: int = 64
    persistent: int = 4  # tokens; 0 for none
    heads: int = 4  # of attention
    head_dim: int | None = None  # None: dim / heads
    positions: Literal["rope", "none"] = "rope"
    rope_base: float = 10000.0
    mix: Literal["gate", "mean"] = "gate"
    memory: TitansLMMConfig = field(default_factory=TitansLMMConfig)

    paper: ClassVar[str] = "Behrouz et al. 2024, arXiv 2501.00663"

    def __post_init__(self) -> None:
        for name in ("segment", "heads"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.persistent >= 0, f"persistent counts tokens, 0 for none, got {self.persistent}.")
        chunk = 1 if self.memory.exact else self.memory.chunk
        require(self.segment % chunk == 0, f"memory.chunk {chunk} must divide segment {self.segment}, so that every segment begins with a chunk.")

    def width(self, dim: int) -> int:
        width = key_width(self.heads, self.head_dim, dim)
        require(self.positions != "rope" or width % 2 == 0, f"rope turns pairs, so head_dim must be even, got {width}.")
        return width

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "TitansMAC":
        return TitansMAC(self, dim)

    def num_params(self, dim: int) -> int:
        return (self.persistent + 4 * self.heads * self.width(dim) + 2) * dim + self.memory.num_params(dim) + Mix.num_params(dim)

    def span(self) -> int:
        return max(self.segment, self.memory.span())

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(segment=6, heads=2, memory=TitansLMMConfig(heads=2, chunk=3)),
            cls(segment=8, persistent=0, heads=3, head_dim=4, rope_base=100.0, mix="mean", memory=TitansLMMConfig(heads=2, depth=1, conv=2, shift=True)),
            cls(segment=5, persistent=2, heads=2, positions="none", memory=TitansLMMConfig(heads=2, chunk=5, window=2, post="none")),
        ]


class InsideState(NamedTuple):
    k: Tensor  # [B, n, 2, H, K] of the last tokens, of their h and of themselves; n is C - 1, and 0 where every row begins a segment
    v: Tensor
    place: Tensor  # [B] int64: how many of them are of this segment
    asked: tuple[Tensor, ...]  # [B, .] the memory's weights at the segment's start
    memory: RecurrentState


class Inside(SequenceMixer):
    """One segment."""

    def __init__(self, cfg: TitansMACConfig, dim: int):
        super().__init__()
        self.cfg, self.width = cfg, cfg.width(dim)
        self.persistent = nn.Parameter(torch.empty(cfg.persistent, dim))
        self.memory = cfg.memory.make(dim, {})
        self.h_norm = RMSNorm(dim)
        self.y_norm = RMSNorm(dim)
        self.q = Linear(dim, cfg.heads * self.width)
        self.kv = Linear(dim, 2 * cfg.heads * self.width)
        self.out = Linear(cfg.heads * self.width, dim)
        self.mix = Mix(dim, cfg.mix)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        normal_(self.persistent, 1.0, generator)  # the size of the normalised inputs beside which they stand
        self.memory.init_(depth, generator)
        for norm in (self.h_norm, self.y_norm):
            norm.init_()
        for linear in (self.q, self.kv, self.out):
            linear.init_(generator)
        self.mix.init_(depth)

    def grows(self) -> None:
        return None

    def start(self, batch: int) -> InsideState:
        return self.begin(self.memory.start(batch))

    def begin(self, memory: RecurrentState) -> InsideState:
        B, new = len(memory.tail), self.out.weight.new_zeros
        kv = new(B, 0, 2, self.cfg.heads, self.width)
        asked = tuple(w.clone() for w in memory.memory.memory.weights)
        return InsideState(kv, kv.clone(), torch.zeros(B, dtype=torch.int64, device=kv.device), asked, states.tree(Tensor.clone, memory))

    def forward(self, x: Tensor, state: InsideState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        (B, T, _), dtype = x.shape, self.out.weight.dtype
        state = self.start(B) if state is None else state
        h = self.h_norm(self.memory.recall(x, state.asked)).to(x.dtype)
        q, (k, v) = self.q(x).unflatten(-1, (-1, self.width)), self._kv(torch.stack([h, x], 2))  # [B, T, H, K], [B, T, 2, H, K]
        if self.cfg.positions == "rope":
            pos = state.place[:, None] + torch.arange(T, device=x.device)
            q, k = rotate(q, pos, self.cfg.rope_base), rotate(k.flatten(2, 3), pos, self.cfg.rope_base).view_as(k)
        k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)  # [B, n + T, 2, H, K]
        y = x + self.out(self._attend(q, k, v, state.place))
        memory = state.memory if state.k.shape[1] else aligned(state.memory)
        m = self.memory(self.y_norm(y).to(x.dtype), memory, lengths=lengths)
        k, v = (newest(rows, self.cfg.segment - 1, lengths, T).to(dtype) for rows in (k, v))
        seen = state.place + (T if lengths is None else lengths)
        return Mixed(self.mix(y, m.y), InsideState(k, v, seen, state.asked, m.state), under("memory", m.aux))

    def _kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).unflatten(-1, (2, -1, self.width)).unbind(-3)
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
        """-> [B, T, H K]"""
        (B, T), S, P = q.shape[:2], k.shape[1], len(self.persistent)
        token = torch.arange(S, device=q.device) - (S - T)  # of this call, counted from its first
        seen = (token <= torch.arange(T, device=q.device)[:, None]) & (token >= -place[:, None, None])  # [B, T, S]
        seen = torch.cat([seen.new_ones(B, T, P), seen.repeat_interleave(2, -1)], -1)
        fixed = (y.expand(B, -1, -1, -1) for y in self._kv(self.persistent.to(q.dtype)))
        k, v = (torch.cat([f, y.flatten(1, 2)], 1).transpose(1, 2) for f, y in zip(fixed, (k, v), strict=True))  # [B, H, P + 2 S, K]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen[:, None]).transpose(1, 2).flatten(2)


def aligned(state: RecurrentState) -> RecurrentState:
    """The same, leaving out where its rows stand in their chunks: every segment begins with one."""
    neural = state.memory
    return state._replace(memory=neural._replace(memory=neural.memory._replace(point=(), place=())))


class TitansMAC(SegmentWrapper):
    inner: Inside

    def __init__(self, cfg: TitansMACConfig, dim: int):
        super().__init__(Inside(cfg, dim), cfg.segment, 0)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.inner.init_(depth, generator)

    def memory(self, batch: int) -> tuple[()]:
        return ()  # what goes on is in the inner state already

    def open(self, memory: State, batch: int) -> InsideState:
        return self.inner.start(batch)

    def turn(self, inner: InsideState, memory: State, batch: int) -> tuple[State, State]:
        return self.inner.begin(inner.memory), ()
