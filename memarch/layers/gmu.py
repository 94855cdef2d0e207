"""Gated memory unit (Ren et al. 2025): what a layer below has read from its memory, weighed anew by the token at hand.

    y_t = W_2 [m_t * SiLU(W_1 x_t)]         with `norm`: W_2 RMSNorm(m_t * SiLU(W_1 x_t))

m is the readout of that layer: what it mixed along time, before its own gate. So a layer above mixes time again at the price of two maps, and keeps
no state of its own. Readouts that no gate has bounded (matrix memories) want the norm.

    E = expand dim, width of the readout
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.layers.parts import Linear, RMSNorm
from memarch.layers.parts.linear import uniform_


@dataclass(frozen=True, kw_only=True)
class GMUConfig(LayerConfig):
    kind: Literal["gmu"] = "gmu"
    expand: int = 2  # must be the writer's
    norm: bool = False

    paper: ClassVar[str] = "Ren et al. 2025, arXiv 2507.06607"

    def __post_init__(self) -> None:
        require(self.expand > 0, f"expand must be at least 1, got {self.expand}.")

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "GMU":
        return GMU(self, dim)

    def num_params(self, dim: int) -> int:
        return self.expand * dim * (2 * dim + self.norm)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(), cls(expand=3, norm=True)]


class GMU(SequenceMixer):
    reads = ("readout",)

    def __init__(self, cfg: GMUConfig, dim: int):
        super().__init__()
        self.gate = Linear(dim, cfg.expand * dim)
        self.norm = RMSNorm(cfg.expand * dim, 1e-5) if cfg.norm else None
        self.out = Linear(cfg.expand * dim, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        for linear in (self.gate, self.out):
            uniform_(linear.weight, linear.in_features, generator)
        self.out.weight.div_((2 * depth) ** 0.5)
        if self.norm is not None:
            self.norm.init_()

    def start(self, batch: int) -> tuple[()]:
        return ()

    def forward(self, x: Tensor, state: tuple[()] | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        m = below["readout"][-1].y  # [B, T, E]
        if m.shape[-1] != self.out.in_features:
            raise ValueError(
                f"gmu gates {self.out.in_features} channels, but the layer below has read {m.shape[-1]} of {x.shape[-1]} dims. Give both the same expand."
            )
        y = m * F.silu(self.gate(x))
        return Mixed(self.out(y if self.norm is None else self.norm(y)), ())
