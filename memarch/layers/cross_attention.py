"""Attention with its own queries over keys and values that a layer below has saved (YOCO, Sun et al. 2024, arXiv 2405.05254).

The layer keeps no state: what it may see is in the note, which holds past and new rows and says how far back they are visible.

    H heads   K head width; groups and K of the keys are the writer's
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memarch.config import LayerConfig, require
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer
from memarch.kernels.attention import attention
from memarch.layers.parts import Linear
from memarch.layers.parts.rope import rotate


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig(LayerConfig):
    kind: Literal["cross_attention"] = "cross_attention"
    heads: int = 4
    head_dim: int | None = None  # must be the writer's; None: dim / heads
    positions: Literal["rope", "none"] = "rope"  # must be the writer's
    rope_base: float = 10000.0

    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2405.05254"

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be at least 1, got {self.heads}.")

    def width(self, dim: int) -> int:
        require(self.head_dim is not None or dim % self.heads == 0, f"heads {self.heads} must divide dim {dim}, or set head_dim.")
        return self.head_dim or dim // self.heads

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "CrossAttention":
        return CrossAttention(self, dim)

    def num_params(self, dim: int) -> int:
        return 2 * dim * self.heads * self.width(dim)

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(heads=2), cls(heads=4, head_dim=8, positions="none"), cls(heads=2, rope_base=500.0)]


class CrossAttention(SequenceMixer):
    reads = ("kv",)

    def __init__(self, cfg: CrossAttentionConfig, dim: int):
        super().__init__()
        self.cfg, self.width = cfg, cfg.width(dim)
        self.q = Linear(dim, cfg.heads * self.width)
        self.out = Linear(cfg.heads * self.width, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.q.init_(generator)
        self.out.init_(generator, depth)

    def start(self, batch: int) -> tuple[()]:
        return ()

    def forward(self, x: Tensor, state: tuple[()] | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        kv = below["kv"][-1]
        if kv.k.shape[-1] != self.width or self.cfg.heads % kv.k.shape[2]:
            raise ValueError(
                f"cross_attention has {self.cfg.heads} heads of {self.width}, but the layer below saved {kv.k.shape[2]} groups of {kv.k.shape[-1]}. "
                "Give both the same head_dim, and heads that the groups divide."
            )
        q = self.q(x).unflatten(-1, (-1, self.width))  # [B, T, H, K]
        if self.cfg.positions == "rope":
            q = rotate(q, kv.qpos, self.cfg.rope_base)
        o = attention(q, kv.k.to(q.dtype), kv.v.to(q.dtype), pos=kv.qpos[:, 0], window=kv.window)
        return Mixed(self.out(o.flatten(2)), ())
