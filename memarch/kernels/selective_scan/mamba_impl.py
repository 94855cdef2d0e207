"""Adapter for the CUDA kernel of mamba-ssm (state-spaces/mamba), used when it imports and a probe call gives what the reference gives.

It takes time last, [R, E, T], begins with a state of zeros, wants one dtype for x, dt, B, C and z, and gives its final state no gradient:
that one is computed here, by `torch_impl`, when somebody asks for it.

    R rows   T tokens   E channels   N states of a channel
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch.kernels.selective_scan import reference, torch_impl
from memarch.kernels.selective_scan.operator import Maybe, step


class Probe(NamedTuple):
    ok: bool
    reason: str | None  # why it cannot be used


_probe: Probe | None = None


def probe() -> Probe:
    """Whether mamba-ssm works here, found out once. A package without its kernel, or built for another torch, is common: one small call is made."""
    global _probe
    if _probe is None:
        _probe = _try("cuda") if torch.cuda.is_available() else Probe(False, "mamba-ssm needs a CUDA device")
    return _probe


def _try(device: str) -> Probe:
    x = torch.linspace(-1, 1, 2 * 5 * 4, device=device).view(2, 5, 4)
    args = x, x.exp(), -x[0, :4, :3].exp(), x[..., 1:], x[..., :3], x[0, 0], x, None, None
    try:
        found = selective_scan(*args)
        for y, truth in zip(found, reference.selective_scan(*args), strict=True):
            torch.testing.assert_close(y, truth, rtol=1e-3, atol=1e-4)
    except Exception as error:  # not installed, a build for another torch, an unsupported GPU, wrong numbers: all end here, once
        return Probe(False, f"mamba-ssm: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return Probe(True, None)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if x.shape[1] == 1:
        return step(x, dt, A, B, C, D, z, state, lengths)
    assert state is None, "why_not does not let it through"
    given: list[Any] = [x, dt, B, C, z]
    if any(v is not None and v.dtype != x.dtype for v in given):  # steps in float32 are not rounded to what x has
        given = [v if v is None else v.float() for v in given]
    if lengths is not None:
        pad = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
        given = [v if v is None else v.masked_fill(pad, 0) for v in given]
    u, delta, write, read, gate = (v if v is None else v.mT.contiguous() for v in given)  # [R, E or N, T]
    A, D = A.float(), None if D is None else D.float()
    y, last = selective_scan_fn(u, delta, A, write, read, D=D, z=gate, return_last_state=True)
    return y.mT.to(x.dtype), FinalState.apply(last.detach(), given[0], given[1], A, given[2])


class FinalState(torch.autograd.Function):
    """`last` as a function of what it was made of."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, dt, A, B)
        return last.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dlast: Tensor) -> tuple[Maybe, ...]:
        x, dt, A, B = ctx.saved_tensors
        *_, states = torch_impl.scan(x, dt, A, B, B, None, None, None, None, True)
        dx, ddt, dA, dB, *_ = torch_impl.scan_backward(torch.zeros_like(x), dlast, x, dt, A, B, B, None, None, states, None)
        return None, dx, ddt, dA, dB
