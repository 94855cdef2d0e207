"""One token of a whole Mamba layer in one call of C++ (cpu.cpp), from what its map in gives to what its map out takes: convolution, choice of step,
write and read, scan and gate. Each of these is little work, and called one by one they take several times as long as all of it.

    R rows   E channels   N states of a channel   K taps   P numbers that the steps are made of
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import forced
from memarch.kernels.selective_scan.cpp_impl import SUFFIX

ROWS = 4  # at 4 rows of d=256 a layer takes 232 us, its parts 261; at 16 it takes 654 and they, with products for all rows at once, 555


class Weights(NamedTuple):
    conv: Tensor  # [E, K]
    conv_bias: Tensor | None  # [E]
    select: Tensor  # [P + 2 N, E]
    dt: Tensor  # [E, P]
    dt_bias: Tensor  # [E]
    A_log: Tensor  # [E, N]
    D: Tensor  # [E]


def fits(xz: Tensor, memory: Tensor, tail: Tensor, weights: Weights) -> bool:
    """Few rows on a CPU where the C++ is built, all in float32 or all in float64, without gradients, and no implementation is forced."""
    if torch.compiler.is_compiling() or not xz.is_cpu or len(xz) > ROWS or xz.dtype not in SUFFIX or forced() or native.why_not() is not None:
        return False
    (E, N), K, R = weights.A_log.shape, weights.conv.shape[1], len(xz)
    if memory.shape != (R, E, N) or tail.shape != (R, K - 1, E):
        return False  # the parts say what is wrong with the state
    given = xz, memory, tail, *(w for w in weights if w is not None)
    return all(v.dtype == xz.dtype for v in given) and not (torch.is_grad_enabled() and any(v.requires_grad for v in given))


def token(xz: Tensor, memory: Tensor, tail: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """xz [R, 1, 2 E], memory [R, E, N], tail [R, K - 1, E] -> y [R, 1, E], the new memory and tail."""
    (R, E, N), (_, K), (_, P) = memory.shape, weights.conv.shape, weights.dt.shape
    given = [v if v is None else v.contiguous() for v in (xz, tail, memory, *weights)]
    new = xz.new_empty(R, 1, E), xz.new_empty(tail.shape), xz.new_empty(memory.shape)
    native.call(f"mamba_token_{SUFFIX[xz.dtype]}", *given, *new, R, E, N, K, P)
    y, tail, memory = new
    return y, memory, tail
