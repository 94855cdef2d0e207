"""Rotary positions (Su et al. 2021), halves layout."""

import torch
from torch import Tensor


def rotate(x: Tensor, pos: Tensor, base: float) -> Tensor:
    """x [B, T, H, D] turned by its positions pos [B, T]. Angles are float64: in fp32 a stream of a million tokens loses its phase."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (pos.double()[..., None] * rate)[:, :, None]  # [B, T, 1, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
