"""Histories: the last n rows of a stream, newest last."""

import torch
from torch import Tensor


def newest(rows: Tensor, n: int, lengths: Tensor | None, fresh: int) -> Tensor:
    """The n newest real rows [B, n, ...] of `rows` [B, S, ...], whose last `fresh` rows are this call's, of which lengths[b] are real.

    Where there are fewer than n, zeros stand on the left. The result owns its memory: a slice would keep the whole buffer alive."""
    size = rows.shape[1]
    if size < n:
        rows, size = torch.cat([rows.new_zeros(rows.shape[0], n - size, *rows.shape[2:]), rows], 1), n
    if lengths is None:
        return rows[:, size - n :].clone()
    index = (size - n - fresh + lengths)[:, None] + torch.arange(n, device=rows.device)  # [B, n]
    index = index[(..., *[None] * (rows.ndim - 2))]
    return torch.where(index >= 0, rows.gather(1, index.clamp(min=0).expand(-1, -1, *rows.shape[2:])), 0)
