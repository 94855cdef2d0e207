"""The short causal depthwise convolution in front of most recurrent mixers; no activation.

    y_t = bias + sum_w weight[:, w] x_{t-W+1+w}      weight[:, -1] multiplies the newest token

    B rows   T tokens   D width   W taps

The state is the last W-1 real inputs, newest last, in the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.short_conv import reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.short_conv import triton_impl

    return triton_impl.short_conv(*args)


IMPLEMENTATIONS = {"reference": reference.short_conv, "torch": torch_impl.short_conv, "triton": _triton}
FLOPS = torch_impl.FLOPS
ORDER = (
    ("triton", "one kernel forward and one backward"),
    ("torch", "shifted multiply-adds: the product path without a GPU"),
)
STEP = Choice("torch", "one token is a step, on a CPU in torch alone")  # and asking which can run takes as long as the step


def why_not(name: str, device_type: str, dtype: torch.dtype, D: int = 256, W: int = 4, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"x must be floating point, it is {dtype}"
    return triton_cannot(device_type, here, transposes=False) if name == "triton" else None


def pick(device_type: str, dtype: torch.dtype, D: int = 256, W: int = 4, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for x [.., D] of this dtype and W taps, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, D, W, here._replace(interpreted=False)))


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B,T,D], weight [D,W], bias [D] or None, state [B,W-1,D] or None (zeros), lengths [B] or None -> y [B,T,D], the new state
    [B,W-1,D], both in x's dtype. Tokens at t >= lengths[b] do not enter the state; lengths 0 keeps it."""
    _check(x, weight, bias, state, lengths)
    shape = x.device.type, x.dtype, x.shape[-1], weight.shape[-1]

    def cannot(name: str) -> str | None:
        return why_not(name, *shape, machine(x.device.type))

    def choice() -> Choice:
        return STEP if x.shape[1] == 1 and x.device.type == "cpu" and x.is_floating_point() else pick(*shape, machine(x.device.type))

    name = settle("short_conv", IMPLEMENTATIONS, impl, cannot, choice)
    return IMPLEMENTATIONS[name](x, weight, bias, state, lengths)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> None:
    if x.ndim != 3 or weight.ndim != 2 or x.shape[2] != weight.shape[0] or weight.shape[1] < 1 or x.shape[1] < 1:
        raise ValueError(
            f"short_conv wants x [B,T,D] with T >= 1 and weight [D,W] with W >= 1; got {list(x.shape)} and {list(weight.shape)}. "
            "A torch Conv1d keeps its weight as [D,1,W]: squeeze(1) it."
        )
    (B, _, D), W = x.shape, weight.shape[1]
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"short_conv: bias is [D] = [{D}]; got {list(bias.shape)}")
    if state is not None and state.shape != (B, W - 1, D):
        raise ValueError(f"short_conv: state is the last W-1 inputs, [B,W-1,D] = {[B, W - 1, D]}; got {list(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"short_conv: lengths counts the real tokens of each row, [B] = [{B}]; got {list(lengths.shape)}")
