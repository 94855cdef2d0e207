"""What processes of one run must settle together, and how callbacks find each other."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

Kind = TypeVar("Kind", bound=Callback)


def find(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The run's callback of this kind, if it has one: each of them works without the others."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def told(trainer: Trainer, step: int) -> bool:
    """Whether the task logs this step, the first being 1: then its numbers are those of the step, else of an earlier one."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (every > 0 and step % every == 0) or step in (1, trainer.max_steps)


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(values: Tensor) -> Tensor:
    """The sum over processes. NaN and infinity survive a sum, so what is bad on one is bad on all."""
    if several():
        dist.all_reduce(values)
    return values


def anywhere(device: torch.device, *flags: bool) -> list[bool]:
    """Which flags are up on at least one process. Alone it costs nothing; else one small reduction that the host waits for."""
    if not several():
        return list(flags)
    return [count > 0 for count in total(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def everyone(value: Any) -> list[Any]:
    """The values of all processes, in order of rank."""
    if not several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
