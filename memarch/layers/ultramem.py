"""UltraMem (Huang et al. 2025): a table found by a Tucker-decomposed score, read through more addresses than it has rows.

    S1, S2 [r, n_v] = <keys, queries> of either side, both of unit root mean square times a learned gain
    the topk cells (i, j) of S1[:, i]^T C S2[:, j],  C = sum_c C_c,  filtered by C's first singular vectors       (kernels/tucker_topk)
    address = permutation[i n_v + j];  row = address mod N,  block = address div N
    o_p = sum over the cells of block p of s V[row],  slice c of the columns weighed with C_c's own score;   y = W_out [o_1 .. o_E]

Scores are used as they are: no softmax, they may be negative. With `expand` E the sides have n_v = sqrt(E) n keys and every row E addresses, whose blocks
are projected apart. All heads share one query and one table. The paper places few of these beside the blocks: reading one block's feed-forward
input, added some blocks later. That is a branch of the model: branches: [{reads: 2, adds: 4, layer: {kind: ultramem}}].

At init the gains make the mean kept score 1, and the values have variance E / (2 topk H L), so that the output has 1 / (2 L).
A loss keeps the core near rank 1, where the filter is exact: core_loss / (r - 1) sum_{i>1} max(0, lambda_i - 0.15)^2.

    H heads   r rank   n keys an axis, N = n^2 rows   E addresses of a row   d key width of one rank   V value width   h cores   L depth
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import LayerConfig, require
from memarch.contracts import ChannelMixer, Fed
from memarch.kernels.tucker_topk import cell_scores, principal, tucker_topk
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers.parts import Linear
from memarch.layers.parts.linear import normal_, uniform
from memarch.layers.parts.pool import Borrowed, ValuePool, claim, rows_of

TAU = 0.15  # a singular value of the core below this costs nothing
DRAWS = 64  # random queries by which the gains are set


@dataclass(frozen=True, kw_only=True)
class UltraMemConfig(LayerConfig):
    kind: Literal["ultramem"] = "ultramem"
    keys: int = 128  # n: the table has keys^2 rows
    heads: int = 2
    topk: int = 32  # cells a head
    rank: int = 2
    key_dim: int | None = None  # of one rank; None: dim / (2 rank)
    value_dim: int | None = None  # None: half of the width
    expand: int = 4  # E, a square
    cores: int = 2
    query: Literal["split", "shared"] = "split"  # a query for each rank, as in the paper, or one for all, as in the released code
    core_loss: float = 1e-3
    pool: str | None = None  # a pool of the model; None: a table of its own

    paper: ClassVar[str] = "Huang et al. 2025, arXiv 2411.12364"

    def __post_init__(self) -> None:
        for name in ("keys", "heads", "rank", "expand", "cores"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(math.isqrt(self.expand) ** 2 == self.expand, f"expand must be a square (1, 4, 9, ..), got {self.expand}.")
        require(0 < self.topk <= self.axis(), f"topk must be between 1 and the keys of an axis ({self.axis()}), got {self.topk}.")
        require(self.core_loss >= 0, f"core_loss must not be negative, got {self.core_loss}.")

    def axis(self) -> int:
        return math.isqrt(self.expand) * self.keys

    def widths(self, dim: int) -> tuple[int, int]:
        """Of a key of one rank, of a value."""
        value = self.value_dim or max(1, dim // 2)
        require(value % self.cores == 0, f"cores {self.cores} must divide the value width {value}: each weighs an equal slice of it.")
        return self.key_dim or max(1, dim // (2 * self.rank)), value

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> "UltraMem":
        return UltraMem(self, dim, pools)

    def pool_size(self, dim: int) -> tuple[int, int]:
        return self.keys**2, self.widths(dim)[1]

    def _dense(self, dim: int) -> int:
        key, value = self.widths(dim)
        query = 2 * dim * key * (self.rank if self.query == "split" else 1)
        keys = 2 * self.heads * self.rank * self.axis() * key + 2 * key
        return query + keys + self.cores * self.heads * self.rank**2 + self.expand * value * dim

    def num_params(self, dim: int) -> int:
        return self._dense(dim) + (math.prod(self.pool_size(dim)) if self.pool is None else 0)

    def active_params(self, dim: int) -> int:
        return self._dense(dim) + self.heads * self.topk * self.widths(dim)[1]

    @classmethod
    def examples(cls) -> list[LayerConfig]:
        return [
            cls(keys=6, topk=4),
            cls(keys=5, heads=1, topk=5, rank=3, key_dim=4, value_dim=6, expand=1, cores=3, query="shared", core_loss=0.0),
            cls(keys=8, heads=3, topk=2, rank=1, value_dim=16, cores=1, expand=9, pool="slots"),
        ]


class UltraMem(ChannelMixer):
    permutation: Tensor

    def __init__(self, cfg: UltraMemConfig, dim: int, pools: Mapping[str, nn.Module]):
        super().__init__()
        self.cfg = cfg
        key, value = cfg.widths(dim)
        self.queries = cfg.rank if cfg.query == "split" else 1
        self.query = Linear(dim, 2 * self.queries * key)
        self.keys = nn.Parameter(torch.empty(2, cfg.heads, cfg.rank, cfg.axis(), key))
        self.gains = nn.Parameter(torch.empty(2, key))  # of queries, of keys
        self.core = nn.Parameter(torch.empty(cfg.cores, cfg.heads, cfg.rank, cfg.rank))
        self.values: ValuePool | Borrowed = claim(cfg.pool, *cfg.pool_size(dim), pools)
        self.out = Linear(cfg.expand * value, dim)
        self.register_buffer("permutation", torch.empty(cfg.expand * cfg.keys**2, dtype=torch.int32))
        self._filter: tuple[Tensor, Tensor, Tensor] | None = None  # of which core, u, v

    def init_(self, depth: int, generator: torch.Generator) -> None:
        cfg = self.cfg
        self.query.init_(generator)
        normal_(self.keys, 1.0, generator)
        self.core.copy_(uniform(tuple(self.core.shape), 0.0, 1.0, generator))
        self.permutation.copy_(torch.randperm(len(self.permutation), generator=generator))
        if isinstance(self.values, ValuePool):
            self.values.init_(generator, std=math.sqrt(cfg.expand / (2 * cfg.topk * cfg.heads * depth)))
        normal_(self.out.weight, 1 / math.sqrt(self.out.in_features), generator)
        self.gains.fill_(1)
        q = normal_(torch.empty(1, DRAWS, 2, self.queries, self.keys.shape[-1], device=self.keys.device), 1.0, generator)
        s1, s2 = self.sides(q.to(self.keys.dtype))
        _, ids = tucker_topk(s1, s2, self.core.sum(0), *self.filter(), cfg.topk)
        kept = torch.stack([cell_scores(s1, s2, core, ids) for core in self.core]).mean()
        self.gains.fill_(float(kept) ** -0.25)  # a score is quadratic in the product of both gains

    def sides(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, 2, r or 1, d] -> S1, S2 [B, T, H, r, n_v]."""
        q, keys = (F.rms_norm(y, y.shape[-1:], gain.to(y.dtype), 1e-6) for y, gain in zip((q, self.keys.to(q.dtype)), self.gains, strict=True))
        q = q.expand(-1, -1, -1, self.cfg.rank, -1)
        s1, s2 = (torch.einsum("btrd,hrnd->bthrn", q[:, :, side], keys[side]) for side in (0, 1))
        return s1, s2

    def filter(self) -> tuple[Tensor, Tensor]:
        """The core's first singular vectors, once for every change of the core: training finds them after a step, inference never again."""
        core = self.core.detach()
        if torch.compiler.is_compiling() or core.is_meta:
            return principal(core.sum(0))
        known = self._filter and self._filter[0]
        # By value, for a core can change unseen: through .data, or by another parameter in its place.
        if known is None or (known.device, known.dtype) != (core.device, core.dtype) or not torch.equal(known, core):
            self._filter = (core.clone(), *principal(core.sum(0)))
        assert self._filter is not None
        return self._filter[1:]

    def forward(self, x: Tensor) -> Fed:
        cfg, wide = self.cfg, torch.promote_types(x.dtype, torch.float32)
        s1, s2 = self.sides(self.query(x).to(wide).unflatten(-1, (2, self.queries, -1)))
        whole = self.core.sum(0).to(wide)
        scores, ids = tucker_topk(s1, s2, whole, *self.filter(), cfg.topk)  # [B, T, H, k]
        own = [scores] if cfg.cores == 1 else [cell_scores(s1, s2, core, ids) for core in self.core.to(wide)]
        address = self.permutation[ids.flatten(-2)].long()  # [B, T, H k]
        rows, blocks = address % cfg.keys**2, address // cfg.keys**2
        table = rows_of(self.values)
        weights = torch.stack(own, -1).flatten(2, 3).to(table.dtype)  # [B, T, H k, h]
        o = weighted_bag(table, rows, weights, groups=blocks, n_groups=cfg.expand)  # [B, T, E, V]

        singular = torch.linalg.svdvals(whole)  # [H, r]
        aux = {"kept": scores.detach().mean(), "ratio": (singular[:, -1] / singular[:, 0].clamp(min=1e-12)).detach().mean()}
        if cfg.core_loss and cfg.rank > 1:
            aux["loss/core"] = cfg.core_loss / (cfg.rank - 1) * (singular[:, 1:] - TAU).clamp(min=0).square().sum(-1).mean()
        return Fed(self.out(o.flatten(-2).to(x.dtype)), aux)
