"""Banded causal softmax attention, one query at a time.

The last T rows of k and v belong to the queries; before them lie S - T rows of history. Query t stands at position pos + t, key row j at
pos - (S - T) + j. It sees the keys that are not after it, less than `window` positions back and real (position >= 0), and the sinks.

    B rows   T queries   S keys   H query heads   G key heads   R = H/G   D key width   V value width   P sinks
"""

import torch
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
    B, T, S, R = q.shape[0], q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    P = 0 if sink is None else sink[0].shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    at = torch.full((B,), S - T, device=q.device) if pos is None else pos  # without pos every row is real
    if sink is not None:
        k, v = torch.cat([sink[0], k], 1), torch.cat([sink[1], v], 1)
    k, v = (x.to(dtype).repeat_interleave(R, 2) for x in (k, v))  # [B, P+S, H, D or V]
    band = at[:, None] - (S - T) + torch.arange(S, device=q.device)  # [B, S] position of a key row
    where = torch.cat([torch.arange(P, device=q.device).expand(B, P), band], 1)  # [B, P+S]
    outs = []
    for t in range(T):
        here = (at + t)[:, None]
        near = (band <= here) & (band >= P if sink is not None else band >= 0)
        if window is not None:
            near = near & (here - band < window)
        seen = torch.cat([where[:, :P] <= here, near], 1)  # [B, P+S]
        scores = scale * torch.einsum("bhd,bshd->bhs", q[:, t].to(dtype), k)
        if slopes is not None:
            scores = scores - slopes.to(dtype)[:, None] * (here - where)[:, None]
        weight = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        outs.append(torch.einsum("bhs,bshv->bhv", weight, v))
    return torch.stack(outs, 1).to(q.dtype)
