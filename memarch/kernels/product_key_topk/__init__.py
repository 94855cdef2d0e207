"""The exact k best of all pairs: score(i, j) = s1[i] + s2[j], row id i n + j.

No pair of the k best lies outside the k best of either axis; and of two sorted lists only pairs of ranks a, b (from 1) with a b <= k can
win, because every other is beaten by k pairs that are at least as good in both. Ties go to the lowest id.

    n sub-keys an axis   k rows kept
"""

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle
from memarch.kernels.product_key_topk import reference, torch_impl

IMPLEMENTATIONS = {"reference": reference.product_key_topk, "torch": torch_impl.product_key_topk}
ORDER = (("torch", "axis top-k and pruned pairs: the product path without a GPU"),)


def why_not(name: str, device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"scores must be floating point, they are {dtype}"
    return None


def pick(device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for scores [..., n] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, n, k, here))


def product_key_topk(s1: Tensor, s2: Tensor, k: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """s1, s2 [..., n] -> scores [..., k] best first, ids int64 [..., k]. The gradient reaches the selected scores only."""
    if s1.shape != s2.shape or not 1 <= k <= s1.shape[-1]:
        raise ValueError(f"product_key_topk wants two score tensors [..., n] of one shape and 1 <= k <= n; got {list(s1.shape)}, {list(s2.shape)}, k {k}")
    here, shape = machine(s1.device.type), (s1.device.type, s1.dtype, s1.shape[-1], k)
    name = settle("product_key_topk", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](s1, s2, k)
