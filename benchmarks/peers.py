"""What others publish for the same computation, wherever it is installed: pip install -r benchmarks/requirements.txt. A peer that is absent is
named and left out; a row without any is a row against plain torch."""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable

from torch import Tensor

Call = Callable[..., Tensor]
absent: set[str] = set()


def fla(module: str, name: str, call: Callable[[Callable], Call]) -> dict[str, Call]:
    """A reference form of flash-linear-attention, called as our op is: {} where the package is absent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that a CPU has no Triton
            found = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
    except ImportError:
        absent.add("flash-linear-attention")
        return {}
    return {f"fla {importlib.metadata.version('fla-core')} {name}": call(found)}


def heads_first(*xs: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in xs]
