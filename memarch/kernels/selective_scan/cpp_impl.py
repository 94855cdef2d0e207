"""The selective scan in C++ (cpu.cpp): this file sorts out dtypes and buffers.

R rows   T tokens   E channels   N states of a channel
"""

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.selective_scan.operator import Gradients, Maybe, define, flops, wide

CHUNK = 32  # tokens; 16 and 8 are no faster, and keep more states
PARTS, WIDTH = 16, 64  # at most so many groups of at least so many channels: each has its own sums for B and C, and may have its own thread
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def _like(x: Maybe, dtype: torch.dtype) -> Maybe:
    return None if x is None else x.to(dtype).contiguous()


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    (R, T, E), N, dtype = x.shape, A.shape[1], wide(x)
    given = *(_like(v, dtype) for v in (x, dt, A, B, C, D, z, state)), _like(lengths, torch.int64)
    y, last = x.new_empty(R, T, E, dtype=dtype), x.new_empty(R, E, N, dtype=dtype)
    states = last.new_empty((R, -(-T // CHUNK), N, E) if save else 0)
    call(f"selective_scan_{SUFFIX[dtype]}", *given, y, last, states if save else None, R, T, E, N, CHUNK)
    return y.to(x.dtype), last, states


def scan_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, states: Tensor, lengths: Maybe
) -> Gradients:
    (R, T, E), N, dtype = x.shape, A.shape[1], states.dtype
    parts = min(PARTS, -(-E // WIDTH))
    given = *(_like(v, dtype) for v in (dy, dlast, x, dt, A, B, C, D, z)), states, _like(lengths, torch.int64)
    dx, ddt, dstate, dA = (states.new_empty(shape) for shape in (x.shape, x.shape, (R, E, N), (R, E, N)))
    dB, dC = (states.new_empty(parts, R, T, N) for _ in range(2))
    dD, dz = states.new_empty(R, E), None if z is None else states.new_empty(R, T, E)
    call(f"selective_scan_backward_{SUFFIX[dtype]}", *given, dx, ddt, dA, dB, dC, dD, dz, dstate, R, T, E, N, CHUNK, parts)
    found = dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), None if D is None else dD.sum(0), dz
    like = x, dt, A, B, C, D, z
    grads = [x.new_empty(0) if g is None or v is None else g.to(v.dtype) for g, v in zip(found, like, strict=True)]
    return *grads, dstate  # type: ignore[return-value]  # seven of them


selective_scan = define("selective_scan_cpp", scan, scan_backward, lambda *_: CHUNK)
FLOPS = flops("selective_scan_cpp")
