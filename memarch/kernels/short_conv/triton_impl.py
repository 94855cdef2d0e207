"""The causal depthwise convolution for a GPU: reading x once and writing y once is all the time it takes, so every pass is one kernel.

A token before the first one is a row of the state: position p is x_p from 0 on, and row p+W-1 of the state before. What is asked of a token
then holds for the state as well, and both kernels need no other case:

    y_t = bias + sum_lag tap_lag x_{t-lag}                  tap_lag = weight[:, W-1-lag]
    dx_p = sum_lag tap_lag dy_{p+lag} + dtail               p from -(W-1) on
    dtap_lag = sum_{b,p} dy_{p+lag} x_p                     a row of sums from each program, added up by torch

    B rows   T tokens   D width   W taps   lag: how many tokens back a tap looks
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.launch import Check, accumulator, launch, noted
from memarch.kernels.short_conv.torch_impl import FLOPS

ROWS, COLS = 32, 64  # a tile of tokens and channels; with 64 x 64 registers spill

Maybe = Tensor | None


def short_conv(x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    state = None if state is None else state.to(x.dtype)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, state))
    run = operator if wanted or torch.compiler.is_compiling() else convolve  # a first call of an operator imports dynamo: not for inference
    return run(x, weight, bias, state, lengths)


@triton.jit
def _at(x, state, b, p, d, x_b, x_t, T, D, W: tl.constexpr, ACC: tl.constexpr):
    """[P, D] of the sequence that begins with the state, at positions p [P, 1] < T; zero before it."""
    p = p.to(tl.int64)
    values = tl.load(x + b * x_b + p * x_t + d, (p >= 0) & (p < T) & (d < D), 0.0).to(ACC)
    if state is not None:
        row = p + (W - 1)
        values += tl.load(state + (b * (W - 1) + row) * D + d, (p < 0) & (row >= 0) & (d < D), 0.0).to(ACC)
    return values


@triton.jit
def _forward(
    x, weight, bias, state, lengths, y, tail, x_b, x_t, T, D,
    W: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    t, d = tile * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    out = tl.zeros([ROWS, COLS], ACC)
    if bias is not None:
        out += tl.load(bias + d, d < D, 0.0).to(ACC)
    for lag in tl.static_range(W):
        tap = tl.load(weight + d * W + (W - 1 - lag), d < D, 0.0).to(ACC)
        out += tap * _at(x, state, b, t - lag, d, x_b, x_t, T, D, W, ACC)
    tl.store(y + (b * T + t) * D + d, out.to(y.dtype.element_ty), (t < T) & (d < D))
    if tile == 0:
        row = tl.arange(0, TAIL)[:, None]
        end = T if lengths is None else tl.load(lengths + b)
        last = _at(x, state, b, end - (W - 1) + row, d, x_b, x_t, T, D, W, ACC)
        tl.store(tail + (b * (W - 1) + row) * D + d, last.to(tail.dtype.element_ty), (row < W - 1) & (d < D))


@triton.jit
def _backward(
    dy, dtail, x, weight, state, lengths, dx, dstate, sums, x_b, x_t, dy_b, dy_t, T, D,
    W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """sums [B, tiles, W+1, D]: a row for each lag, then the bias's."""
    tile, tiles, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    first = 0 if state is None else 1 - W
    p, d = first + tile * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    channel = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mine = sums + (b * tiles + tile) * (W + 1) * D + channel
    xs = _at(x, state, b, p, d, x_b, x_t, T, D, W, ACC)
    grad = tl.zeros([ROWS, COLS], ACC)
    for lag in tl.static_range(W):
        tap = tl.load(weight + d * W + (W - 1 - lag), d < D, 0.0).to(ACC)
        late = _at(dy, None, b, p + lag, d, dy_b, dy_t, T, D, W, ACC)
        grad += tap * late
        tl.store(mine + lag * D, tl.sum(late * xs, 0), channel < D)
        if lag == 0:
            tl.store(mine + W * D, tl.sum(late, 0), channel < D)
    if dtail is not None:
        row = p - (T if lengths is None else tl.load(lengths + b)) + (W - 1)
        grad += tl.load(dtail + (b * (W - 1) + row) * D + d, (row >= 0) & (row < W - 1) & (d < D), 0.0).to(ACC)
    tl.store(dx + (b * T + p) * D + d, grad.to(dx.dtype.element_ty), (p >= 0) & (p < T) & (d < D))
    if state is not None:
        row = p + (W - 1)
        tl.store(dstate + (b * (W - 1) + row) * D + d, grad.to(dstate.dtype.element_ty), (p < 0) & (d < D))


def convolve(x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    a = plan(x, weight, bias, state, lengths)
    y, tail = _empty(x, weight)
    launch(_forward, grid(x, 0), **a, y=y, tail=tail, TAIL=triton.next_power_of_2(a["W"]))
    return y, tail


def convolve_backward(dy: Tensor, dtail: Maybe, x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, weight, bias and state; the last two are empty where there is none."""
    a = plan(x, weight, bias, state, lengths)
    W, dy = a["W"], dy if dy.stride(2) == 1 else dy.contiguous()
    a |= {"dy": dy, "dy_b": dy.stride(0), "dy_t": dy.stride(1), "dtail": None if dtail is None else dtail.contiguous()}
    programs = grid(x, 0 if state is None else W - 1)
    dx, dstate = x.new_empty(x.shape), x.new_empty(0 if state is None else state.shape)
    sums = x.new_empty(x.shape[0], programs[0], W + 1, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))
    launch(_backward, programs, **a, dx=dx, dstate=dstate, sums=sums)
    total = sums.sum((0, 1))  # [W + 1, D]
    dbias = x.new_empty(0) if bias is None else total[W].to(bias.dtype, copy=True)
    return dx, total[:W].flip(0).mT.to(weight.dtype).contiguous(), dbias, dstate


def plan(x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> dict[str, Any]:
    """What both kernels ask for, by the names they use. Only the channels of x have to lie side by side: it often is a part of something wider."""
    x = x if x.stride(2) == 1 else x.contiguous()
    a: dict[str, Any] = {"weight": weight, "bias": bias, "state": state, "lengths": lengths}
    a = {name: None if t is None else t.contiguous() for name, t in a.items()} | {"x": x, "x_b": x.stride(0), "x_t": x.stride(1)}
    return a | {"T": x.shape[1], "D": x.shape[2], "W": weight.shape[1], "ROWS": ROWS, "COLS": COLS, "ACC": accumulator(x.dtype)}


def grid(x: Tensor, before: int) -> tuple[int, int, int]:
    """Tiles for every token and `before` rows of the state."""
    B, T, D = x.shape
    return triton.cdiv(before + T, ROWS), triton.cdiv(D, COLS), B


def _empty(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


operator = torch.library.custom_op("memarch::short_conv_triton", convolve, mutates_args=())
operator_backward = torch.library.custom_op("memarch::short_conv_triton_backward", convolve_backward, mutates_args=())


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    return _empty(x, weight)


@operator_backward.register_fake
def _(dy: Tensor, dtail: Maybe, x: Tensor, weight: Tensor, bias: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias, dstate = x.new_empty(0) if bias is None else bias.new_empty(bias.shape), x.new_empty(0 if state is None else state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Maybe, dtail: Maybe) -> tuple[Maybe, ...]:
    x, weight, bias, state, lengths = ctx.saved_tensors
    dx, dweight, dbias, dstate = operator_backward(torch.zeros_like(x) if dy is None else dy, dtail, x, weight, bias, state, lengths)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None


operator.register_autograd(_gradients, setup_context=_remember)
formulas: dict[str, Any] = FLOPS
flops.file({name.replace("conv", "conv_triton"): formula for name, formula in formulas.items()})


def checks() -> Iterator[Check]:
    for dtype, W, carried in (
        (torch.bfloat16, 4, True),
        (torch.bfloat16, 4, False),
        (torch.bfloat16, 7, True),
        (torch.float32, 4, True),
        (torch.float32, 2, False),
    ):
        x, weight, state = (torch.empty(n, dtype=dtype, device="meta") for n in ((1, ROWS, COLS), (COLS, W), (1, W - 1, COLS)))
        bias, tail, lengths = (weight[:, 0], state, state[:, 0, 0].long()) if carried else (None, None, None)
        with noted() as found:
            convolve(x, weight, bias, tail, lengths)
            convolve_backward(x, tail, x, weight, bias, tail, lengths)
        yield from found
