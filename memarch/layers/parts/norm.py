"""Root mean square norm (Zhang & Sennrich 2019). The statistics are fp32 whatever the activations are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Over the last dim, or over each of its `groups` equal parts."""

    def __init__(self, dim: int, eps: float = 1e-6, groups: int = 1):
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.empty(dim))

    def init_(self) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        x = x if x.dtype == weight.dtype else x.to(weight.dtype)
        if self.groups == 1:
            return torch.rms_norm(x, weight.shape, weight, self.eps)
        return F.rms_norm(x.unflatten(-1, (self.groups, -1)), [x.shape[-1] // self.groups], eps=self.eps).flatten(-2) * weight


def l2_norm(x: Tensor, scale: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Unit length (times `scale`) over the last dim, eps inside the root. fp32 at least: the delta rule diverges on keys that are not unit."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()  # half the time of a sum of squares
    return (wide * (scale * torch.rsqrt(square + eps))).to(x.dtype)
