"""Mamba (Gu & Dao 2023): a state space model for every channel, whose step, write and read are chosen by the token.

    x, z = W_in u;   x = SiLU(conv(x));   p, B, C = W_x x;   dt = softplus(W_dt p + bias);   A = -e^{A_log}
    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t;   y_t = h_t C_t + D x_t;   out_t = W_out [y_t * SiLU(z_t)]

A channel has one step and N decays; B and C are shared by all channels. The step is never computed in full, but through R numbers.

    E = expand dim   N states of a channel   R rank of the step   h [E, N] memory
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, last
from memarch.kernels.selective_scan import selective_scan, token
from memarch.kernels.selective_scan.torch_impl import LONGEST
from memarch.layers.parts import Linear, ShortConv
from memarch.layers.parts.gates import STEP, step_bias_
from memarch.layers.parts.linear import uniform_


@dataclass(frozen=True, kw_only=True)
class MambaConfig(LayerConfig):
    kind: Literal["mamba"] = "mamba"
    state: int = 16  # N
    conv: int = 4
    expand: int = 2
    rank: int | None = None  # R; None: dim / 16, rounded up
    bias: bool = False  # of W_in and W_out
    conv_bias: bool = True
    step: tuple[float, float] = STEP  # dt at init is log-uniform in here,
    floor: float = 1e-4  # and at least this
    init: Literal["standard", "recall"] = "standard"
    share: tuple[Literal["readout", "step"], ...] = ()  # notes to post: what the scan reads, before the gate, and how much of a token is written

    paper: ClassVar[str] = "Gu & Dao 2023, arXiv 2312.00752"

    def __post_init__(self) -> None:
        for name in ("state", "conv", "expand"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.rank is None or self.rank > 0, f"rank must be at least 1, or null for dim / 16, got {self.rank}.")
        require(0 < self.step[0] <= self.step[1], f"step is a range (low, high) with 0 < low <= high, got {self.step}.")
        require(self.floor > 0, f"floor must be above 0, got {self.floor}.")
        require(self.init == "standard" or self.conv > 1, "init recall shows a channel the token before, so conv must be at least 2.")

    def ranks(self, dim: int) -> int:
        return self.rank or math.ceil(dim / 16)

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "Mamba":
        return Mamba(self, dim)

    def num_params(self, dim: int) -> int:
        wide, rank = self.expand * dim, self.ranks(dim)
        scan = wide * (rank + 2 * self.state) + wide * (rank + 1) + wide * (self.state + 1)
        return 3 * wide * dim + self.bias * (2 * wide + dim) + wide * (self.conv + self.conv_bias) + scan

    def span(self) -> int:
        return max(LONGEST, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(state=5),
            cls(state=3, conv=2, expand=3, rank=2, bias=True, conv_bias=False, step=(1e-2, 1.0), floor=0.05, init="recall", share=("readout",)),
            cls(state=2, share=("readout", "step")),
        ]


class MambaState(NamedTuple):
    memory: Tensor  # [B, E, N], fp32 at least
    tail: Tensor  # [B, conv - 1, E]


class Readout(NamedTuple):
    """What the scan of one layer reads, for a gated memory unit above."""

    y: Tensor  # [B, T, E]

    def last(self, lengths: Tensor | None) -> "Readout":
        return Readout(last(self.y, lengths))


class Step(NamedTuple):
    """How large the step of one layer is on average over its channels."""

    dt: Tensor  # [B, T]


class Mamba(SequenceMixer):
    def __init__(self, cfg: MambaConfig, dim: int):
        super().__init__()
        self.cfg, wide, rank = cfg, cfg.expand * dim, cfg.ranks(dim)
        self.writes = cfg.share
        self.sizes = [rank, cfg.state, cfg.state]  # p, B, C
        self.into = Linear(dim, 2 * wide, cfg.bias)  # x, z
        self.conv = ShortConv(wide, cfg.conv, cfg.conv_bias)
        self.select = Linear(wide, sum(self.sizes))
        self.dt = Linear(rank, wide, bias=True)
        self.A_log = nn.Parameter(torch.empty(wide, cfg.state))
        self.D = nn.Parameter(torch.empty(wide))
        self.out = Linear(wide, dim, cfg.bias)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        for linear in (self.into, self.select, self.dt, self.out):
            uniform_(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        self.out.weight.div_(math.sqrt(depth))  # one map a block writes into the residual stream: published Mamba blocks have no feed-forward
        self.conv.init_(generator)
        if self.conv.bias is not None:
            uniform_(self.conv.bias, self.conv.width, generator)
        self.A_log.copy_(torch.arange(1, self.cfg.state + 1).log())
        self.D.fill_(1)
        step_bias_(self.dt.bias, generator, self.cfg.step)
        self.dt.bias.clamp_(min=math.log(math.expm1(self.cfg.floor)))
        if self.cfg.init == "recall":
            self.recall_()

    def recall_(self) -> None:
        """A query finds its key from the first step on, where the published init has to find the way. Half of the channels pass a token on and the
        other half, by the same map, the token before, which is the key of a value; C reads those and B these, by one map that is large enough for
        what is read not to drown in the skip; decays are slow."""
        half = len(self.D) // 2
        self.into.weight[half : 2 * half] = self.into.weight[:half]
        self.conv.weight.zero_()
        self.conv.weight[:half, -1] = 1
        self.conv.weight[half:, -2] = 1
        if self.conv.bias is not None:
            self.conv.bias.zero_()
        _, B, C = self.select.weight.split(self.sizes)
        C[:, half:] = 0
        C.mul_(4)
        B.copy_(C.roll(half, 1))
        self.A_log.sub_(math.log(1000))

    def start(self, batch: int) -> MambaState:
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return MambaState(self.A_log.new_zeros(batch, *self.A_log.shape, dtype=wide), self.conv.start(batch))

    def forward(self, x: Tensor, state: MambaState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        if x.shape[1] == 1 and memory is not None and tail is not None and lengths is None and not self.cfg.share:
            into, conv, out = self.into, self.conv, self.out
            most = self.select.weight, self.dt.weight, self.dt.bias, self.A_log, self.D
            weights = token.Weights(into.weight, into.bias, conv.weight, conv.bias, *most, out.weight, out.bias)
            if token.fits(x, memory, tail, weights):
                y, memory, tail = token.token(x, memory, tail, weights)
                return Mixed(y, MambaState(memory, tail))
        x, z = self.into(x).chunk(2, -1)  # [B, T, E]
        x, tail = self.conv(x, tail, lengths)
        x = F.silu(x)
        p, B, C = self.select(x).split(self.sizes, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(F.linear(p, self.dt.weight).to(wide) + self.dt.bias)  # [B, T, E]
        shared = "readout" in self.cfg.share
        y, memory = selective_scan(x, dt, -self.A_log.to(wide).exp(), B, C, self.D, None if shared else z, memory, lengths=lengths)
        notes: dict[str, Readout | Step] = {}
        if shared:
            notes["readout"] = Readout(y)
            y = y * F.silu(z)
        if "step" in self.cfg.share:
            notes["step"] = Step(dt.mean(-1))
        return Mixed(self.out(y), MambaState(memory, tail), note=notes)
