"""MemMamba (Wang et al. 2025): a Mamba that takes notes of what it has read, and reads them before it goes on.

    note of a window, when it is complete:    s_j = W_N max_t u_t    e_j = max_t i_t    i_t = sigmoid(w_i . u_t + b_i)    kept iff e_j > accept
    c_t = alpha * W_o [f_t attention(u_t; the notes in the pool)]     f_t = sigmoid(w_f . u_{t-1} + b_f), 0 where it is not above `open`
    y = Mamba(u + c + c'),    c' the same over the pools of layers below, with maps of its own and without the gate

The pool has room for K notes: those of the highest score, or the latest ("fifo"). A token sees the pool as it was when its own window began, so nothing of
its own window, and with it no later token. Attention has a slot of logit 0 and value 0, so that an empty pool adds exactly nothing, and log e_j in its
logits, through which the score learns.

No code was published and the paper leaves much open; this is one reading of it. The paper's gate compares the pool with the state of the scan, which would
make training sequential: here it looks at the token before. With alpha 0 the layer begins as exactly its Mamba, which is right for fine-tuning one; then
alpha learns first, and the rest when it is no longer 0. From scratch 0.1.

    w window   K slots of the pool   r width of a note   A width of attention
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.autocast import exact
from memarch.layers.mamba import MambaConfig, MambaState
from memarch.layers.parts import Linear
from memarch.layers.parts.notes import Kept, Pool, Recall, collect, peaks, plain_, unchanged


@dataclass(frozen=True, kw_only=True)
class MemMambaConfig(LayerConfig):
    kind: Literal["memmamba"] = "memmamba"
    mamba: MambaConfig = field(default_factory=MambaConfig)
    window: int = 32  # tokens of a note
    slots: int = 50  # K
    note: int = 64  # r; layers that read each other's notes have the same
    attn: int | None = None  # A; None: 256, or dim where that is less
    heads: int | None = None  # None: of 64
    gate: Literal["learned", "periodic", "delta", "always"] = "learned"  # i_t: learned; 1; the step of the layer below (its note "step"); 1
    accept: float = 0.5  # a note is kept if its score is above this; from 1 on none is, but a step has no bound
    period: tuple[int, int] = (200, 50)  # "periodic": of so many tokens, the windows that begin in the first so many
    policy: Literal["priority", "fifo"] = "priority"
    open: float = 0.0  # f is 0 where it is not above this
    cross_token: bool = True  # read the own notes
    reach: int = 0  # read the notes of so many layers below that post them
    share: bool = False  # post the own, as the note "pool"
    alpha: float = 0.1  # at init

    paper: ClassVar[str] = "Wang et al. 2025, arXiv 2510.03279"

    def __post_init__(self) -> None:
        for name in ("window", "slots", "note"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.accept >= 0 and self.open >= 0, f"accept and open are compared with what is never negative; got {self.accept} and {self.open}.")
        require(0 < self.period[1] <= self.period[0], f"period is (tokens, how many of them), (200, 50) say; got {self.period}.")
        require(self.reach >= 0, f"reach counts layers, 0 for none, got {self.reach}.")
        require(self.cross_token or self.share, "without cross_token nobody reads the notes unless they are posted: set share, or take kind mamba.")

    def widths(self, dim: int) -> tuple[int, int]:
        """Width of attention and its heads."""
        width = self.attn or min(256, dim)
        heads = self.heads or max(1, width // 64)
        require(width % heads == 0, f"heads {heads} must divide the width of attention, {width}. Set attn or heads.")
        return width, heads

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "MemMamba":
        return MemMamba(self, dim)

    def num_params(self, dim: int) -> int:
        width, _ = self.widths(dim)
        taking = self.note * dim + (self.gate == "learned") * (dim + 1)
        token = Recall.num_params(dim, self.note, width) + dim + 1
        layer = Recall.num_params(dim, self.note, width, self.reach)
        return self.mamba.num_params(dim) + taking + self.cross_token * token + (self.reach > 0) * layer

    def span(self) -> int:
        return max(self.mamba.span(), self.window * (self.slots + 1), self.period[0] if self.gate == "periodic" else 1)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        small = MambaConfig(state=2)
        return [
            cls(mamba=small, window=4, slots=3, note=5),
            cls(mamba=MambaConfig(state=3, share=("step",)), window=3, slots=2, note=5, attn=8, heads=2, accept=0.6, open=0.45, policy="fifo", share=True),
            cls(mamba=small, window=3, slots=4, note=6, gate="periodic", period=(14, 8), policy="fifo"),
            cls(mamba=small, window=3, slots=3, note=4, gate="delta", accept=0.0, alpha=0.0),
            cls(mamba=small, window=4, slots=3, note=5, gate="always", cross_token=False, share=True),
            cls(mamba=small, window=4, slots=3, note=5, reach=1),
        ]


class MemMambaState(NamedTuple):
    mamba: MambaState
    pos: Tensor  # [B] int64: tokens seen
    peak: Tensor  # [B, D + 1] the largest u of the open window, and the largest i, fp32 at least; 0 before its first token
    before: Tensor  # [B, 1] w_f . u of the last token
    pool: Kept


class MemMamba(SequenceMixer):
    def __init__(self, cfg: MemMambaConfig, dim: int):
        super().__init__()
        self.cfg, (width, heads) = cfg, cfg.widths(dim)
        self.reads = ("step",) * (cfg.gate == "delta") + ("pool",) * (cfg.reach > 0)
        self.writes = (*cfg.mamba.share, *("pool",) * cfg.share)
        self.mamba = cfg.mamba.make(dim, {})
        self.note = Linear(dim, cfg.note)
        self.score = Linear(dim, 1, bias=True) if cfg.gate == "learned" else None
        self.open = Linear(dim, 1, bias=True) if cfg.cross_token else None
        self.token = Recall(dim, cfg.note, width, heads) if cfg.cross_token else None
        self.layer = Recall(dim, cfg.note, width, heads, cfg.reach) if cfg.reach else None

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.mamba.init_(depth, generator)
        for linear in (self.note, self.score, self.open):
            if linear is not None:
                plain_(linear, generator)
        for recall in (self.token, self.layer):
            if recall is not None:
                recall.init_(depth, self.cfg.alpha, generator)

    def start(self, batch: int) -> MemMambaState:
        weight, K = self.note.weight, self.cfg.slots
        wide = torch.promote_types(weight.dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return weight.new_zeros(batch, *shape, dtype=dtype)

        kept = Kept(zeros(K, self.cfg.note), zeros(K), zeros(K, dtype=torch.int64) - 1)
        return MemMambaState(self.mamba.start(batch), zeros(dtype=torch.int64), zeros(weight.shape[1] + 1), zeros(1), kept)

    def forward(self, x: Tensor, state: MemMambaState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        (B, T, _), aligned = x.shape, state is None and lengths is None
        inner = None if state is None else state.mamba
        state = self.start(B) if state is None else state
        count = torch.full_like(state.pos, T) if lengths is None else lengths
        pool, kept, peak, aux = self._take(x, state, below, None if aligned else state.pos % self.cfg.window, count)
        fused, before = x, state.before
        if self.token is not None and self.open is not None:
            pull = torch.cat([before[:, None], wide_linear(x, self.open.weight)], 1).squeeze(2)  # [B, T + 1]
            before = pull[:, -1:].clone() if lengths is None else pull.gather(1, count[:, None])
            f = (pull[:, :-1] + self.open.bias).sigmoid()  # [B, T]
            f = F.threshold(f, self.cfg.open, 0.0)
            fused = fused + self.token(x, [pool], f).to(x.dtype)
            aux["open"] = _mean(f.detach(), lengths)
        if self.layer is not None:
            fused = fused + self.layer(x, self._below(below)).to(x.dtype)
        h = self.mamba(fused, inner, lengths=lengths)
        note: dict[str, Any] = {**h.note, "pool": pool} if self.cfg.share else dict(h.note)
        return Mixed(h.y, MemMambaState(h.state, state.pos + count, peak, before, kept), aux, note)

    def _take(self, x: Tensor, state: MemMambaState, below: Notes, place: Tensor | None, count: Tensor) -> tuple[Pool, Kept, Tensor, dict[str, Tensor]]:
        """Notes of the windows that close among these tokens -> what each token sees, the pool and the open window's peak afterwards, gauges."""
        cfg = self.cfg
        if cfg.gate == "delta":
            i = below["step"][-1].dt[..., None]  # [B, T, 1]
        elif self.score is not None:
            i = wide_linear(x, self.score.weight, self.score.bias).sigmoid()
        else:
            i = torch.ones_like(x[..., :1], dtype=state.peak.dtype)
        top, peak = peaks(torch.cat([x.to(i.dtype), i], 2), state.peak, cfg.window, place, count)
        top, e = top[..., :-1], top[..., -1]  # [B, G, D], [B, G]
        window = (state.pos // cfg.window)[:, None] + torch.arange(e.shape[1], device=x.device)  # [B, G]
        complete = window < ((state.pos + count) // cfg.window)[:, None]
        accepted = complete & (e > cfg.accept)
        if cfg.gate == "periodic":
            accepted &= window * cfg.window % cfg.period[0] < cfg.period[1]
        if x.shape[1] == 1 and self._idle(accepted):
            pool, kept = unchanged(state.pool), state.pool
        else:
            pool, kept = collect(wide_linear(top, self.note.weight), e, accepted, state.pool, state.pos, x.shape[1], cfg.window, cfg.policy)
        aux = {"accepted": accepted.sum() / complete.sum().clamp(min=1), "full": (kept.window >= 0).float().mean()}
        return pool, kept, peak, aux

    def _idle(self, accepted: Tensor) -> bool:
        """No note is taken, as by most tokens when they come one by one. Looked at on a CPU only, where it costs no wait, and for no gradient, which the
        map to notes then would not have."""
        return accepted.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not accepted.any()

    def _below(self, below: Notes) -> list[Pool]:
        """The pools within reach, the nearest first."""
        pools = below["pool"][: -self.cfg.reach - 1 : -1]
        for pool in pools:
            if pool.s.shape[-1] != self.cfg.note:
                raise ValueError(f"this memmamba reads notes of width {self.cfg.note}, and a layer below posts {pool.s.shape[-1]}. Give both the same note.")
        return list(pools)


def _mean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Of x [B, T] over the real tokens."""
    if lengths is None:
        return x.mean()
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return (x * real).sum() / real.sum().clamp(min=1)


@exact
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32 also under autocast: what is kept is decided once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
