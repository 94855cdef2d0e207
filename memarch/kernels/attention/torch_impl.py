"""Banded causal softmax attention over `scaled_dot_product_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    window: int | None,
    sink: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scale: float,
) -> Tensor:
    (B, T, H, D), S, R = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    P = 0 if sink is None else sink[0].shape[1]
    dtype = q.dtype
    at = torch.full((B,), S - T, device=q.device) if pos is None else pos
    if sink is not None:
        k, v = torch.cat([sink[0], k], 1), torch.cat([sink[1], v], 1)
    band = at[:, None] - (S - T) + torch.arange(S, device=q.device)
    where = torch.cat([torch.arange(P, device=q.device).expand(B, P), band], 1)[:, None]  # [B, 1, P+S]
    here = (at[:, None] + torch.arange(T, device=q.device))[..., None]  # [B, T, 1]
    slot = torch.arange(P + S, device=q.device) < P
    seen = (where <= here) & (slot | (where >= P))
    if window is not None:
        seen = seen & (slot | (here - where < window))
    bias = seen[:, None]
    if slopes is not None:
        bias = (-slopes[:, None, None] * (here - where)[:, None]).to(dtype).masked_fill(~bias, -torch.inf)
    k, v = (x.repeat_interleave(R, 2) for x in (k, v))
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale)
    return o.transpose(1, 2)
