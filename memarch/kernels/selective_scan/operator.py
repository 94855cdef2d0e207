"""What the implementations share: one token, and the operator around a forward and a backward.

A forward keeps the states before every chunk of tokens, [R, chunks, N, E]; a backward computes all else again.

    R rows   T tokens   E channels   N states of a channel
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634  # e^a = 2^(a LOG2E): torch's exp2 takes a quarter of the time of its exp on a CPU

Maybe = Tensor | None
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe], tuple[Tensor, Tensor]]
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, bool], tuple[Tensor, Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # of the inputs, empty where there is none, and of the state
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Tensor, Maybe], Gradients]


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself. Decoding is made of these, and of little else, so no call is made for nothing."""
    dtype, narrow = wide(x), x.dtype
    given: list[Any] = [x, dt, B, C, z]  # [R, 1, E or N]
    if lengths is not None:  # zeros change nothing and answer 0
        given = [v if v is None else v.masked_fill((lengths <= 0)[:, None, None], 0) for v in given]
    x, dt, B, C, z, A, D, state = (v if v is None or v.dtype == dtype else v.to(dtype) for v in (*given, A, D, state))
    h = (dt * x).mT * B  # [R, E, N]
    if state is not None:
        h = torch.addcmul(h, ((dt * LOG2E).mT * A).exp2_(), state)
    y = (h * C).sum(-1, keepdim=True).mT  # autocast would have the gradients of a matrix product in bfloat16
    y = y if D is None else torch.addcmul(y, D, x)
    y = y if z is None else y * F.silu(z)
    return y if narrow == dtype else y.to(narrow), h


def define(name: str, forward: Forward, backward: Backward, span: Callable[[int, int, int], int]) -> Scan:
    """The operator memarch::<name>, with memarch::<name>_backward as its gradient; a chunk has span(R, E, N) tokens."""
    run = torch.library.custom_op(f"memarch::{name}", forward, mutates_args=())
    run_backward = torch.library.custom_op(f"memarch::{name}_backward", backward, mutates_args=())

    @run.register_fake
    def _(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        (R, T, E), N = x.shape, A.shape[1]
        h = x.new_empty(R, E, N, dtype=wide(x))
        return x.new_empty(R, T, E), h, h.new_empty((R, -(-T // span(R, E, N)), N, E) if save else 0)

    @run_backward.register_fake
    def _(
        dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, states: Tensor, lengths: Maybe
    ) -> tuple[Tensor, ...]:
        return *(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, dt, A, B, C, D, z)), dlast.new_empty(dlast.shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, state, lengths, save = inputs
        assert save, "the operator was told that no gradient is wanted"
        ctx.save_for_backward(*given, output[2], lengths)
        ctx.state_dtype = None if state is None else state.dtype
        ctx.like = [(v.shape, v.dtype, v.device) for v in output[:2]]
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, dy: Maybe, dlast: Maybe, *_: None) -> tuple[Maybe, ...]:
        dy, dlast = (torch.zeros(s, dtype=t, device=d) if v is None else v for v, (s, t, d) in zip((dy, dlast), ctx.like, strict=True))
        x, dt, A, B, C, D, z, states, lengths = ctx.saved_tensors  # asked for once: recomputation gives them out only once
        dx, ddt, dA, dB, dC, dD, dz, dstate = run_backward(dy, dlast, x, dt, A, B, C, D, z, states, lengths)
        dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
        return dx, ddt, dA, dB, dC, None if D is None else dD, None if z is None else dz, dstate, None, None

    run.register_autograd(gradients, setup_context=remember)

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 1:
            return step(x, dt, A, B, C, D, z, state, lengths)
        save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, dt, A, B, C, D, z, state))
        chosen = run if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
        return chosen(x, dt, A, B, C, D, z, state, lengths, save)[:2]

    call.operator = run  # type: ignore[attr-defined]
    return call


def flops(name: str) -> dict[str, Callable[..., int]]:
    """For every token, channel and state: dt A, u B, a multiply-add that writes and one that reads; the exponential is not counted.
    The backward makes the states once more and has seven such pairs of its own."""

    def sites(x: torch.Size, A: torch.Size) -> int:
        return x[0] * x[1] * x[2] * A[1]

    return {
        name: lambda x, dt, A, *_, **__: 6 * sites(x, A),
        f"{name}_backward": lambda dy, dlast, x, dt, A, *_, **__: 18 * sites(x, A),
    }
