"""Titans' neural long-term memory (Behrouz et al. 2024): an MLP whose weights learn by gradient steps, while it reads, to answer keys with values.

    S_t = eta_t S_{t-1} - step_t grad 1/2 |M'(k_t) - v_t|^2      momentum: past surprise and momentary surprise
    M_t = a_t M_{t-1} + S_t                                      forget and write
    y_t = W_o [RMSNorm(M_t(q_t)) * SiLU(W_g x_t)]                read, after the write

q, k, v come through a short convolution and SiLU; q and k have unit length. The gates a, eta and the step are numbers per token and head
(parts/neural.py, with what keeps the memory bounded). M' is M_{t-1} for a linear memory (depth 1), which has an exact form in chunks, and the memory at
the start of a chunk for an MLP. The paper leaves open heads, widths, the MLP's norm and where it starts; it starts as learned here. The paper's memory
forgets to zero. An MLP of zeros answers nothing and has no gradient, so an MLP forgets to its start, unless `decay_to` says otherwise.

One field each: the Omega rule of Atlas (`window`: a step follows the last tokens' gradients, Behrouz et al. 2025, arXiv 2505.23735); TTT (`ttt`: the
mean of a chunk's steps, layers with biases, neither momentum nor decay, Sun et al. 2024, arXiv 2407.04620: TTT-Linear at depth 1, TTT-MLP at 2);
`shift`: a value is stored under the key of the token before it, so that a token finds what followed it last time.

    H heads   K width of a head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.delta_rule.torch_impl import CHUNK
from memarch.layers.parts.heads import Heads, Readout, key_width
from memarch.layers.parts.neural import Kind, NeuralMemory
from memarch.layers.parts.norm import l2_norm
from memarch.layers.parts.recurrent import RecurrentState


@dataclass(frozen=True, kw_only=True)
class TitansLMMConfig(LayerConfig):
    kind: Literal["titans_lmm"] = "titans_lmm"
    heads: int = 4
    head_dim: int | None = None  # None: dim / heads
    depth: int = 2  # layers of the memory; 1 is a matrix
    expand: int = 4  # hidden width of the memory, in widths of a head
    activation: Literal["gelu", "silu"] = "gelu"
    post: Literal["none", "res", "rms", "ln"] | None = None  # the answer: z, k + z, k + normalised z; None: "ln" for an MLP and TTT, "none" for a matrix
    grad_point: Literal["exact", "chunk"] | None = None  # gradients at M_{t-1} or at the chunk's start; None: exact where it has a form in chunks
    chunk: int = 64
    window: int = 1
    momentum: bool = True
    decay: bool = True
    decay_to: Literal["zero", "init"] | None = None  # what is left when all is forgotten; None: "zero" for a matrix, "init" for an MLP, which zero kills
    cap: float | None = None  # of the step; None: 1 exact, 2 / sqrt(chunk) at a chunk's start and a window's share of that, TTT's own 1 or 0.1
    clip: float | None = None  # of a gradient's length, 0 for none; None: 4, and none for a matrix in its exact form
    conv: int = 4  # taps; 0 for none
    gate: bool = True  # gate the output
    shift: bool = False
    ttt: bool = False
    init: Literal["standard", "recall"] = "standard"

    paper: ClassVar[str] = "Behrouz et al. 2024, arXiv 2501.00663"

    def __post_init__(self) -> None:
        for name in ("heads", "depth", "expand", "chunk", "window"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.conv >= 0, f"conv counts taps, 0 for none, got {self.conv}.")
        require(self.cap is None or self.cap > 0, f"cap bounds the step, so it is positive, or null for the default; got {self.cap}.")
        require(self.clip is None or self.clip >= 0, f"clip bounds a gradient's length, 0 for none, null for the default; got {self.clip}.")
        if self.exact:
            require(self.window == 1, "window takes gradients of several tokens at one memory: set grad_point 'chunk'.")
            require(not (self.clip and self.linear), "clip is no part of the exact form of a matrix, which solves for many writes at once: leave it out.")
        if self.ttt:
            require(not self.exact, "ttt takes its gradients at a chunk's start: set grad_point 'chunk', and chunk 16 as published.")
            require(not self.momentum and not self.decay, "ttt has neither momentum nor decay: set momentum and decay false.")
            require(self.window == 1, "ttt weighs the steps of a chunk by its own rule: leave window at 1.")

    @property
    def linear(self) -> bool:
        return self.depth == 1 and self.post in (None, "none", "res") and not self.ttt

    @property
    def exact(self) -> bool:
        return self.grad_point == "exact" or (self.grad_point is None and self.linear and self.window == 1)

    def memory(self, dim: int) -> Kind:
        cap = 1.0 if self.exact else min(1.0, 2 * self.chunk**-0.5) / self.window
        if self.ttt:
            cap = 1.0 if self.depth == 1 else 0.1  # as published
        return Kind(
            self.heads,
            key_width(self.heads, self.head_dim, dim),
            self.depth,
            self.expand,
            self.activation,
            self.post or ("ln" if self.depth > 1 or self.ttt else "none"),
            None if self.exact else self.chunk,
            self.window,
            self.momentum,
            self.decay,
            self.decay_to or ("init" if self.depth > 1 and self.decay else "zero"),
            cap if self.cap is None else self.cap,
            None if self.clip == 0 or (self.exact and self.linear) else self.clip or 4.0,
            self.shift,
            self.ttt,
        )

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "TitansLMM":
        return TitansLMM(self, dim)

    def num_params(self, dim: int) -> int:
        kind = self.memory(dim)
        sizes = (dim, kind.heads, kind.width)
        return Heads.num_params(*sizes, kind.width, self.conv) + kind.num_params(dim) + Readout.num_params(*sizes, self.gate)

    def span(self) -> int:
        return max(CHUNK if self.exact else self.chunk, self.conv)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(heads=2, chunk=6, expand=2),
            cls(heads=2, depth=1, cap=0.5, gate=False, init="recall"),
            cls(heads=3, head_dim=4, depth=1, post="res", grad_point="exact", decay_to="init", shift=True, momentum=False),
            cls(heads=2, depth=3, expand=1, activation="silu", post="none", grad_point="chunk", chunk=5, clip=0.5, conv=0, decay_to="zero"),
            cls(heads=2, depth=1, post="rms", chunk=7, window=3, clip=0.0, decay=False),
            cls(heads=2, depth=1, grad_point="chunk", chunk=4, ttt=True, momentum=False, decay=False),
            cls(heads=2, grad_point="exact", expand=1, conv=2),
        ]


class TitansLMM(SequenceMixer):
    def __init__(self, cfg: TitansLMMConfig, dim: int):
        super().__init__()
        self.cfg, kind = cfg, cfg.memory(dim)
        self.into = Heads(dim, kind.heads, kind.width, kind.width, cfg.conv)
        self.memory = NeuralMemory(dim, kind)
        self.read = Readout(dim, kind.heads, kind.width, cfg.gate)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator, self.cfg.init == "recall")
        self.memory.init_(generator)
        self.read.init_(depth, generator)

    def start(self, batch: int) -> RecurrentState:
        return RecurrentState(self.memory.start(batch), self.into.start(batch))

    def forward(self, x: Tensor, state: RecurrentState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        q, k, v, tail = self.into(x, tail, lengths)  # [B, T, H, K]
        o, memory, aux = self.memory(x, l2_norm(q), l2_norm(k), v, memory, lengths)
        return Mixed(self.read(o, x), RecurrentState(memory, tail), aux)

    def recall(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """What a memory at rest answers to x [B, T, D]: nothing is written, and the convolution, which would look back, is left out."""
        q = F.silu(F.linear(x, self.into.qkv.weight[: self.into.sizes[0]])).unflatten(-1, (self.into.heads, -1))
        return self.read(self.memory.recall(l2_norm(q), weights), x)
