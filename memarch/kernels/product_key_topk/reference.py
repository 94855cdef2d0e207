"""All n^2 pairs, sorted."""

from torch import Tensor


def product_key_topk(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = (s1[..., :, None] + s2[..., None, :]).flatten(-2)  # [..., n^2]
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]
