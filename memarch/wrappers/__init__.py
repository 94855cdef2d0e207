"""Mixer wrappers: each takes a sequence mixer (a backbone is one) and is one, so wrappers nest."""

from typing import Any, Union

from memarch.wrappers.rmt import RMT, RMTConfig

WRAPPERS = {
    "rmt": RMTConfig,
}

WrapperConfig: Any = Union[tuple(WRAPPERS.values())]

__all__ = ["RMT", "WRAPPERS", "RMTConfig", "WrapperConfig"]
