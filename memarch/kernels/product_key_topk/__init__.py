"""The exact k best of all pairs: score(i, j) = s1[i] + s2[j], row id i n + j.

No pair of the k best lies outside the k best of either axis; and of two sorted lists only pairs of ranks a, b (from 1) with a b <= k can
win, because every other is beaten by k pairs that are at least as good in both: 119 pairs for k = 32 in place of 1024.

Scores come best first; equal ones in the order of their ids, and among them the lowest ids are kept. (Two pairs of which one is better in
both axes may tie because their sums were rounded, or are -inf: then the better one is kept, whatever its id.) NaN is an error; -inf is a
score like any other. The gradient reaches the selected scores only.

    n sub-keys an axis   k pairs kept   Q searches   P pairs that can win
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.product_key_topk import cpp_impl, reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.product_key_topk import triton_impl

    return triton_impl.product_key_topk(*args)


IMPLEMENTATIONS = {
    "reference": reference.product_key_topk,
    "torch": torch_impl.product_key_topk,
    "cpp": cpp_impl.product_key_topk,
    "triton": _triton,
}
ROUNDS, LONGEST = 128, 4096  # k and sub-keys of an axis that one Triton program searches in registers
ORDER = (
    ("triton", "each score is read once; the gradient without atomics"),
    ("cpp", "C++: one pass over each axis that looks only at what beats the k-th best so far"),
    ("torch", "axis top-k and pruned pairs: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"scores must be floating point, they are {dtype}"
    if name == "triton" and (n > LONGEST or k > ROUNDS):
        return f"it takes up to {LONGEST} sub-keys an axis and k up to {ROUNDS}, not {n} and {k}: use torch"
    if name == "triton":
        return triton_cannot(device_type, here, transposes=False)
    if name == "cpp" and n > torch_impl.WIDEST:
        return f"it takes up to {torch_impl.WIDEST} sub-keys an axis, not {n}: use torch"
    return native.cannot(device_type, dtype, here, (torch.float32, torch.float64)) if name == "cpp" else None


def pick(device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for scores [..., n] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, n, k, here._replace(interpreted=False)))


def product_key_topk(s1: Tensor, s2: Tensor, k: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """s1, s2 [..., n] -> scores [..., k] best first, ids int64 [..., k]."""
    if s1.ndim < 1 or s1.shape != s2.shape or s1.dtype != s2.dtype:
        raise ValueError(
            f"product_key_topk wants two score tensors [..., n] of one shape and dtype; got {list(s1.shape)} {s1.dtype}, {list(s2.shape)} {s2.dtype}"
        )
    n = s1.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"product_key_topk: k is {k}, but with {n} sub-keys an axis the search is exact for 1 <= k <= {n} only")
    here, shape = machine(s1.device.type), (s1.device.type, s1.dtype, n, k)
    name = settle("product_key_topk", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, native.buildable(here)), lambda: pick(*shape, here))
    Q = s1.shape[:-1].numel()
    scores, ids = IMPLEMENTATIONS[name](s1.reshape(Q, n), s2.reshape(Q, n), k)
    return scores.view(*s1.shape[:-1], k), ids.view(*s1.shape[:-1], k)
