"""How much of a table is used (He 2024 and, before, Lample et al. 2019): with z_i row i's share of all weights that were given out,

    usage = share of rows with z_i > 0      unevenness = log N + sum_i z_i log z_i, 0 when all rows are used alike

Over one batch both say little about a large table, so weights are added up over the steps of training until somebody asks.

    N rows
"""

import math

import torch
from torch import Tensor


class Usage:
    """One layer's. due: the next call reports, and counting begins again."""

    def __init__(self) -> None:
        self.mass: Tensor | None = None
        self.due = False

    @torch.no_grad()
    def add(self, ids: Tensor, weights: Tensor, count: int) -> dict[str, Tensor]:
        """ids [...] below count, weights [...] or [..., h]. Scores may be negative: their size counts."""
        self.mass = torch.zeros(count, dtype=torch.float32, device=ids.device) if self.mass is None else self.mass.to(ids.device)
        sizes = weights.abs().float()
        each = sizes if weights.ndim == ids.ndim else sizes.mean(-1)
        self.mass.index_add_(0, ids.flatten().long(), each.flatten())
        if not self.due:
            return {}
        z = self.mass / self.mass.sum().clamp(min=1e-30)
        found = {"usage": (z > 0).float().mean(), "unevenness": math.log(count) + torch.special.xlogy(z, z).sum()}
        self.mass.zero_()
        return found
