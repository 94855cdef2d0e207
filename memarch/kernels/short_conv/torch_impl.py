"""The causal depthwise convolution as W shifted multiply-adds."""

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, T, D), W = x.shape, weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    seen = torch.cat([x.new_zeros(B, W - 1, D) if state is None else state.to(x.dtype), x], 1)  # [B, W-1+T, D]
    y = sum(seen[:, w : w + T].to(dtype) * weight[:, w].to(dtype) for w in range(W))
    y = y if bias is None else y + bias.to(dtype)
    if lengths is None:
        tail = seen[:, T:].clone()
    else:
        rows = lengths[:, None] + torch.arange(W - 1, device=x.device)
        tail = seen.gather(1, rows[..., None].expand(B, W - 1, D))
    return y.to(x.dtype), tail
