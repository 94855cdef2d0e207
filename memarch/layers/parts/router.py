"""Which few of several memories or experts a token goes to."""

import torch
from torch import Tensor

from memarch.kernels.autocast import exact


def choose(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D], weight [M, D] -> probabilities [B, T, M], and of the k largest the shares [B, T, k], which sum to 1, and which they are."""
    p = _probabilities(x, weight)
    best, ids = p.sort(dim=-1, descending=True, stable=True)  # among equals the first
    best, ids = best[..., :k], ids[..., :k]
    return p, best / best.sum(-1, keepdim=True), ids


def balance(p: Tensor, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> f [M], the share of tokens that chose each, and M sum_m f_m P_m with P the mean probability. `real` [B, T]: tokens that count."""
    mask = torch.ones_like(p[..., 0]) if real is None else real.to(p.dtype)
    total = mask.sum().clamp(min=1)
    chosen = (ids[..., None] == torch.arange(p.shape[-1], device=ids.device)).any(-2)  # [B, T, M]
    f = (chosen * mask[..., None]).sum((0, 1)) / total
    P = (p * mask[..., None]).sum((0, 1)) / total
    return f, p.shape[-1] * (f.detach() * P).sum()


@exact
def _probabilities(x: Tensor, weight: Tensor) -> Tensor:
    """In float32 also under autocast: bfloat16 makes ties, and who wins one is no choice of the token's."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ weight.to(dtype).mT).softmax(-1)
