"""The k best cells of a Tucker-decomposed score (UltraMem, Huang et al. 2024, arXiv 2411.12364): score(i, j) = s1[:, i]^T C s2[:, j], id i n + j.

The score is not monotone in two numbers, so the pruning of product_key_topk does not hold. Rows and columns are filtered by the first singular
vectors of the core, u^T s1 and v^T s2, `axis` of each are kept, and of their axis^2 cells the k best by the whole core. That finds the k best
of all cells only as far as the first singular value dominates, and never those where both filters are negative. axis = n switches the filter off.

u and v are `principal(core)`: computed anew after a step of the optimiser, never in the graph, kept as buffers. Equal scores come in the order of
their ids, and among them the lowest are kept; likewise in the filters. The gradient reaches the selected cells' s1, s2 and the core.

    r rank   n sub-keys an axis, `axis` of them kept   k cells kept   H heads, any leading dimensions that the core has   Q searches
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.product_key_topk import LONGEST, ROUNDS
from memarch.kernels.product_key_topk.torch_impl import WIDEST
from memarch.kernels.tucker_topk import cpp_impl, operator, reference, torch_impl

__all__ = ["FLOPS", "IMPLEMENTATIONS", "cell_scores", "pick", "principal", "tucker_topk", "why_not"]


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.tucker_topk import triton_impl

    return triton_impl.tucker_topk(*args)


IMPLEMENTATIONS = {"reference": reference.tucker_topk, "torch": torch_impl.tucker_topk, "cpp": cpp_impl.tucker_topk, "triton": _triton}
FLOPS = operator.flops("tucker_topk") | operator.flops("tucker_topk_cpp")
ORDER = (
    ("triton", "cells are never written; the gradient without atomics"),
    ("cpp", "C++: filters, cells and searches in one pass, one query at a time"),
    ("torch", "axis top-k by the filters, then all kept cells: the product path without a GPU"),
)
NOISE = 1e-5  # of a singular vector in float32


def why_not(name: str, device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, axis: int = 32, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"scores must be floating point, they are {dtype}"
    if name == "triton" and (n > LONGEST or axis > ROUNDS):
        return f"it takes up to {LONGEST} sub-keys an axis and keeps up to {ROUNDS} of them, not {n} and {axis}: use torch"
    if name == "triton":
        return triton_cannot(device_type, here, transposes=False)
    if name == "cpp" and n > WIDEST:
        return f"it takes up to {WIDEST} sub-keys an axis, not {n}: use torch"
    return native.cannot(device_type, dtype, here, (torch.float32, torch.float64)) if name == "cpp" else None


def pick(device_type: str, dtype: torch.dtype, n: int = 128, k: int = 32, axis: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for scores [..., r, n] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, n, k, axis, here._replace(interpreted=False)))


def tucker_topk(
    s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, *, axis: int | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """s1, s2 [..., H, r, n], core [H, r, r], u, v [H, r], with any number of head dimensions, also none -> scores [..., H, k] best first, ids int64.

    axis: how many rows and columns the filters keep, k where it is None."""
    _check(s1, s2, core, u, v, k, axis)
    n, lead, heads, axis = s1.shape[-1], s1.shape[:-2], core.shape[:-2], k if axis is None else axis
    here, shape = machine(s1.device.type), (s1.device.type, s1.dtype, n, k, axis)
    name = settle("tucker_topk", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, native.buildable(here)), lambda: pick(*shape, here))
    Q, H, r = lead[: len(lead) - len(heads)].numel(), heads.numel(), s1.shape[-2]
    flat = s1.reshape(Q, H, r, n), s2.reshape(Q, H, r, n), core.reshape(H, r, r), u.reshape(H, r), v.reshape(H, r)
    scores, ids = IMPLEMENTATIONS[name](*flat, k, axis)  # [Q, H, k]
    return scores.view(*lead, k), ids.view(*lead, k)


def cell_scores(s1: Tensor, s2: Tensor, core: Tensor, ids: Tensor) -> Tensor:
    """s1, s2 [..., H, r, n], core [H, r, r], ids [..., H, k] -> the scores of these cells [..., H, k]. With several cores that share a search,
    each core's own scores."""
    n = s1.shape[-1]
    return (operator.columns(s1, ids // n) * (core.to(s1.dtype) @ operator.columns(s2, ids % n))).sum(-2)


@torch.no_grad()
def principal(core: Tensor) -> tuple[Tensor, Tensor]:
    """core [..., r, r] -> its first singular vectors u, v [..., r], in float32 at least, with the sign that makes sum(u) positive; where that is zero,
    the first of u's largest entries. (u, v) and (-u, -v) are equally right, but the other one would keep the lowest rows and columns."""
    left, _, right = torch.linalg.svd(core.detach().to(torch.promote_types(core.dtype, torch.float32)))
    u, v = left[..., 0], right[..., 0, :]
    total, size = u.sum(-1, keepdim=True), u.abs()
    largest = (size >= size.amax(-1, keepdim=True) - NOISE).int().argmax(-1, keepdim=True)  # argmax: the first of them
    sign = torch.where(total.abs() > NOISE, total, u.gather(-1, largest)).sign()
    return u * sign, v * sign


def _check(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int | None) -> None:
    heads, r = core.shape[:-2], core.shape[-1] if core.ndim else 0
    if r == 0:
        raise ValueError(f"tucker_topk: the rank must be at least 1; the core is {list(core.shape)}")
    fits = s1.ndim >= core.ndim >= 2 and s1.shape == s2.shape and core.shape[-2] == r == s1.shape[-2] and s1.shape[s1.ndim - core.ndim : -2] == heads
    if not fits or u.shape != (*heads, r) or v.shape != u.shape:
        raise ValueError(
            "tucker_topk wants s1, s2 [..., H, r, n], core [H, r, r] and u, v [H, r]; "
            f"got {', '.join(str(list(x.shape)) for x in (s1, s2, core, u, v))}. u, v are principal(core)."
        )
    n, kept = s1.shape[-1], k if axis is None else axis
    if not 1 <= kept <= n:
        name = "k" if axis is None else "axis"
        raise ValueError(f"tucker_topk: {name} is {kept}; {n} sub-keys an axis leave 1 to {n} rows and columns to keep (axis, or k where there is none)")
    if not 1 <= k <= kept**2:
        raise ValueError(f"tucker_topk: k is {k}; {kept} rows and columns have 1 to {kept**2} cells to keep")
