"""Which implementation of an op runs here, and why.

Every op folder has the public function, the dict IMPLEMENTATIONS, `why_not(name, ...)` (None, or why that implementation cannot run) and
`pick(...)`, both pure: what they need to know about the machine comes in as a `Machine`. Nothing is chosen by catching an exception.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Version = tuple[int, ...]
NOT_BUILT = "not built: run memarch warmup"


class Machine(NamedTuple):
    """What `pick` may know about the machine beyond device, dtype and shape."""

    triton: str | None = None  # its version, when installed
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device
    flash: str | None = "flash-attn needs a CUDA device"  # why flash-attn cannot be used, or None when it can
    mamba: str | None = "mamba-ssm needs a CUDA device"  # the same of mamba-ssm
    interpreted: bool = False  # TRITON_INTERPRET=1: Triton kernels run on a CPU, slowly and only when forced
    cpp: str | None = NOT_BUILT  # why the C++ kernels for the CPU cannot be used, or None when they can


class Choice(NamedTuple):
    name: str
    reason: str


NO_GPU = Machine()
_machines: dict[str, Machine] = {}
_forced: dict[str, str] = {}  # op name, or "*" for every op -> implementation


def machine(device_type: str) -> Machine:
    """The facts about this machine. Those of a CUDA device are gathered once; a CPU has Triton's interpreter, which is for tests, and our C++."""
    if device_type == "cuda":
        return _look()
    from memarch.kernels import native

    return Machine(interpreted=_interpreted(), cpp=native.why_not())


def _look() -> Machine:
    if "cuda" not in _machines:
        from memarch.kernels.attention import flash_impl
        from memarch.kernels.selective_scan import mamba_impl

        triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
        _machines["cuda"] = Machine(triton, torch.cuda.get_device_capability(), flash_impl.probe().reason, mamba_impl.probe().reason)
    return _machines["cuda"]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# What torch.compiler.assume_constant_result sets; calling that would import dynamo, and triton with it.
_look._dynamo_marked_constant = _interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def version(text: str) -> Version:
    """`"3.7.1+git12"` -> (3, 7, 1)."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def known_bad(capability: tuple[int, int] | None, triton_version: str | None) -> str | None:
    """Why a Triton kernel must not be trusted on this pair, or None. On Hopper `tl.dot(tl.trans(x), .)` with x from earlier dots gives
    wrong gradients (flash-linear-attention: pull request 983, issue 984)."""
    if capability is None or triton_version is None or capability[0] != 9:
        return None
    if (3, 4, 0) <= version(triton_version) < (3, 7, 1):
        return (
            f"triton {triton_version} on Hopper gives wrong gradients for tl.dot(tl.trans(x), .) "
            "(flash-linear-attention PR 983, issue 984): use triton >= 3.7.1, or < 3.4"
        )
    return None


def triton_cannot(device_type: str, here: Machine, transposes: bool = True) -> str | None:
    """What keeps a Triton kernel from running; an op adds its own conditions on dtype and shape. `transposes`: the kernel has a `tl.trans`
    of what a dot made, which the known bad pairs get wrong."""
    if device_type != "cuda":
        return None if here.interpreted else f"no GPU: the tensors are on {device_type}"
    if here.triton is None:
        return "triton is not installed"
    return known_bad(here.capability, here.triton) if transposes else None


@contextmanager
def using(impl: str | None = None, /, **ops: str) -> Iterator[None]:
    """Force an implementation: `using("reference")` for every op, `using(delta_rule="torch")` for one. Holds for the whole process (also
    for the other threads), so it is meant for tests and benchmarks."""
    before = dict(_forced)
    _forced.update(ops if impl is None else {"*": impl, **ops})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced() -> bool:
    """Is any implementation forced?"""
    return bool(_forced)


def first(order: Sequence[tuple[str, str]], why_not: Callable[[str], str | None]) -> Choice:
    """The first implementation of `order` (name, what speaks for it) that can run, with what kept the better ones away."""
    kept_away: list[str] = []
    for name, reason in order:
        why = why_not(name)
        if why is None:
            return Choice(name, "; ".join([reason, *kept_away]))
        kept_away.append(f"{name}: {why}")
    raise ValueError("no implementation can run here. " + "; ".join(kept_away))


def settle(op: str, known: Mapping[str, Any], impl: str | None, why_not: Callable[[str], str | None], pick: Callable[[], Choice]) -> str:
    """The name of the implementation to run: the forced one, checked, or the picked one."""
    name = impl or _forced.get(op) or _forced.get("*")
    if name is None:
        return pick().name
    if name not in known:
        raise ValueError(f"{op} has no implementation {name!r}; known: {', '.join(known)}")
    why = why_not(name)
    if why is not None:
        raise ValueError(f"{op}: implementation {name!r} cannot run here: {why}. Pass impl=None to let the library choose.")
    return name
