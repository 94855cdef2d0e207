"""The k best of each axis, then the pairs that can still win."""

import torch
from torch import Tensor


def product_key_topk(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = s1.shape[-1]
    i, j = _best(s1, k), _best(s2, k)  # [..., k] indices, best first
    a, b = _ranks(k)  # [P]
    a, b = a.to(s1.device), b.to(s1.device)
    ids = i[..., a] * n + j[..., b]  # [..., P]
    with torch.no_grad():
        pairs = s1.gather(-1, i)[..., a] + s2.gather(-1, j)[..., b]
        # Equal scores must come out in the order of their ids, so the pairs are put in that order and sorted stably.
        by_id = ids.argsort(-1)
        best = by_id.gather(-1, pairs.gather(-1, by_id).sort(dim=-1, descending=True, stable=True).indices[..., :k])
    ids = ids.gather(-1, best)
    return s1.gather(-1, ids // n) + s2.gather(-1, ids % n), ids


def _best(s: Tensor, k: int) -> Tensor:
    """A stable sort and not topk: among equal scores topk takes any, and the k best pairs would then depend on the device."""
    return s.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _ranks(k: int) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of the pairs that k others do not dominate: (a + 1)(b + 1) <= k."""
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    return torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
