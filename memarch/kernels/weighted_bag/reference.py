"""Read the rows, weigh them, add them."""

from torch import Tensor


def weighted_bag(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return (table[ids] * weights[..., None]).sum(-2)
