"""The weighted sum of table rows, in groups and by column slices.

    y[t, e, slice i] = sum over the slots r with groups[t, r] = e of weights[t, r, i] table[ids[t, r], slice i]

    dweights[t, r, i] = <dy[t, e, slice i], table[ids[t, r], slice i]>
    dtable[row, slice i] = sum over all (t, r) that read the row of weights[t, r, i] dy[t, e, slice i]

    N rows   d width   T bags   R slots a bag   E groups   h slices, of d / h columns each   U rows that are read at all

Sums are made in float32 at least. The output has the wider of the dtypes of table and weights: a bfloat16 table under float32 weights
gives float32. The gradient of the table has its dtype; it is summed row by row in an order that the ids decide, so it is the same to the
bit in every run and for every number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.weighted_bag import cpp_impl, operator, reference, torch_impl


def _triton(*args: Any) -> Tensor:
    from memarch.kernels.weighted_bag import triton_impl

    return triton_impl.weighted_bag(*args)


IMPLEMENTATIONS = {"reference": reference.weighted_bag, "torch": torch_impl.weighted_bag, "cpp": cpp_impl.weighted_bag, "triton": _triton}
FLOPS = operator.flops("weighted_bag") | operator.flops("weighted_bag_cpp")
ORDER = (
    ("triton", "one kernel forward; backward a scan over sorted segments, without atomics"),
    ("cpp", "C++: the backward reads every row once and writes each gradient row once"),
    ("torch", "embedding_bag, and a backward over sorted segments: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"the table must be floating point, it is {dtype}"
    if name == "triton":
        return triton_cannot(device_type, here, transposes=False)
    return native.cannot(device_type, dtype, here, (torch.float32, torch.bfloat16, torch.float64)) if name == "cpp" else None


def pick(device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for a table [.., d] of this dtype and R rows read, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, d, R, here._replace(interpreted=False)))


def weighted_bag(
    table: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    groups: Tensor | None = None,
    n_groups: int = 1,
    sparse_grad: bool = False,
    impl: str | None = None,
) -> Tensor:
    """table [N, d], ids [..., R] (int64 or int32), weights [..., R], or [..., R, h] to weigh h column slices apart, groups [..., R] in
    0 .. n_groups - 1 -> y [..., d], or [..., n_groups, d] with groups.

    sparse_grad: the gradient of the table is a coalesced sparse tensor of the rows that were read, and costs nothing for all others."""
    _check(table, ids, weights, groups, n_groups)
    R, h = ids.shape[-1], weights.shape[-1] if weights.ndim > ids.ndim else 1
    here, shape = machine(table.device.type), (table.device.type, table.dtype, table.shape[1], R)
    name = settle("weighted_bag", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, native.buildable(here)), lambda: pick(*shape, here))
    bags = ids.shape[:-1].numel()
    flat = ids.reshape(bags, R), weights.reshape(bags, R, h), None if groups is None else groups.reshape(bags, R)
    y = IMPLEMENTATIONS[name](table, *flat, n_groups, sparse_grad)  # [T, E, d]
    return y.view(*ids.shape[:-1], *(() if groups is None else (n_groups,)), table.shape[1])


def _check(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int) -> None:
    if table.ndim != 2 or ids.ndim < 1 or weights.shape[: ids.ndim] != ids.shape or weights.ndim > ids.ndim + 1:
        raise ValueError(
            "weighted_bag wants table [N, d], ids [..., R] and weights [..., R] or, by column slices, [..., R, h]; "
            f"got {list(table.shape)}, {list(ids.shape)}, {list(weights.shape)}"
        )
    if not table.is_contiguous():
        raise ValueError("weighted_bag: the table must be contiguous; a copy at every call would cost the whole table")
    if not weights.dtype.is_floating_point or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"weighted_bag: weights must be floating point and ids int64 or int32; they are {weights.dtype} and {ids.dtype}")
    h = weights.shape[-1] if weights.ndim > ids.ndim else 1
    if h < 1 or table.shape[1] % h:
        raise ValueError(f"weighted_bag: {h} slices of equal width need a table whose width {h} divides; it is {table.shape[1]} wide")
    if groups is None:
        if n_groups != 1:
            raise ValueError(f"weighted_bag: n_groups is {n_groups}, so every slot needs a group: pass groups [..., R]")
    elif groups.shape != ids.shape or groups.dtype not in (torch.int64, torch.int32) or n_groups < 1:
        raise ValueError(
            f"weighted_bag: groups gives every slot a whole number in 0 .. n_groups - 1, {list(ids.shape)}; "
            f"got {list(groups.shape)} of {groups.dtype}, n_groups {n_groups}"
        )
