"""Mixer wrappers: each takes a sequence mixer (a backbone is one) and is one, so wrappers nest."""

from typing import Any, Union

from memarch.wrappers.hiss import HiSS, HiSSConfig, LowConfig
from memarch.wrappers.rmt import RMT, RMTConfig

WRAPPERS = {
    "hiss": HiSSConfig,
    "rmt": RMTConfig,
}

WrapperConfig: Any = Union[tuple(WRAPPERS.values())]

__all__ = ["RMT", "WRAPPERS", "HiSS", "HiSSConfig", "LowConfig", "RMTConfig", "WrapperConfig"]
