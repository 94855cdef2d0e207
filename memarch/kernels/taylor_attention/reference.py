"""Taylor attention, token by token, with the weights spelt out (Based, arXiv 2402.18668).

    w_tj = 1 + a + a^2/2      a = q_t . k_j      j <= t
    numerator_t = sum_j w_tj v_j      denominator_t = sum_j w_tj

What came before this call is in the state and is read through the features of the query. (The order and weights of the features are
in the docstring of the folder.)

    B rows   T tokens   H heads   F key width   V value width   E features
"""

import torch
from torch import Tensor


def taylor_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, F = k.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    real = torch.ones(B, T, dtype=torch.bool, device=v.device)
    if lengths is not None:
        real = torch.arange(T, device=v.device) < lengths[:, None]
    q, k, v = (x.to(dtype).masked_fill(~real[..., None, None], 0) for x in (q, k, v))
    one = real[..., None, None].to(dtype).expand(B, T, H, 1)
    values = torch.cat([v, one], -1)  # [B, T, H, V + 1]
    S = values.new_zeros(B, H, 1 + F + F * (F + 1) // 2, values.shape[-1]) if state is None else state.to(dtype)
    past, outs = S, []
    for t in range(T):
        a = (q[:, t, None] * k[:, : t + 1]).sum(-1)  # [B, t + 1, H]
        w = 1 + a + a.square() / 2
        out = (w[..., None] * values[:, : t + 1]).sum(1)  # [B, H, V + 1]
        out = out + (second_order(q[:, t], 0.5)[..., None] * past).sum(-2)
        outs.append(out * one[:, t])
        S = S + second_order(k[:, t], 1.0)[..., None] * values[:, t, :, None, :]
    o = torch.stack(outs, 1)
    return o[..., :-1].clone(), o[..., -1].clone(), S.clone()


def second_order(x: Tensor, square: float) -> Tensor:
    """[.., F] -> [.., E]: 1, x_i, x_i x_j for i <= j, with the squares times `square`."""
    F = x.shape[-1]
    pairs = [x[..., i] * x[..., j] * (square if i == j else 1.0) for i in range(F) for j in range(i, F)]
    return torch.cat([torch.ones_like(x[..., :1]), x, torch.stack(pairs, -1)], -1)
