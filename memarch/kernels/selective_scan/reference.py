"""The selective scan, token by token, to hold against the paper (Gu & Dao 2023, arXiv 2312.00752, algorithm 2, with the Euler step for B).

h  <-  e^{dt A} h + dt x B        every channel has a step dt, every state of a channel a rate A
y   =  C h + D x                  read, after the write
y  <-  y SiLU(z)                  gated

R rows   T tokens   E channels   N states of a channel   h memory [E, N]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Maybe = Tensor | None


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    (R, T, E), N = x.shape, A.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    A, D = A.to(dtype), x.new_zeros(E, dtype=dtype) if D is None else D.to(dtype)
    h = torch.zeros(R, E, N, dtype=dtype, device=x.device) if state is None else state.to(dtype)
    outs = []
    for t in range(T):
        pad = torch.zeros(R, 1, dtype=torch.bool, device=x.device) if lengths is None else (t >= lengths)[:, None]
        xt, dtt, Bt, Ct = (v[:, t].to(dtype).masked_fill(pad, 0) for v in (x, dt, B, C))  # [R, E] or [R, N]
        h = (dtt[..., None] * A).exp() * h + (dtt * xt)[..., None] * Bt[:, None]
        y = (h * Ct[:, None]).sum(-1) + D * xt
        outs.append(y if z is None else y * F.silu(z[:, t].to(dtype).masked_fill(pad, 0)))
    return torch.stack(outs, 1).to(x.dtype), h.clone()
