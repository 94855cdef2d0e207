"""What the implementations share: the operator around a search, its gradient, and the check for NaN.

n sub-keys an axis   k pairs kept   Q searches
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Scatter = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def refuse_nan(op: str, *scores: Tensor) -> None:
    """One pass over the scores on a CPU; on a GPU an assertion that nobody waits for."""
    for s in scores:
        if not s.numel():
            continue
        bad = s.amax().isnan()
        if s.device.type != "cpu":
            torch._assert_async(~bad, f"{op}: NaN among the scores")
        elif bad:
            raise ValueError(f"{op}: NaN among the scores; the queries or the sub-keys have overflowed")


def define(name: str, search: Search, scatter: Scatter) -> Search:
    """The operator memarch::<name>; `scatter` takes the gradient of scores back to both axes."""
    run = torch.library.custom_op(f"memarch::{name}", search, mutates_args=())
    run_backward = torch.library.custom_op(f"memarch::{name}_backward", scatter, mutates_args=())

    @run.register_fake
    def _(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return s1.new_empty(s1.shape[0], k), s1.new_empty(s1.shape[0], k, dtype=torch.int64)

    @run_backward.register_fake
    def _(dscores: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return dscores.new_empty(ids.shape[0], n), dscores.new_empty(ids.shape[0], n)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.n = inputs[0].shape[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    def gradients(ctx: Any, dscores: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        return *run_backward(dscores, *ctx.saved_tensors, ctx.n), None

    run.register_autograd(gradients, setup_context=remember)

    def call(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
        learns = torch.is_grad_enabled() and (s1.requires_grad or s2.requires_grad)
        chosen = run if learns or torch.compiler.is_compiling() else search  # the first call of an operator imports dynamo: not for inference
        return chosen(s1, s2, k)

    call.operator = run  # type: ignore[attr-defined]
    return call
