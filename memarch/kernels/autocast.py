"""Autocast reaches into a custom operator and would run its matrix products in bfloat16, state and triangular solve included."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def exact(fn: Callable[..., R]) -> Callable[..., R]:
    """The function computes in the dtypes it was written for, also inside `torch.autocast`. Its first argument is a tensor."""

    @functools.wraps(fn)
    def inner(x: Tensor, *args: Any) -> R:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return fn(x, *args)
        with torch.autocast(kind, enabled=False):
            return fn(x, *args)

    return inner
