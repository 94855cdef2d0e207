"""How much of a table is used (He 2024 and, before, Lample et al. 2019): with z_i row i's share of all weights that were given out,

    usage = share of rows with z_i > 0      unevenness = log N + sum_i z_i log z_i, 0 when all rows are used alike

Over one batch both say little about a large table, so weights are added up over the steps of training until somebody asks.

    N rows
"""

import math

import torch
from torch import Tensor


class Usage:
    """One layer's. due: the next call of the layer reports, in its aux, and counting begins again."""

    def __init__(self, rows: int, device: torch.device):
        self.mass = torch.zeros(rows, device=device)
        self.due = False

    @torch.no_grad()
    def add(self, ids: Tensor, weights: Tensor) -> None:
        """ids [..., R], weights [..., R] or [..., R, h]. Scores may be negative: their size counts."""
        sizes = weights.abs().float()
        each = sizes if weights.ndim == ids.ndim else sizes.mean(-1)
        self.mass.index_add_(0, ids.flatten().long(), each.flatten())

    @torch.no_grad()
    def told(self) -> dict[str, Tensor]:
        if not self.due:
            return {}
        z = self.mass / self.mass.sum().clamp(min=1e-30)
        found = {"usage": (z > 0).float().mean(), "unevenness": math.log(len(z)) + torch.special.xlogy(z, z).sum()}
        self.mass.zero_()
        return found
