"""Slot by slot: read the row, weigh its slices, add it to the sum of its group."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memarch.kernels.weighted_bag.operator import check_ids


def weighted_bag(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int, sparse_grad: bool) -> Tensor:
    if not torch.compiler.is_compiling():
        check_ids(table, ids, groups, n_groups)
    (T, R), h = ids.shape, weights.shape[-1]
    out = torch.promote_types(table.dtype, weights.dtype)
    wide = torch.promote_types(out, torch.float32)
    y = torch.zeros(T, n_groups, table.shape[1], dtype=wide, device=table.device)
    for r in range(R):
        row = F.embedding(ids[:, r], table, sparse=sparse_grad).to(wide).unflatten(-1, (h, -1))  # [T, h, d/h]
        weighed = (weights[:, r, :, None].to(wide) * row).flatten(1)  # [T, d]
        group = torch.zeros_like(ids[:, r]) if groups is None else groups[:, r]
        y = y + F.one_hot(group.long(), n_groups).to(wide)[..., None] * weighed[:, None]
    return y.to(out)
