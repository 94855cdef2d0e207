"""One token of a whole Mamba layer in one call of C++ (cpu.cpp): map in, convolution, choice of step, write and read, scan, gate, map out. Beside the
maps each of these is little work, and called one by one they take as long again as all of it.

    R rows   W width   E channels   N states of a channel   K taps   P numbers that the steps are made of
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import forced
from memarch.kernels.selective_scan.cpp_impl import SUFFIX

ROWS = 4  # at 4 rows of d=256 a layer takes 182 us, its parts 199; at 8 it takes 334 and they, with products for all rows at once, 267


class Weights(NamedTuple):
    into: Tensor  # [2 E, W]
    into_bias: Tensor | None  # [2 E]
    conv: Tensor  # [E, K]
    conv_bias: Tensor | None  # [E]
    select: Tensor  # [P + 2 N, E]
    dt: Tensor  # [E, P]
    dt_bias: Tensor  # [E]
    A_log: Tensor  # [E, N]
    D: Tensor  # [E]
    out: Tensor  # [W, E]
    out_bias: Tensor | None  # [W]


def fits(u: Tensor, memory: Tensor, tail: Tensor, weights: Weights) -> bool:
    """Few rows on a CPU where the C++ is built, all in float32 or all in float64, without gradients or autocast, and no implementation is forced."""
    if torch.compiler.is_compiling() or not u.is_cpu or u.shape[0] > ROWS or u.dtype not in SUFFIX or forced() or torch.is_autocast_enabled("cpu"):
        return False
    if native.why_not() is not None:
        return False
    (E, N), K, R = weights.A_log.shape, weights.conv.shape[1], u.shape[0]
    if u.shape != (R, 1, weights.into.shape[1]) or memory.shape != (R, E, N) or tail.shape != (R, K - 1, E):
        return False  # the parts say what is wrong
    given = u, memory, tail, *(w for w in weights if w is not None)
    return all(v.dtype == u.dtype for v in given) and not (torch.is_grad_enabled() and any(v.requires_grad for v in given))


def token(u: Tensor, memory: Tensor, tail: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """u [R, 1, W], memory [R, E, N], tail [R, K - 1, E] -> y [R, 1, W], the new memory and tail."""
    (R, E, N), (_, K), (_, P) = memory.shape, weights.conv.shape, weights.dt.shape
    u, tail, memory = u.contiguous(), tail.contiguous(), memory.contiguous()
    maps = (w if w is None else w.contiguous() for w in weights)
    new = torch.empty_like(u), torch.empty_like(tail), torch.empty_like(memory)
    native.call(f"mamba_token_{SUFFIX[u.dtype]}", u, tail, memory, *maps, *new, R, u.shape[2], E, N, K, P)
    y, tail, memory = new
    return y, memory, tail
