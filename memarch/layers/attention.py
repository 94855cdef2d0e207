"""Softmax attention: full or sliding window, one layer's keys for several layers, grouped queries.

    o_t = sum_j softmax_j(s q_t . k_j - m_h (t - j)) v_j      over j in (t - window, t], and the first `prefix` positions for ever

Vaswani et al. 2017; grouped queries: Ainslie et al. 2023; ALiBi: Press et al. 2022; always-visible first positions: Xiao et al. 2023.
`window` counts the keys a token sees, itself included; None sees everything and the state then grows with every token.

    H heads   G groups of keys   K head width   W window   P prefix   n rows of history
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, last
from memarch.kernels.attention import attention
from memarch.layers.parts import Linear, RMSNorm, ShortConv
from memarch.layers.parts.history import newest
from memarch.layers.parts.rope import rotate


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerConfig):
    kind: Literal["attention"] = "attention"
    heads: int = 4
    groups: int | None = None  # heads of k and v; None: as many as query heads
    head_dim: int | None = None  # None: dim / heads
    window: int | None = None
    prefix: int = 0
    positions: Literal["rope", "alibi", "none"] = "rope"
    rope_base: float = 10000.0
    conv: int = 0  # taps of a short convolution on q, k, v; 0 for none
    qk_norm: bool = False
    share: bool = False  # post k and v as the note "kv", for cross_attention above
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")
        require(self.heads % (self.groups or self.heads) == 0, f"groups {self.groups} must divide heads {self.heads}.")
        require(self.window is None or self.window > 0, f"window counts the token itself, so it is at least 1 (or null for all), got {self.window}.")
        require(self.prefix >= 0, f"prefix must be 0 or more, got {self.prefix}.")
        require(not self.prefix or self.window is not None, "prefix keeps the first positions visible beyond a window; set window, or prefix 0.")
        require(not (self.prefix and self.share), "share posts a plain band of keys; it cannot carry a prefix. Set one of the two.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")
        require(self.init == "standard" or not self.groups or self.groups == self.heads, "init 'recall' starts with W_k = W_q, so groups must equal heads.")

    def width(self, dim: int) -> int:
        require(self.head_dim is not None or dim % self.heads == 0, f"heads {self.heads} must divide dim {dim}, or set head_dim.")
        width = self.head_dim or dim // self.heads
        require(self.positions != "rope" or width % 2 == 0, f"rope turns pairs, so head_dim must be even, got {width}.")
        return width

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "Attention":
        return Attention(self, dim)

    def num_params(self, dim: int) -> int:
        width = self.width(dim)
        qkv = (self.heads + 2 * (self.groups or self.heads)) * width
        return dim * qkv + self.conv * qkv + 2 * width * self.qk_norm + self.heads * width * dim

    def span(self) -> int:
        return max(self.window or 1, self.prefix, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(heads=2),
            cls(heads=4, groups=2, head_dim=6, window=5, positions="alibi", qk_norm=True),
            cls(heads=2, window=1, positions="none"),
            cls(heads=2, window=7, prefix=3, conv=4),
            cls(heads=2, window=4, positions="none", conv=3, init="recall", share=True),
            cls(heads=2, groups=1, rope_base=500.0, share=True),
        ]


class AttentionState(NamedTuple):
    k: Tensor  # [B, n, G, K] turned already; n = W - 1, or all so far
    v: Tensor  # [B, n, G, K]
    pos: Tensor  # [B] int64: tokens seen
    tail: Tensor  # [B, conv - 1, (H + 2G) K] inputs of the short convolution
    first_k: Tensor  # [B, P, G, K]
    first_v: Tensor  # [B, P, G, K]


class SharedKV(NamedTuple):
    """Past and new keys of one layer, for readers above. The last T rows belong to this call."""

    k: Tensor  # [B, n + T, G, K]
    v: Tensor
    kpos: Tensor  # [B, n + T]; below 0 where there is nothing
    qpos: Tensor  # [B, T]
    window: int | None

    def last(self, lengths: Tensor | None) -> "SharedKV":
        size, T = self.k.shape[1], self.qpos.shape[1]
        qpos = last(self.qpos, lengths)
        kpos = qpos + torch.arange(1 - size, 1, device=qpos.device)
        k, v = (rows if lengths is None else newest(rows, size, lengths, T) for rows in (self.k, self.v))
        return SharedKV(k, v, kpos, qpos, self.window)


def alibi_slopes(heads: int) -> list[float]:
    """Geometric from 2^(-8/n); for n not a power of two the odd members of the next power fill up, as published."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


class Attention(SequenceMixer):
    def __init__(self, cfg: AttentionConfig, dim: int):
        super().__init__()
        self.cfg, self.heads, self.groups, self.width = cfg, cfg.heads, cfg.groups or cfg.heads, cfg.width(dim)
        self.writes = ("kv",) if cfg.share else ()
        size = (self.heads + 2 * self.groups) * self.width
        self.qkv = Linear(dim, size)
        self.conv = ShortConv(size, cfg.conv) if cfg.conv else None
        self.q_norm = RMSNorm(self.width) if cfg.qk_norm else None
        self.k_norm = RMSNorm(self.width) if cfg.qk_norm else None
        self.out = Linear(self.heads * self.width, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        recall = self.cfg.init == "recall"
        self.qkv.init_(generator)
        if recall:  # a query then finds its own key from the first step
            q, k, _ = self.qkv.weight.split(self._sizes())
            k.copy_(q)
        if self.conv is not None:
            self.conv.init_(generator, recall)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_()
        self.out.init_(generator, depth)

    def _sizes(self) -> list[int]:
        return [self.heads * self.width, self.groups * self.width, self.groups * self.width]

    def grows(self) -> int | None:
        return self.cfg.window

    def start(self, batch: int) -> AttentionState:
        new = self.out.weight.new_zeros
        kv = (self.groups, self.width)
        n = 0 if self.cfg.window is None else self.cfg.window - 1
        tail = new(batch, 0, 0) if self.conv is None else self.conv.start(batch)
        pos = torch.zeros(batch, dtype=torch.int64, device=self.out.weight.device)
        return AttentionState(new(batch, n, *kv), new(batch, n, *kv), pos, tail, new(batch, self.cfg.prefix, *kv), new(batch, self.cfg.prefix, *kv))

    def forward(self, x: Tensor, state: AttentionState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        q, kv, new = self._project(x, state, lengths)
        o = self._attend(q, kv, new, None if state is None else state.pos)
        return Mixed(o, new, note={"kv": kv} if self.cfg.share else EMPTY)

    def last(self, x: Tensor, state: AttentionState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        """One query a row, so the time is linear in the prompt."""
        q, kv, new = self._project(x, state, lengths)
        seen = kv.last(lengths)
        o = self._attend(last(q, lengths), seen, new, seen.qpos[:, 0])
        return Mixed(o, new, note={"kv": kv} if self.cfg.share else EMPTY)

    def _project(self, x: Tensor, state: AttentionState | None, lengths: Tensor | None) -> tuple[Tensor, SharedKV, AttentionState]:
        """Queries of this call, all keys and values they may see, and the state behind it."""
        B, T, _ = x.shape
        cfg, dtype = self.cfg, self.out.weight.dtype
        aligned = state is None
        if state is None:
            state = self.start(B)
        qkv, tail = self.qkv(x), state.tail
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if aligned else tail, lengths)
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in qkv.split(self._sizes(), -1))  # [B, T, H or G, K]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        qpos = state.pos[:, None] + torch.arange(T, device=x.device)  # [B, T]
        if cfg.positions == "rope":
            q, k = rotate(q, qpos, cfg.rope_base), rotate(k, qpos, cfg.rope_base)
        first = self._first(state, k, v, qpos, lengths) or (state.first_k, state.first_v)
        if not aligned and state.k.shape[1]:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)  # [B, n + T, G, K]
        size = k.shape[1]
        kept = size if cfg.window is None else cfg.window - 1
        seen = state.pos + (T if lengths is None else lengths)
        new = AttentionState(newest(k, kept, lengths, T).to(dtype), newest(v, kept, lengths, T).to(dtype), seen, tail, *first)
        kpos = state.pos[:, None] + torch.arange(T - size, T, device=x.device)
        return q, SharedKV(k, v, kpos, qpos, cfg.window), new

    def _attend(self, q: Tensor, kv: SharedKV, new: AttentionState, pos: Tensor | None) -> Tensor:
        o = attention(
            q,
            kv.k,
            kv.v,
            pos=pos,
            window=kv.window,
            sink=(new.first_k.to(q.dtype), new.first_v.to(kv.v.dtype)) if self.cfg.prefix else None,
            slopes=torch.tensor(alibi_slopes(self.heads), device=q.device) if self.cfg.positions == "alibi" else None,
        )
        return self.out(o.flatten(2))

    def _first(self, state: AttentionState, k: Tensor, v: Tensor, qpos: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The always-visible rows, filled as far as this call reaches: slot s is token s - pos of the call, when that is a real one."""
        P, T = self.cfg.prefix, k.shape[1]
        if not P:
            return None
        index = torch.arange(P, device=k.device) - qpos[:, :1]  # [B, P]
        mine = (index >= 0) & (index < (T if lengths is None else lengths[:, None]))
        index = index.clamp(0, T - 1)[..., None, None].expand(-1, -1, self.groups, self.width)
        mine = mine[..., None, None]
        return (
            torch.where(mine, k.gather(1, index).to(state.first_k.dtype), state.first_k),
            torch.where(mine, v.gather(1, index).to(state.first_v.dtype), state.first_v),
        )
