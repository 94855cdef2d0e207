"""Products of a vector with the rows of a table that it chose: the adjoint of `weighted_bag`.

    a[t, r] = <table[ids[t, r]], x[t]>

    dx[t] = sum_r da[t, r] table[ids[t, r]]                     a weighted bag
    dtable[row] = sum over all (t, r) that read the row of da[t, r] x[t]      its gradient of the table

    N rows   d width   T bags   R rows a bag

So it has no code of its own: each implementation is that of `weighted_bag`, with the roles exchanged, and as repeatable to the bit.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle
from memarch.kernels.row_dot import cpp_impl, reference
from memarch.kernels.row_dot.operator import adjoint, flops
from memarch.kernels.weighted_bag import torch_impl
from memarch.kernels.weighted_bag import why_not as bag_cannot


def _triton(*args: Any) -> Tensor:
    from memarch.kernels.row_dot import triton_impl

    return triton_impl.row_dot(*args)


IMPLEMENTATIONS = {
    "reference": reference.row_dot,
    "torch": adjoint("row_dot", torch_impl.bag, torch_impl.backward),
    "cpp": cpp_impl.row_dot,
    "triton": _triton,
}
FLOPS = flops("row_dot") | flops("row_dot_cpp")
ORDER = (
    ("triton", "the kernels of weighted_bag: rows are read once and never copied"),
    ("cpp", "C++: rows are read once and never copied"),
    ("torch", "gathered in pieces that stay in the cache: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> str | None:
    return bag_cannot(name, device_type, dtype, d, R, here)


def pick(device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for a table [.., d] of this dtype and R rows read, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, d, R, here._replace(interpreted=False)))


def row_dot(table: Tensor, ids: Tensor, x: Tensor, *, sparse_grad: bool = False, impl: str | None = None) -> Tensor:
    """table [N, d], ids [..., R] (int64 or int32), x [..., d] -> a [..., R] in the wider of the dtypes of table and x.

    sparse_grad: as in `weighted_bag`."""
    if table.ndim != 2 or x.shape != (*ids.shape[:-1], table.shape[1]):
        raise ValueError(f"row_dot wants table [N, d], ids [..., R] and x [..., d]; got {list(table.shape)}, {list(ids.shape)}, {list(x.shape)}")
    if not table.is_contiguous():
        raise ValueError("row_dot: the table must be contiguous; a copy at every call would cost the whole table")
    here, shape = machine(table.device.type), (table.device.type, table.dtype, table.shape[1], ids.shape[-1])
    name = settle("row_dot", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, native.buildable(here)), lambda: pick(*shape, here))
    bags = ids.shape[:-1].numel()
    return IMPLEMENTATIONS[name](table, ids.reshape(bags, -1), x.reshape(bags, -1), sparse_grad).view(ids.shape)
