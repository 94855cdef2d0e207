"""What Triton implementations share. Only a `triton_impl` may import this: it imports triton.

Rules every kernel here keeps, so that one source runs under the interpreter, on Hopper and beyond:

- No `tl.trans`: what a product needs transposed is loaded transposed (pointers with swapped strides) or computed transposed. Triton before 3.7.1 gets
  `tl.dot(tl.trans(x), .)` wrong on Hopper, and the set-up to support has 3.6.
- Sums, exponentials and states in ACC: float32, or float64 for float64 inputs, which is how the algorithm is tested under the interpreter.
- Every load through `UPCAST`: the interpreter's bfloat16 arithmetic is wrong, so there everything is float32 before it is used.
- No autotuning, no atomics, offsets of rows in int64, every load masked.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


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
