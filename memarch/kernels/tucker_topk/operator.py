"""What the implementations share: the operator around a search, and its gradient.

With d the gradient of a kept score and a = s1[:, i], b = s2[:, j] of its cell:  da = d C b,  db = d C^T a,  dC = sum d a b^T.

    r rank   n sub-keys an axis, `axis` of them kept   k cells kept   H heads   Q searches
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memarch.kernels.autocast import exact

Search = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
Spread = Callable[[Tensor, Tensor, int], Tensor]


def columns(s: Tensor, index: Tensor) -> Tensor:
    """s [..., r, n], index [..., k] -> [..., r, k]"""
    return s.gather(-1, index.unsqueeze(-2).expand(*index.shape[:-1], s.shape[-2], index.shape[-1]))


def spread(values: Tensor, index: Tensor, n: int) -> Tensor:
    """values [..., r, k], index [..., k] -> [..., r, n]: each value added where its index says."""
    return values.new_zeros(*values.shape[:-1], n).scatter_add_(-1, index.unsqueeze(-2).expand_as(values), values)


def define(name: str, search: Search, spread: Spread = spread) -> Search:
    """The operator memarch::<name>, with memarch::<name>_backward as its gradient."""

    @exact
    def backward(dscores: Tensor, ids: Tensor, s1: Tensor, s2: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, wide = s1.shape[-1], torch.promote_types(s1.dtype, torch.float32)
        i, j, C = ids // n, ids % n, core.to(wide)
        a, b, d = columns(s1, i).to(wide), columns(s2, j).to(wide), dscores.to(wide)[:, :, None]  # [Q, H, r, k], d [Q, H, 1, k]
        ds1, ds2 = spread(d * (C @ b), i, n), spread(d * (C.mT @ a), j, n)
        dcore = torch.einsum("qhik,qhjk->hij", d * a, b)
        return ds1.to(s1.dtype), ds2.to(s2.dtype), dcore.to(core.dtype)

    run = torch.library.custom_op(f"memarch::{name}", search, mutates_args=())
    run_backward = torch.library.custom_op(f"memarch::{name}_backward", backward, mutates_args=())

    @run_backward.register_fake
    def _(dscores: Tensor, ids: Tensor, s1: Tensor, s2: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return s1.new_empty(s1.shape), s2.new_empty(s2.shape), core.new_empty(core.shape)

    @run.register_fake
    def _(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
        return s1.new_empty(*s1.shape[:2], k), s1.new_empty(*s1.shape[:2], k, dtype=torch.int64)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[:3])

    def gradients(ctx: Any, dscores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *run_backward(dscores, *ctx.saved_tensors), None, None, None, None

    run.register_autograd(gradients, setup_context=remember)

    def call(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (s1, s2, core))
        chosen = run if learns or torch.compiler.is_compiling() else search  # the first call of an operator imports dynamo: not for inference
        return chosen(s1, s2, core, u, v, k, axis)

    call.operator = run  # type: ignore[attr-defined]
    return call


def flops(name: str) -> dict[str, Callable[..., int]]:
    return {
        name: lambda s1, s2, core, u, v, k, axis, **_: 2 * s1[0] * s1[1] * s1[2] * (2 * s1[3] + axis * s1[2] + axis * axis),
        f"{name}_backward": lambda d, ids, s1, *_, **__: 6 * ids[0] * ids[1] * ids[2] * s1[2] ** 2,
    }
