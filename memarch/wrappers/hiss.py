"""Hierarchical state space models (Bhirangi et al. 2024): a stack of few layers reads every chunk on its own, the backbone reads one vector a chunk.

    l_j = low(x_{jk}, .., x_{jk+k-1})         its last step; its state begins anew with every chunk
    h_j = backbone(l_0, .., l_j)
    y_t = h_j,  j the last chunk that is complete at t;   y_t = 0 before there is one

A fast and noisy stream is summed up where it is fast, and what is remembered for long is remembered at the low rate: k times fewer steps. The answer
stands until the next chunk is complete, so it comes at every step, and at the last step of a chunk it has read that chunk. Both levels may be any
mixer of the zoo; the paper's are state space models.

Rows may stand at different places of their chunks. A call then finishes every row's open chunk, and all chunks behind it run side by side, each as
a row with a length. When no row is inside a chunk, all chunks of the call do, and none needs a length.

    B rows   T tokens   D width   k chunk   N chunks that a call may complete
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memarch import state as states
from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State, under
from memarch.layers import AttentionConfig, ChannelConfig, GatedDeltaConfig, MambaConfig, MixerConfig, SwiGLUConfig
from memarch.layers.parts import Linear, RMSNorm
from memarch.layers.parts.linear import normal_

OFFSET = 2.0  # standard deviation over the channels


@dataclass(frozen=True, kw_only=True)
class LowConfig:
    """The stack that reads a chunk: `layers` blocks of one kind."""

    mixer: MixerConfig = field(default_factory=MambaConfig)
    ffn: ChannelConfig | None = None
    layers: int = 1
    dim: int | None = None  # its width, with a linear map in and one out; None: the model's, without them

    def __post_init__(self) -> None:
        require(self.layers > 0, f"low.layers must be at least 1, got {self.layers}.")
        require(self.dim is None or self.dim > 0, f"low.dim must be at least 1, or null for the model's width, got {self.dim}.")

    def num_params(self, dim: int) -> int:
        wide = self.dim or dim
        parts = [part.num_params(wide) + wide for part in (self.mixer, self.ffn) if part is not None]
        return self.layers * sum(parts) + 2 * wide + (0 if self.dim is None else wide * (dim + 1) + dim * (wide + 1))


@dataclass(frozen=True, kw_only=True)
class HiSSConfig(LayerConfig):
    kind: Literal["hiss"] = "hiss"
    chunk: int = 10
    low: LowConfig = field(default_factory=LowConfig)

    paper: ClassVar[str] = "Bhirangi et al. 2024, arXiv 2402.10211"

    def __post_init__(self) -> None:
        require(self.chunk > 0, f"chunk must be at least 1 token, got {self.chunk}.")

    def wrap(self, inner: SequenceMixer, dim: int) -> "HiSS":
        return HiSS(self, inner, dim)

    def num_params(self, dim: int) -> int:
        return self.low.num_params(dim)

    def span(self) -> int:
        return self.chunk

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(chunk=3, low=LowConfig(mixer=MambaConfig(state=3), layers=2, dim=6)),
            cls(chunk=4, low=LowConfig(mixer=AttentionConfig(heads=2), ffn=SwiGLUConfig(hidden=8))),
            cls(chunk=2, low=LowConfig(mixer=GatedDeltaConfig(heads=2))),
        ]


class Low(SequenceMixer):
    """Pre-norm blocks on top of an offset, a final norm, and a map at both ends where the width is another.

    A norm keeps directions only, but how strong a reading is must come through, or nothing can be summed up. The offset is larger than what it is added
    to, and the residual stream hands it on: what the norms divide by, here and in the backbone, hardly depends on the reading."""

    def __init__(self, cfg: LowConfig, dim: int, room: int):
        super().__init__()
        wide, n = cfg.dim or dim, cfg.layers
        self.dim, self.room = dim, room
        self.into = None if cfg.dim is None else Linear(dim, wide, bias=True)
        self.norms = nn.ModuleList(RMSNorm(wide) for _ in range(n))
        self.mixers: Any = nn.ModuleList(cfg.mixer.make(wide, {}) for _ in range(n))
        ffns = [] if cfg.ffn is None else [cfg.ffn.make(wide, {}) for _ in range(n)]
        self.ffn_norms = nn.ModuleList(RMSNorm(wide) for _ in ffns)
        self.ffns: Any = nn.ModuleList(ffns)
        self.offset = nn.Parameter(torch.empty(wide))
        self.norm = RMSNorm(wide)
        self.out = None if cfg.dim is None else Linear(wide, dim, bias=True)
        reads = getattr(self.mixers[0], "reads", ())
        require(not reads, f"low.mixer {cfg.mixer.kind!r} reads the note {', '.join(reads)!r}, and nothing below it writes one. Choose another mixer.")

    def init_(self, depth: int, generator: torch.Generator) -> None:
        for norm in (*self.norms, *self.ffn_norms, self.norm):
            norm.init_()
        normal_(self.offset, OFFSET, generator)
        for layer in (*self.mixers, *self.ffns):
            layer.init_(len(self.mixers), generator)
        for linear in (self.into, self.out):
            if linear is not None:
                linear.init_(generator)

    def start(self, batch: int) -> State:
        """A history has the length that an open chunk may need, from the start: as many pads are fed."""
        if all(mixer.grows() == 0 for mixer in self.mixers):
            return tuple(mixer.start(batch) for mixer in self.mixers)
        pads = self.offset.new_zeros(batch, self.room, self.dim)
        return self(pads, lengths=torch.zeros(batch, dtype=torch.int64, device=pads.device)).state

    def fit(self, state: State, like: State) -> State:
        return states.trim(state, states.grew(like, state), self.room)

    def forward(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        x = (x if self.into is None else self.into(x)) + self.offset
        aux: dict[str, Tensor] = {}
        new = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            h = mixer(norm(x), None if state is None else state[i], below=EMPTY, lengths=lengths)
            x = x + h.y
            new.append(h.state)
            aux |= under(f"low.{i}.mixer", h.aux)
            if self.ffns:
                fed = self.ffns[i](self.ffn_norms[i](x))
                x = x + fed.y
                aux |= under(f"low.{i}.ffn", fed.aux)
        x = self.norm(x)
        return Mixed(x if self.out is None else self.out(x), tuple(new), aux)


class HiSSState(NamedTuple):
    low: State  # of the open chunk
    high: State
    answer: Tensor  # [B, D] what the backbone last said
    place: Tensor  # [B] int64: tokens of the open chunk so far, 0 <= place < k


class Chunks(NamedTuple):
    """What the low level makes of the tokens of a call."""

    read: Tensor  # [B, N, D] a vector for every chunk that a row may complete, the completed ones first
    done: Tensor | None  # [B] how many it does complete; None: N in every row
    low: State  # of the chunks that stay open
    aux: dict[str, Tensor]


class HiSS(SequenceMixer):
    def __init__(self, cfg: HiSSConfig, inner: SequenceMixer, dim: int):
        super().__init__()
        self.inner, self.chunk, self.dim = inner, cfg.chunk, dim
        self.every = cfg.chunk * inner.every
        self.low = Low(cfg.low, dim, max(1, cfg.chunk - 1))

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.inner.init_(depth, generator)
        self.low.init_(depth, generator)

    def start(self, batch: int) -> HiSSState:
        like = self.low.offset
        place = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return HiSSState(self.low.start(batch), self.inner.start(batch), like.new_zeros(batch, self.dim), place)

    def grows(self) -> int | None:
        inner = self.inner.grows()
        return None if inner is None else inner * self.chunk

    def forward(self, x: Tensor, state: HiSSState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        T, k = x.shape[1], self.chunk
        low, high, answer, place = self.start(x.shape[0]) if state is None else state
        if lengths is None and (state is None or at_start(place)):
            read, done, low, aux = self.whole(x, low)
        else:
            read, done, low, aux = self.pieces(x, low, place, torch.full_like(place, T) if lengths is None else lengths)
        answers = answer[:, None]  # [B, 1 + N, D]
        if read.shape[1]:
            h = self.inner(read, None if state is None else high, lengths=done)
            high, answers = h.state, torch.cat([answers, h.y.to(answer.dtype)], 1)
            answer = (answers[:, -1] if done is None else pick(answers, done[:, None])[:, 0]).clone()
            add(aux, h.aux, 1)
        # On the grid of a row that begins at its chunk every answer stands k times, and token t of the call is place + 1 + t there.
        wide = answers[:, :, None].expand(-1, -1, k, -1).flatten(1, 2)
        y = wide[:, 1 : T + 1] if done is None else pick(wide, place[:, None] + torch.arange(1, T + 1, device=x.device))
        seen = T if lengths is None else lengths
        return Mixed(y, HiSSState(low, high, answer, (place + seen) % k), aux)

    def whole(self, x: Tensor, low: State) -> Chunks:
        """No row is inside a chunk, so `low` is that of a fresh one: T // k chunks in every row, and what is left opens another."""
        (B, T, D), k = x.shape, self.chunk
        N, left = T // k, T % k
        aux: dict[str, Tensor] = {}
        read = x.new_zeros(B, N, D)
        if N:
            h = self.low(x[:, : N * k].reshape(B * N, k, D))
            read = h.y[:, -1].unflatten(0, (B, N))
            add(aux, h.aux, N * k / T)
        if left:
            h = self.low(x[:, N * k :], low)
            low = self.low.fit(h.state, low)
            add(aux, h.aux, left / T)
        return Chunks(read, None, low, aux)

    def pieces(self, x: Tensor, low: State, place: Tensor, left: Tensor) -> Chunks:
        """Every row on its own grid: the rest of its open chunk, then whole chunks, the last of them perhaps not."""
        (B, T, D), k = x.shape, self.chunk
        take = torch.minimum(k - place, left)  # [B] tokens for the open chunk
        done = (place + left) // k
        first = self.low(x[:, :k], low, lengths=take)
        read, total = pick(first.y, (take - 1).clamp(min=0)[:, None]), left.sum().clamp(min=1)
        aux: dict[str, Tensor] = {}
        add(aux, first.aux, take.sum() / total)
        stay = self.low.fit(first.state, low)
        N = (T - 2) // k + 1  # a row that stands at the last place of its chunk has T - 1 tokens behind it
        if N:
            index = take[:, None] + torch.arange(N * k, device=x.device)  # [B, N k]
            begins = k * torch.arange(N, device=x.device)
            sizes = (left[:, None] - take[:, None] - begins).clamp(0, k)  # [B, N]
            h = self.low(pick(x, index).reshape(B * N, k, D), lengths=sizes.flatten())
            read = torch.cat([read, h.y[:, -1].unflatten(0, (B, N))], 1)
            which = (done - 1).clamp(0, N - 1) + N * torch.arange(B, device=x.device)
            stay = states.select(done > 0, self.low.fit(states.take(h.state, which), low), stay)
            add(aux, h.aux, (left - take).sum() / total)
        stay = states.select((place + left) % k == 0, self.low.start(B), stay)
        if not (torch.compiler.is_compiling() or done.is_meta):
            read = read[:, : int(done.max())]  # most calls with one token complete nothing, and the backbone need not run
        return Chunks(read, done, stay, aux)


def at_start(place: Tensor) -> bool:
    """Whether no row is inside a chunk, where that may be asked. A compiled graph is one for every state; on meta only shapes count."""
    return not torch.compiler.is_compiling() and (place.is_meta or not place.any())


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B, n, D], index [B, m] -> [B, m, D]; what lies behind the end is a pad, and any row will do."""
    return x.gather(1, index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))


def add(aux: dict[str, Tensor], more: Any, share: Any) -> None:
    for name, value in more.items():
        aux[name] = aux.get(name, 0.0) + value * share
