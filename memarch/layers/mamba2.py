"""Mamba-2 (Dao & Gu 2024): a state space model with one decay per head, which makes it linear attention with a scalar gate.

    z, u, B, C, dt = parts of W_in x;   u, B, C = SiLU(conv(u, B, C));   d_t = softplus(dt + bias)
    S_t = e^{-d_t A} S_{t-1} + B_t (d_t u_t)^T;   o_t = S_t^T C_t + D u_t;   y_t = W_out RMSNorm[o_t * SiLU(z_t)]

B writes and C reads: they are the keys and the queries, shared by the heads of a group; nothing is scaled. The norm runs over a group.

    E = expand dim   P head width   H = E / P heads   N key width ("state")   G groups   S [N, P] memory of one head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts import Linear, RMSNorm, ShortConv
from memarch.layers.parts.gates import STEP, decay_, step_bias_

RECALL_STEP = (0.1, 1.0)  # the step also scales what is written: small ones drown in the skip D u until training finds them


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LayerConfig):
    kind: Literal["mamba2"] = "mamba2"
    state: int = 128  # N
    head_dim: int = 64  # P
    expand: int = 2
    groups: int = 1
    conv: int = 4
    decay: tuple[float, float] = (1.0, 16.0)  # A at init is uniform in here
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Dao & Gu 2024, arXiv 2405.21060"

    def __post_init__(self) -> None:
        for name in ("state", "head_dim", "expand", "groups", "conv"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(0 <= self.decay[0] <= self.decay[1], f"decay is a range (low, high) with 0 <= low <= high, got {self.decay}.")

    def heads(self, dim: int) -> int:
        wide = self.expand * dim
        require(wide % self.head_dim == 0, f"head_dim {self.head_dim} must divide expand x dim = {wide}.")
        require(wide // self.head_dim % self.groups == 0, f"groups {self.groups} must divide the {wide // self.head_dim} heads.")
        return wide // self.head_dim

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "Mamba2":
        return Mamba2(self, dim)

    def num_params(self, dim: int) -> int:
        heads, wide = self.heads(dim), self.expand * dim
        mixed = wide + 2 * self.groups * self.state
        return dim * (wide + mixed + heads) + mixed * (self.conv + 1) + 3 * heads + wide + wide * dim

    def span(self) -> int:
        return max(CHUNK, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(state=5, head_dim=8), cls(state=4, head_dim=6, expand=3, groups=2, conv=2, decay=(1e-3, 1.0), init="recall")]


class Mamba2State(NamedTuple):
    memory: Tensor  # [B, H, N, P], fp32 at least
    tail: Tensor  # [B, conv - 1, E + 2 G N]


class Mamba2(SequenceMixer):
    def __init__(self, cfg: Mamba2Config, dim: int):
        super().__init__()
        self.cfg, self.heads = cfg, cfg.heads(dim)
        wide, keys = cfg.expand * dim, cfg.groups * cfg.state
        self.sizes = [wide, wide + 2 * keys, self.heads]  # z; u, B, C; dt
        self.mixed = [wide, keys, keys]
        self.into = Linear(dim, sum(self.sizes))
        self.conv = ShortConv(self.sizes[1], cfg.conv, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(wide, eps=1e-5, groups=cfg.groups)
        self.out = Linear(wide, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        recall = self.cfg.init == "recall"
        self.into.init_(generator)
        if recall:  # keys start as queries
            wide, keys = self.mixed[:2]
            self.into.weight[2 * wide + keys :][:keys].copy_(self.into.weight[2 * wide :][:keys])
        self.conv.init_(generator, recall)
        decay_(self.A_log, self.cfg.decay, generator)
        step_bias_(self.dt_bias, generator, RECALL_STEP if recall else STEP)
        self.D.fill_(1)
        self.norm.init_()
        self.out.init_(generator, depth)

    def start(self, batch: int) -> Mamba2State:
        weight = self.out.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return Mamba2State(weight.new_zeros(batch, self.heads, self.cfg.state, self.cfg.head_dim, dtype=wide), self.conv.start(batch))

    def forward(self, x: Tensor, state: Mamba2State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        z, mixed, dt = self.into(x).split(self.sizes, -1)
        mixed, tail = self.conv(mixed, tail, lengths)
        u, B, C = F.silu(mixed).split(self.mixed, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(dt.to(wide) + self.dt_bias.to(wide))  # [B, T, H]
        u = u.unflatten(-1, (self.heads, -1))  # [B, T, H, P]
        k, q = (part.unflatten(-1, (self.cfg.groups, -1)).repeat_interleave(self.heads // self.cfg.groups, 2) for part in (B, C))  # [B, T, H, N]
        o, memory = delta_rule(q, k, u.to(wide) * step[..., None], None, -self.A_log.to(wide).exp() * step, memory, lengths=lengths)
        o = (o + self.D.to(wide)[:, None] * u).flatten(2)
        return Mixed(self.out(self.norm(o * F.silu(z)).to(x.dtype)), Mamba2State(memory, tail))
