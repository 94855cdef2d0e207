"""What the implementations share: the operator around a forward and a backward, and the check of ids.

The gradient of the table leaves the backward as (rows, values): `values` [U, d] of the rows that were read, in increasing order, or with
a dense gradient `rows` empty and `values` [N, d].

    N rows   d width   T bags   R slots a bag   E groups   h slices   U rows that are read at all
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Maybe = Tensor | None
Forward = Callable[[Tensor, Tensor, Tensor, Maybe, int, bool], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Maybe, int, bool, bool, bool], tuple[Tensor, Tensor, Tensor]]


def check_ids(table: Tensor, ids: Tensor, groups: Maybe, n_groups: int) -> None:
    """One pass over the ids on a CPU; on a GPU an assertion that nobody waits for."""
    for what, x, most in (("id", ids, table.shape[0]), ("group", groups, n_groups)):
        if x is None or not x.numel():
            continue
        owner = f"the table has {most} rows" if what == "id" else f"there are {most} groups"
        low, high = x.aminmax()
        if x.device.type != "cpu":
            torch._assert_async((low >= 0) & (high < most), f"weighted_bag: {what}s lie outside 0 .. {most - 1}: {owner}")
            continue
        least, greatest = int(low), int(high)
        if least < 0 or greatest >= most:
            raise ValueError(f"weighted_bag: {what} {least if least < 0 else greatest} lies outside 0 .. {most - 1}: {owner}")


def define(name: str, forward: Forward, backward: Backward) -> Forward:
    """The operator memarch::<name>, with memarch::<name>_backward as its gradient."""
    run = torch.library.custom_op(f"memarch::{name}", forward, mutates_args=())
    run_backward = torch.library.custom_op(f"memarch::{name}_backward", backward, mutates_args=())

    @run.register_fake
    def _(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse_grad: bool) -> Tensor:
        return table.new_empty(ids.shape[0], n_groups, table.shape[1], dtype=torch.promote_types(table.dtype, weights.dtype))

    @run_backward.register_fake
    def _(dy: Tensor, table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse: bool, rows: bool, scales: bool) -> tuple[Tensor, ...]:
        read = torch.library.get_ctx().new_dynamic_size() if rows and sparse else 0
        values = table.new_empty(0 if not rows else (read, table.shape[1]) if sparse else table.shape)
        return ids.new_empty(read, dtype=torch.int64), values, weights.new_empty(weights.shape if scales else 0)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, ids, weights, groups, ctx.n_groups, ctx.sparse = inputs
        ctx.save_for_backward(table, ids, weights, groups)

    def gradients(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        table, ids, weights, groups = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        rows, values, dweights = run_backward(dy, table, ids, weights, groups, ctx.n_groups, ctx.sparse, *wanted)
        if wanted[0] and ctx.sparse:
            values = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
        return values if wanted[0] else None, None, dweights if wanted[1] else None, None, None, None

    run.register_autograd(gradients, setup_context=remember)

    def call(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse_grad: bool) -> Tensor:
        learns = torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad)
        chosen = run if learns or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
        return chosen(table, ids, weights, groups, n_groups, sparse_grad)

    call.operator = run  # type: ignore[attr-defined]
    return call


def unique_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """A row-sparse gradient -> rows [U] in increasing order and values [U, d]. Autograd drops the mark "coalesced" when it puts a gradient into
    .grad, and joins the gradients of two uses of a table without adding up: only the latter has to be sorted again."""
    rows, values = grad._indices()[0], grad._values()
    if not grad.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
    return rows, values


def flops(name: str) -> dict[str, Callable[..., int]]:
    return {
        name: lambda table, ids, *_, **__: 2 * ids[0] * ids[1] * table[1],
        f"{name}_backward": lambda dy, table, ids, weights, groups, E, sparse, rows, scales, **_: 2 * (rows + scales) * ids[0] * ids[1] * table[1],
    }
