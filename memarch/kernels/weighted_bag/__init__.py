"""The weighted sum of table rows: y = sum_r weights_r table[ids_r].

N rows   d width   R rows read
"""

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle
from memarch.kernels.weighted_bag import reference, torch_impl

IMPLEMENTATIONS = {"reference": reference.weighted_bag, "torch": torch_impl.weighted_bag}
ORDER = (("torch", "embedding_bag: the product path without a GPU"),)


def why_not(name: str, device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"the table must be floating point, it is {dtype}"
    return None


def pick(device_type: str, dtype: torch.dtype, d: int = 256, R: int = 32, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for a table [.., d] of this dtype and R rows read, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, d, R, here))


def weighted_bag(table: Tensor, ids: Tensor, weights: Tensor, *, impl: str | None = None) -> Tensor:
    """table [N, d], ids int64 [..., R], weights [..., R] in the table's dtype -> y [..., d]."""
    if table.ndim != 2 or ids.shape != weights.shape or weights.dtype != table.dtype:
        raise ValueError(
            f"weighted_bag wants table [N, d], ids and weights of one shape [..., R], weights in the table's dtype; "
            f"got {list(table.shape)} {table.dtype}, {list(ids.shape)}, {list(weights.shape)} {weights.dtype}"
        )
    here, shape = machine(table.device.type), (table.device.type, table.dtype, table.shape[1], ids.shape[-1])
    name = settle("weighted_bag", IMPLEMENTATIONS, impl, lambda m: why_not(m, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](table, ids, weights)
