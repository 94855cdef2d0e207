"""MemoryFormer's feed-forward (Ding et al. 2024): tables in the place of matrices, each looked up by the signs of a few channels.

    memory layer: x in K chunks z of tau numbers;  id = sum_i 2^i [z_i >= 0];  y = sum_chunks p(z) T_chunk[id]
    p(z) = prod_i sigmoid(2 |z_i| / t): the share the chosen pattern of signs has among all 2^tau in a softmax
    feed-forward: y = ML_2(LayerNorm(ML_1(x))),  ML_1: D -> (tau + expand) K,  ML_2 with tau + expand bits: -> D;  no activation

Nothing is multiplied by a matrix. The gradient reaches x through p alone; the signs have none. The authors' code weighs with |z|_1 p(z): score "code".

    D width   K chunks   tau bits of a chunk   t temperature
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import ChannelMixer, Fed
from memarch.layers.parts.pool import ValuePool


@dataclass(frozen=True, kw_only=True)
class MemoryFormerConfig(LayerConfig):
    kind: Literal["memory_former"] = "memory_former"
    bits: int = 8  # tau of the first layer: its tables have 2^bits rows a chunk
    expand: int = 2  # further bits of the second
    temperature: float = 1.0  # the paper prints no value
    score: Literal["paper", "code"] = "paper"

    paper: ClassVar[str] = "Ding et al. 2024, arXiv 2411.12992"

    def __post_init__(self) -> None:
        require(self.bits > 0 and self.expand >= 0, f"bits must be at least 1 and expand at least 0, got {self.bits} and {self.expand}.")
        require(self.bits + self.expand <= 24, f"a chunk of {self.bits + self.expand} bits has {2 ** (self.bits + self.expand):,} rows; keep it to 24.")
        require(self.temperature > 0, f"temperature must be above 0, got {self.temperature}.")

    def chunks(self, dim: int) -> int:
        require(dim % self.bits == 0, f"bits {self.bits} must divide dim {dim}: the input is cut into chunks of that many channels.")
        return dim // self.bits

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "MemoryFormer":
        return MemoryFormer(self, dim)

    def num_params(self, dim: int) -> int:
        K, hidden = self.chunks(dim), (self.bits + self.expand) * self.chunks(dim)
        return K * 2**self.bits * hidden + 2 * hidden + K * 2 ** (self.bits + self.expand) * dim

    def active_params(self, dim: int) -> int:
        K, hidden = self.chunks(dim), (self.bits + self.expand) * self.chunks(dim)
        return K * hidden + 2 * hidden + K * dim

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [cls(bits=4), cls(bits=2, expand=0, temperature=0.5, score="code")]


class MemoryFormer(ChannelMixer):
    def __init__(self, cfg: MemoryFormerConfig, dim: int):
        super().__init__()
        K = cfg.chunks(dim)
        hidden = (cfg.bits + cfg.expand) * K
        self.first = Hashed(cfg, K, cfg.bits, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = Hashed(cfg, K, cfg.bits + cfg.expand, dim)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.first.init_(generator)
        self.norm.reset_parameters()
        self.second.init_(generator)

    def forward(self, x: Tensor) -> Fed:
        y, _, _ = self.first(x)
        y, p, ids = self.second(self.norm(y.to(self.norm.weight.dtype)))
        return Fed(y.to(x.dtype), {"share": p.mean().detach()} | self.second.rows.gauges(ids, p))


class Hashed(nn.Module):
    """The memory layer: [.., K bits] -> [.., width], p and row numbers [.., K]."""

    def __init__(self, cfg: MemoryFormerConfig, chunks: int, bits: int, width: int):
        super().__init__()
        self.cfg, self.bits = cfg, bits
        self.rows = ValuePool(chunks * 2**bits, width)

    def init_(self, generator: torch.Generator) -> None:
        self.rows.init_(generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.bits))  # [.., K, tau]
        place = torch.arange(self.bits, device=x.device)
        chunk = torch.arange(z.shape[-2], device=x.device)
        ids = ((z >= 0).long() << place).sum(-1) + (chunk << self.bits)  # [.., K]
        p = F.logsigmoid(2 / self.cfg.temperature * z.abs()).sum(-1).exp()
        weights = p if self.cfg.score == "paper" else p * z.abs().sum(-1)
        return self.rows.bag(ids, weights, x), p, ids
