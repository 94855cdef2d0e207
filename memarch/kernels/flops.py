"""FLOP formulas, so that `FlopCounterMode` (and with it MFU) sees what happens inside our operators.

They are filed in `torch.utils.flop_counter`, whose import loads triton. So they are filed when that module is loaded already at the time
memarch.kernels is imported, and otherwise by `flop_counter()`, which is the way to count:

    with memarch.kernels.flop_counter() as counter: loss.backward()
    counter.get_total_flops()
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

_filed: set[str] = set()


def file(formulas: Mapping[str, Callable[..., int]]) -> None:
    """formulas: name of a `memarch::` operator -> flops(*shapes of its arguments, out_shape)."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

    for name, formula in formulas.items():
        if name not in _filed:
            _filed.add(name)
            register_flop_formula(getattr(torch.ops.memarch, name))(formula)
    ours = ("", sdpa_flop), ("_backward", sdpa_backward_flop)
    for suffix, formula in ours:  # torch 2.13 knows attention's count on every device but the CPU
        op = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")
        if op not in flop_registry:
            flop_registry[op] = formula


def file_if_light(formulas: Mapping[str, Callable[..., int]]) -> None:
    if "torch.utils.flop_counter" in sys.modules:
        file(formulas)


def flop_counter(formulas: Mapping[str, Callable[..., int]], **options: Any) -> Any:
    file(formulas)
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False, **options)
