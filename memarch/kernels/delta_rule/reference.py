"""The gated delta rule, token by token, to hold against the paper (Gated Delta Networks, arXiv 2412.06464, equation 10).

    S  <-  e^g S                      decay
    u  =   beta (v - S^T k)           what to write: the value minus what the memory already answers to this key
    S  <-  S + k u^T                  write
    o  =   S^T q                      read, after the write

Without beta nothing is erased, u = v: linear attention (g None), RetNet and Mamba-2 (g a scalar per head and token).

    B rows   T tokens   H heads   K key width   V value width   S memory [K, V]
"""

import torch
from torch import Tensor


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, K = k.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(B, H, K, v.shape[-1], dtype=dtype, device=v.device) if state is None else state.to(dtype)
    outs = []
    for t in range(T):
        real = torch.ones(B, 1, dtype=torch.bool, device=v.device) if lengths is None else (t < lengths)[:, None]  # [B, 1]
        qt, kt, vt = (x[:, t].to(dtype).masked_fill(~real[..., None], 0) for x in (q, k, v))  # [B, H, K or V]
        if g is not None:
            S = S * g[:, t].to(dtype).masked_fill(~real, 0).exp()[..., None, None]
        if beta is None:
            u = vt
        else:
            u = beta[:, t].to(dtype).masked_fill(~real, 0)[..., None] * (vt - (kt[..., None] * S).sum(-2))
        S = S + kt[..., None] * u[..., None, :]
        outs.append((qt[..., None] * S).sum(-2))
    return torch.stack(outs, 1).to(v.dtype), S.clone()
