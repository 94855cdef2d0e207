"""The bag in C++ (cpu.cpp): this file sorts out dtypes and buffers. Its forward is for what embedding_bag is slow at or cannot do.

T bags   R slots a bag   E groups   h slices   d width   N rows   U rows that are read at all   S = T R slots
"""

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.weighted_bag import torch_impl
from memarch.kernels.weighted_bag.operator import Maybe, check_ids, define

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}


def _named(function: str, table: Tensor, wide: torch.dtype) -> str:
    return f"{function}_{SUFFIX[table.dtype]}_{SUFFIX[wide]}"


def bag(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse_grad: bool) -> Tensor:
    (T, R), h, d, out = ids.shape, weights.shape[-1], table.shape[1], torch.promote_types(table.dtype, weights.dtype)
    if out == table.dtype != torch.float64:
        return torch_impl.bag(table, ids, weights, groups, n_groups, sparse_grad)  # embedding_bag, 0.5 of the time: it sums in registers
    check_ids(table, ids, groups, n_groups)
    wide = torch.promote_types(out, torch.float32)
    y = table.new_empty(T, n_groups, d, dtype=wide)
    call(_named("bag_forward", table, wide), table, _whole(ids), _like(weights, wide), _whole(groups), y, T, R, n_groups, h, d)
    return y.to(out)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def _whole(x: Maybe) -> Maybe:
    return None if x is None else _like(x, torch.int64)


def backward(
    dy: Tensor, table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse: bool, rows: bool, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (T, R), h, (N, d), S = ids.shape, weights.shape[-1], table.shape, ids.numel()
    wide = torch.promote_types(dy.dtype, torch.float32)
    ids, groups = _like(ids, torch.int64), _whole(groups)
    if rows:
        order, begins, read = (ids.new_empty(n) for n in (S, S + 1, S))
        U = call("bag_sort", ids, S, N, order, begins, read)
        read, values = read[:U].clone(), table.new_empty((U, d) if sparse else (N, d))
        call("bag_huge_pages", values, values.numel() * values.element_size())
        values = values if sparse else values.zero_()
    else:  # every slot is a segment of its own, and its row's gradient goes nowhere
        order, begins, read, U, values = torch.arange(S), torch.arange(S + 1), ids.flatten(), S, table.new_empty(0)
    dweights = weights.new_empty(weights.shape if scales else 0, dtype=wide)
    gradients = values if rows else None, dweights if scales else None
    sizes = T, R, n_groups, h, d, U, int(not sparse)
    name = _named("bag_backward", table, wide)
    call(name, table, _like(dy, wide), _like(weights, wide), groups, order, begins, read, *gradients, *sizes)
    return read if rows and sparse else read.new_empty(0), values, dweights.to(weights.dtype)


weighted_bag = define("weighted_bag_cpp", bag, backward)
