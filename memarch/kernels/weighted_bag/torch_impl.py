"""torch's bag, forwards over the table and backwards over dy.

The gradient of a row is itself a weighted bag, of the rows of dy that its slots fed: with the slots stably sorted by id, every row that was
read is one bag of `embedding_bag`, which sums a bag in order. No atomics, and no `index_add`, whose order of sums is nobody's promise. Forward
and backward take half of the time of embedding_bag(sparse=True) followed by coalesce.

A table [N, d] of h slices is a table [N h, d / h] in the same memory, and a slot then reads h of its rows.

    N rows   d width   T bags   R slots a bag   E groups   h slices   U rows that are read at all   S = T R slots
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from memarch.kernels.autocast import exact
from memarch.kernels.weighted_bag.operator import Maybe, check_ids, define

CHUNK = 2**19  # numbers gathered at a time: they stay in the cache until they are used


@exact
def bag(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse_grad: bool) -> Tensor:
    check_ids(table, ids, groups, n_groups)
    out = torch.promote_types(table.dtype, weights.dtype)
    if out != table.dtype:  # embedding_bag takes one dtype; a copy of the table is out of the question
        return _by_gathering(table, ids, weights.to(out), groups, n_groups)
    (T, R), E = ids.shape, n_groups
    flat, scales = ids.flatten().long(), weights.to(out).flatten(0, 1)
    if groups is None:
        begins = torch.arange(T, device=ids.device) * R
    else:
        fed, order = _bags(groups, R, E, flat).sort(stable=True)
        flat, scales, begins = flat[order], scales[order], torch.searchsorted(fed, torch.arange(T * E, device=ids.device))
    return _sums(table, flat, scales, begins).view(T, E, table.shape[1])


def _sums(table: Tensor, ids: Tensor, weights: Tensor, begins: Tensor) -> Tensor:
    """ids [S], weights [S, h], the first slot of each of n bags -> [n, d]."""
    S, h = weights.shape
    if h == 1:
        return F.embedding_bag(ids, table, begins, per_sample_weights=weights.flatten(), mode="sum")
    slices = torch.arange(h, device=ids.device)[:, None]
    fine = table.view(-1, table.shape[1] // h)  # slices first: bag (i, b) holds slice i of bag b
    y = F.embedding_bag((ids * h + slices).flatten(), fine, (begins + S * slices).flatten(), per_sample_weights=weights.mT.flatten(), mode="sum")
    return y.view(h, begins.shape[0], fine.shape[1]).transpose(0, 1).flatten(1)


def _bags(groups: Maybe, R: int, E: int, ids: Tensor) -> Tensor:
    """The row of y [T E] that each slot feeds, [S]."""
    token = torch.arange(ids.numel(), device=ids.device) // max(R, 1)
    return token if groups is None else token * E + groups.flatten()


def _gathered(table: Tensor, ids: Tensor, dtype: torch.dtype, h: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows that some bags read, [t, h, R, d/h], bag after bag."""
    (T, R), step = ids.shape, max(1, CHUNK // max(1, ids.shape[1] * table.shape[1]))
    for t in range(0, T, step):
        part = slice(t, min(t + step, T))
        rows = table.index_select(0, ids[part].flatten()).to(dtype)
        yield part, rows.view(-1, R, h, table.shape[1] // h).transpose(1, 2)


def _by_gathering(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, E: int) -> Tensor:
    y = weights.new_empty(ids.shape[0], E, table.shape[1])
    wide = torch.promote_types(weights.dtype, torch.float32)
    for part, rows in _gathered(table, ids, wide, weights.shape[-1]):
        w = weights[part].to(wide).mT[:, :, None]  # [t, h, 1, R]
        if groups is not None:
            w = w * (groups[part, None] == torch.arange(E, device=ids.device)[:, None])[:, None]  # [t, h, E, R]
        y[part] = (w @ rows).transpose(1, 2).flatten(2)
    return y


@exact
def backward(
    dy: Tensor, table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse: bool, rows: bool, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows, scales: which of the gradients of table and weights are wanted -> (row ids, values) and the gradient of the weights."""
    R, h, E = ids.shape[1], weights.shape[-1], n_groups
    read, values, dweights = ids.new_empty(0, dtype=torch.int64), table.new_empty(0), weights.new_empty(weights.shape if scales else 0)
    dy = dy.contiguous()
    if rows:
        sorted_ids, order = ids.flatten().long().sort(stable=True)
        read, uses = sorted_ids.unique_consecutive(return_counts=True)
        values = _sums(dy.flatten(0, 1), _bags(groups, R, E, ids)[order], weights.flatten(0, 1)[order].to(dy.dtype), uses.cumsum(0) - uses).to(table.dtype)
        if not sparse:
            read, values = read.new_empty(0), torch.zeros_like(table).index_copy_(0, read, values)
    if scales:
        wide = torch.promote_types(dy.dtype, torch.float32)
        for part, found in _gathered(table, ids, wide, h):
            products = found @ dy[part].to(wide).unflatten(-1, (h, table.shape[1] // h)).permute(0, 2, 3, 1)  # [t, h, R, E]
            which = None if groups is None else groups[part, None, :, None].long().expand(-1, h, -1, -1)
            dweights[part] = (products if which is None else products.gather(-1, which))[..., 0].mT
    return read, values, dweights


weighted_bag = define("weighted_bag", bag, backward)
