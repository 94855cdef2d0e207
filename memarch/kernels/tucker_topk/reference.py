"""The score of all n^2 cells; those outside the kept rows and columns cannot win."""

import torch
from torch import Tensor

from memarch.kernels.product_key_topk.operator import refuse_nan


def tucker_topk(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        refuse_nan("tucker_topk", s1, s2, core)
    cells = torch.einsum("qhai,hab,qhbj->qhij", s1, core.to(s1.dtype), s2)
    kept = _kept(s1, u, axis)[..., :, None] & _kept(s2, v, axis)[..., None, :]
    values, ids = cells.masked_fill(~kept, -torch.inf).flatten(-2).sort(dim=-1, descending=True, stable=True)
    return values[..., :k].clone(), ids[..., :k].clone()


def _kept(s: Tensor, u: Tensor, axis: int) -> Tensor:
    filtered = torch.einsum("qhri,hr->qhi", s.detach(), u.to(s.dtype))
    best = filtered.sort(dim=-1, descending=True, stable=True).indices[..., :axis]
    return torch.zeros_like(filtered, dtype=torch.bool).scatter(-1, best, True)
