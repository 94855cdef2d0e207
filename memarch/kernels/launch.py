"""What Triton implementations share. Only a `triton_*` module may import this: it imports triton.

Rules every kernel here keeps, so that one source runs under the interpreter, on Hopper and beyond:

- No `tl.trans`: what a product needs transposed is loaded transposed (pointers with swapped strides) or computed transposed. Triton before 3.7.1 gets
  `tl.dot(tl.trans(x), .)` wrong on Hopper, and the set-up to support has 3.6.
- Sums, exponentials and states in ACC: float32, or float64 for float64 inputs, which is how the algorithm is tested under the interpreter.
- Every load through `UPCAST`: the interpreter's bfloat16 arithmetic is wrong, so there everything is float32 before it is used.
- No autotuning, no atomics, offsets of rows in int64, every load masked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}  # only named in signatures


class Check(NamedTuple):
    """One compilation of one kernel, for the check without a GPU (tests/test_triton.py): `types` has every runtime argument in Triton's words
    ("*bf16", "i32", "fp32"), `constants` every constexpr."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    wgmma: bool = False  # the kernel must use Hopper's matrix units


def accumulator(dtype: torch.dtype) -> Any:
    """The type of sums and states for inputs of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> Any:
    """The type in which matrix products take their factors: the inputs' own, but never bfloat16 under the interpreter."""
    return tl.float32 if INTERPRETED and dtype in (torch.bfloat16, torch.float16) else TYPES[dtype]


def tile(n: int) -> int:
    """The side of a tile that holds n: a power of two, at least 16, as products need."""
    return max(16, triton.next_power_of_2(n))


def precision() -> str:
    """For products of float32: what the user allows torch. (Reading `allow_tf32` fails when it was said the new way.)"""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


_noted: list[Check] | None = None


def launch(kernel: Any, grid: tuple[int, ...], warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Run a kernel with those of the arguments that it names; inside `noted` only write down what would be compiled."""
    mine = {name: arguments[name] for name in kernel.arg_names}
    if _noted is None:
        with torch.cuda.device_of(next(x for x in mine.values() if isinstance(x, torch.Tensor))):
            kernel[grid](**mine, num_warps=warps, num_stages=stages)
        return
    fixed = {p.name for p in kernel.params if p.is_constexpr} | {name for name, x in mine.items() if x is None}
    types = {name: f"*{TYPES[x.dtype]}" if isinstance(x, torch.Tensor) else "i32" for name, x in mine.items() if name not in fixed}
    _noted.append(Check(kernel, types, {name: mine[name] for name in fixed}, warps, stages))


@contextmanager
def noted() -> Iterator[list[Check]]:
    """The compilations that the calls inside would need. Meta tensors will do, so what is checked is what is launched."""
    global _noted
    _noted = []
    try:
        yield _noted
    finally:
        _noted = None


@triton.jit
def begin(x, n, T, H, C: tl.constexpr):
    """Of head x of B H: where in [B, T, H] the first token of chunk n lies, and how many tokens are left from there."""
    return ((x // H).to(tl.int64) * T + n * C) * H + x % H, T - n * C


@triton.jit
def load(x, i, j, step_i, step_j, I, J, TYPE: tl.constexpr):
    """The tile [i, j] of a matrix [I, J], zero outside of it. With i and j, and all that belongs to them, swapped it comes transposed."""
    return tl.load(x + i[:, None] * step_i + j[None, :] * step_j, (i < I)[:, None] & (j < J)[None, :], 0.0).to(TYPE)


@triton.jit
def store(x, i, j, step_i, step_j, I, J, value):
    tl.store(x + i[:, None] * step_i + j[None, :] * step_j, value.to(x.dtype.element_ty), (i < I)[:, None] & (j < J)[None, :])


@triton.jit
def dot(a, b, OP: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OP), b.to(OP), input_precision=PRECISION)
