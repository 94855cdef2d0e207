"""Gated linear attention, token by token, to hold against the paper (Yang et al. 2023, arXiv 2312.06635, equation 3).

S  <-  diag(e^g) S + k v^T        every key channel has a decay of its own
o  =   S^T q                      read, after the write

B rows   T tokens   H heads   K key width   V value width   S memory [K, V]
"""

import torch
from torch import Tensor


def gated_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, K = k.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(B, H, K, v.shape[-1], dtype=dtype, device=v.device) if state is None else state.to(dtype)
    outs = []
    for t in range(T):
        pad = torch.zeros(B, 1, 1, dtype=torch.bool, device=v.device) if lengths is None else (t >= lengths)[:, None, None]
        qt, kt, vt, gt = (x[:, t].to(dtype).masked_fill(pad, 0) for x in (q, k, v, g))  # [B, H, K or V]
        S = gt.exp()[..., None] * S + kt[..., None] * vt[..., None, :]
        outs.append((qt[..., None] * S).sum(-2))
    return torch.stack(outs, 1).to(v.dtype), S.clone()
