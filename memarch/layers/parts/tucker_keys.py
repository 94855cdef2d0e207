"""Finding rows of a table by a Tucker-decomposed score: the retrieval half of UltraMem and UltraMemV2.

    S1, S2 [r, n_v] = <keys, queries> of either side, both of unit root mean square times a learned gain
    cells = the topk (i, j) of S1[:, i]^T C S2[:, j],  C = sum_c C_c, among `axis` rows and columns that C's first singular vectors like best
    address = permutation[i n_v + j];   row = address mod N,   block = address div N

Scores are used as they are: no softmax, they may be negative. All heads search the same table. With `expand` E the sides have n_v = sqrt(E) n keys,
and a row has E addresses. At init the gains make the mean kept score of a core 1.

    B rows   T tokens   H heads   r rank   n keys an axis, N = n^2 rows   E addresses of a row   k cells a head   h cores
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.config import require
from memarch.contracts import ChannelMixer
from memarch.kernels.tucker_topk import cell_scores, principal, tucker_topk
from memarch.layers.parts.linear import Linear, normal_, uniform

DRAWS = 64  # random queries by which the gains are set


class Found(NamedTuple):
    own: Tensor  # [B, T, H k, h] each core's own score of the cells that all together chose
    rows: Tensor  # [B, T, H k]
    blocks: Tensor  # [B, T, H k]
    core: Tensor  # [H, r, r] the sum of all cores
    gauges: dict[str, Tensor]


class TuckerKeys(ChannelMixer):
    permutation: Tensor

    def __init__(self, dim: int, *, heads: int, keys: int, expand: int, rank: int, key_dim: int, cores: int, topk: int, axis: int, queries: int):
        """queries: as many as ranks, or one for all of them."""
        super().__init__()
        self.heads, self.rank, self.cores, self.queries, self.topk, self.axis, self.count = heads, rank, cores, queries, topk, axis, keys**2
        self.query = Linear(dim, 2 * queries * key_dim)
        self.keys = nn.Parameter(torch.empty(2, heads, rank, math.isqrt(expand) * keys, key_dim))
        self.gains = nn.Parameter(torch.empty(2, key_dim))  # of queries, of keys
        self.core = nn.Parameter(torch.empty(cores, heads, rank, rank))
        self.register_buffer("permutation", torch.empty(expand * keys**2, dtype=torch.int32))
        self._known: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None  # a core, and what it decomposes into

    @staticmethod
    def size(dim: int, *, heads: int, keys: int, expand: int, rank: int, key_dim: int, cores: int, queries: int) -> int:
        return 2 * dim * queries * key_dim + 2 * heads * rank * math.isqrt(expand) * keys * key_dim + 2 * key_dim + cores * heads * rank**2

    def init_keys_(self, generator: torch.Generator) -> None:
        self.query.init_(generator)
        normal_(self.keys, 1.0, generator)
        self.core.copy_(uniform(tuple(self.core.shape), 0.0, 1.0, generator))
        self.permutation.copy_(torch.randperm(len(self.permutation), generator=generator))

    def calibrate_(self, generator: torch.Generator) -> float:
        """Sets the gains, by random queries; returns the standard deviation that kept scores then have."""
        self.gains.fill_(1)
        q = normal_(torch.empty(1, DRAWS, 2, self.queries, self.keys.shape[-1], device=self.keys.device), 1.0, generator)
        s1, s2 = self.sides(q.to(self.keys.dtype))
        _, ids = tucker_topk(s1, s2, self.core.sum(0), *self.filter(), self.topk, axis=self.axis)
        kept = torch.stack([cell_scores(s1, s2, core, ids) for core in self.core])
        mean = float(kept.mean())
        self.gains.fill_(mean**-0.25)  # a score is quadratic in the product of both gains
        return float(kept.std()) / mean

    def sides(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, 2, r or 1, d] -> S1, S2 [B, T, H, r, n_v]."""
        q, keys = (F.rms_norm(y, y.shape[-1:], gain.to(y.dtype), 1e-6) for y, gain in zip((q, self.keys.to(q.dtype)), self.gains, strict=True))
        q = q.expand(-1, -1, -1, self.rank, -1)
        s1, s2 = (torch.einsum("btrd,hrnd->bthrn", q[:, :, side], keys[side]) for side in (0, 1))
        return s1, s2

    def filter(self) -> tuple[Tensor, Tensor]:
        """The first singular vectors of the core."""
        u, v, _ = self.decomposed()
        return u, v

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """u, v and the last singular value over the first, once for every change of the core: training finds them after a step, inference never again."""
        core = self.core.detach()
        if torch.compiler.is_compiling() or core.is_meta:
            return _decompose(core)
        # By value, for a core can change unseen: through .data, or by another parameter in its place.
        known = self._known and self._known[0]
        if known is None or (known.device, known.dtype) != (core.device, core.dtype) or not torch.equal(known, core):
            self._known = core.clone(), _decompose(core)
        assert self._known is not None
        return self._known[1]

    def find(self, x: Tensor) -> Found:
        """x [B, T, D]. Scores are fp32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        s1, s2 = self.sides(self.query(x).to(wide).unflatten(-1, (2, self.queries, -1)))
        core = self.core.sum(0).to(wide)
        u, v, ratio = self.decomposed()
        scores, ids = tucker_topk(s1, s2, core, u, v, self.topk, axis=self.axis)  # [B, T, H, k]
        own = [scores] if self.cores == 1 else [cell_scores(s1, s2, one, ids) for one in self.core.to(wide)]
        address = self.permutation[ids.flatten(-2)].long()
        gauges = {"kept": scores.detach().mean(), "top1": scores.detach()[..., 0].mean(), "ratio": ratio}
        return Found(torch.stack(own, -1).flatten(2, 3), address % self.count, address // self.count, core, gauges)


def _decompose(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = core.sum(0)
    values = torch.linalg.svdvals(whole.to(torch.promote_types(core.dtype, torch.float32)))  # [H, r]
    return *principal(whole), (values[:, -1] / values[:, 0].clamp(min=1e-12)).mean()


def check_tucker(keys: int, heads: int, rank: int, expand: int, cores: int, topk: int, axis: int) -> None:
    for name, value in (("keys", keys), ("heads", heads), ("rank", rank), ("expand", expand), ("cores", cores)):
        require(value > 0, f"{name} must be at least 1, got {value}.")
    require(math.isqrt(expand) ** 2 == expand, f"expand must be a square (1, 4, 9, ..), got {expand}.")
    most = math.isqrt(expand) * keys
    require(0 < axis <= most, f"topk must be between 1 and the keys of an axis ({most}), got {axis}.")
    require(0 < topk <= axis**2, f"topk must be between 1 and the {axis**2} cells of {axis} rows and columns, got {topk}.")


def check_slices(cores: int, width: int) -> None:
    require(width % cores == 0, f"cores {cores} must divide the value width {width}: each weighs an equal slice of it.")
