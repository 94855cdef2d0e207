"""topk of the filters, of all kept cells, and of those.

r rank   n sub-keys an axis, `axis` of them kept   k cells kept   H heads   Q searches
"""

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.product_key_topk.operator import refuse_nan
from memarch.kernels.product_key_topk.torch_impl import WIDEST, at_once, best
from memarch.kernels.tucker_topk.operator import columns, define


@exact
def search(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    (Q, H, _, n), step = s1.shape, max(1, at_once(s1.device) // (s1.shape[1] * max(s1.shape[3], axis * axis)))
    scores, ids = s1.new_empty(Q, H, k), s1.new_empty(Q, H, k, dtype=torch.int64)
    for q in range(0, Q, step):
        x1, x2 = s1[q : q + step], s2[q : q + step]
        i, j = _kept(x1, u, axis), _kept(x2, v, axis)  # [q, H, axis]
        grid = columns(x1, i).mT @ (core.to(s1.dtype) @ columns(x2, j))  # [q, H, axis, axis]
        cells = (i * n)[..., None] + j[..., None, :]
        grid, cells = (x.flatten(2).flatten(0, 1) for x in (grid, cells))
        values, found = best(grid, cells, k, 32 if n <= WIDEST else 64)
        refuse_nan("tucker_topk", values[:, 0] if s1.device.type == "cpu" else grid)
        scores[q : q + step], ids[q : q + step] = values.view(-1, H, k), found.view(-1, H, k)
    return scores, ids


def _kept(s: Tensor, u: Tensor, axis: int) -> Tensor:
    """s [q, H, r, n] -> the columns that the filter likes best [q, H, axis]."""
    filtered = (u.to(s.dtype)[:, None] @ s).flatten(0, 2)  # [q H, n]
    values, index = best(filtered, torch.arange(s.shape[-1], device=s.device), axis)
    refuse_nan("tucker_topk", values[:, 0] if s.device.type == "cpu" else filtered)
    return index.view(*s.shape[:2], axis)


tucker_topk = define("tucker_topk", search)
