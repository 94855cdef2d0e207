"""The operator, made of a weighted bag and its backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memarch.kernels.weighted_bag.operator import Backward, Forward, Maybe, check_ids

Call = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def adjoint(name: str, bag: Forward, bag_backward: Backward) -> Call:
    """memarch::<name>, whose forward is bag_backward's gradient of the weights and whose gradients are bag and bag_backward's gradient of the table."""

    def forward(table: Tensor, ids: Tensor, x: Tensor, sparse_grad: bool) -> Tensor:
        check_ids(table, ids, None, 1)
        out = torch.promote_types(table.dtype, x.dtype)
        weights = x.new_empty(*ids.shape, 1, dtype=out)  # only their shape and dtype are looked at
        return bag_backward(x.to(out)[:, None], table, ids, weights, None, 1, False, False, True)[2].squeeze(-1)

    def backward(da: Tensor, table: Tensor, ids: Tensor, x: Tensor, sparse: bool, rows: bool, vector: bool) -> tuple[Tensor, Tensor, Tensor]:
        """rows, vector: which of the gradients of table and x are wanted -> (row ids, values) as in weighted_bag, and the gradient of x."""
        da = da.contiguous()[..., None]
        dx = bag(table, ids, da, None, 1, False)[:, 0].to(x.dtype) if vector else x.new_empty(0)
        if not rows:
            return ids.new_empty(0, dtype=torch.int64), table.new_empty(0), dx
        read, values, _ = bag_backward(x.to(da.dtype)[:, None], table, ids, da, None, 1, sparse, True, False)
        return read, values, dx

    run = torch.library.custom_op(f"memarch::{name}", forward, mutates_args=())
    run_backward = torch.library.custom_op(f"memarch::{name}_backward", backward, mutates_args=())

    @run.register_fake
    def _(table: Tensor, ids: Tensor, x: Tensor, sparse_grad: bool) -> Tensor:
        return table.new_empty(ids.shape, dtype=torch.promote_types(table.dtype, x.dtype))

    @run_backward.register_fake
    def _(da: Tensor, table: Tensor, ids: Tensor, x: Tensor, sparse: bool, rows: bool, vector: bool) -> tuple[Tensor, Tensor, Tensor]:
        read = torch.library.get_ctx().new_dynamic_size() if rows and sparse else 0
        values = table.new_empty(0 if not rows else (read, table.shape[1]) if sparse else table.shape)
        return ids.new_empty(read, dtype=torch.int64), values, x.new_empty(x.shape if vector else 0)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.sparse = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, da: Tensor) -> tuple[Maybe, ...]:
        table, ids, x = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        rows, values, dx = run_backward(da, table, ids, x, ctx.sparse, *wanted)
        if wanted[0] and ctx.sparse:
            values = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
        return values if wanted[0] else None, None, dx if wanted[1] else None, None

    run.register_autograd(gradients, setup_context=remember)

    def call(table: Tensor, ids: Tensor, x: Tensor, sparse_grad: bool) -> Tensor:
        learns = torch.is_grad_enabled() and (table.requires_grad or x.requires_grad)
        chosen = run if learns or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
        return chosen(table, ids, x, sparse_grad)

    return call


def flops(name: str) -> dict[str, Callable[..., int]]:
    return {
        name: lambda table, ids, *_, **__: 2 * ids[0] * ids[1] * table[1],
        f"{name}_backward": lambda da, table, ids, x, sparse, rows, vector, **_: 2 * (rows + vector) * ids[0] * ids[1] * table[1],
    }
