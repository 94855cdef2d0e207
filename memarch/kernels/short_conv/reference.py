"""The causal depthwise convolution, token by token.

y_t = bias + sum_w weight[:, w] x_{t-W+1+w}, so weight[:, -1] multiplies the newest token; before the first token come the rows of `state`.

    B rows   T tokens   D width   W taps
"""

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, T, D), W = x.shape, weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    tail = x.new_zeros(B, W - 1, D) if state is None else state.to(x.dtype)
    outs = []
    for t in range(T):
        seen = torch.cat([tail, x[:, t : t + 1]], 1)  # [B, W, D]
        y = (seen.to(dtype) * weight.mT.to(dtype)).sum(1)
        outs.append(y if bias is None else y + bias.to(dtype))
        real = torch.ones(B, dtype=torch.bool, device=x.device) if lengths is None else t < lengths
        tail = torch.where(real[:, None, None], seen[:, 1:], tail)
    return torch.stack(outs, 1).to(x.dtype), tail.clone()
