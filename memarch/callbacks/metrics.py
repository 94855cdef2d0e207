"""What is written down about a run: a row in metrics.csv every `trainer.log_every_n_steps` steps, one for the first and the last, and one
for every validation.

| column           | what it is                                                                                     |
| ---------------- | ---------------------------------------------------------------------------------------------- |
| step, tokens     | optimiser steps done, and positions they took in (padding included), over processes and resumes |
| seconds          | time spent training so far, without validation and saving                                      |
| train/..., val/..., grad_norm | whatever the task logs; of that step alone, not averaged over the interval        |
| lr, or lr/GROUP  | the rate that step was taken with                                                              |
| tokens_per_s     | of all processes together, since the row before; the first step after a start is left out      |
| step_ms          | the same time, by optimiser step                                                               |
| tflops, mfu      | per device; mfu only where the device's peak is known (flops.py)                               |
| peak_memory_gib  | the most this process has held: allocated on the GPU, else resident                            |
| skipped          | steps the guard has skipped so far                                                             |

The same numbers go to trainer.logger. Between logging steps nothing here waits for the device.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memarch.callbacks.flops import count, device_peak
from memarch.callbacks.guard import Guard
from memarch.callbacks.table import Table, Value
from memarch.callbacks.together import find, several, told

FILE = "metrics.csv"


class Metrics(Callback):
    """run_dir: where metrics.csv is. flops: measure what a step computes, which takes one more step's time for every new shape of batch."""

    def __init__(self, run_dir: str | Path, flops: bool = True):
        self.path, self.measure = Path(run_dir) / FILE, flops
        self.step = self.tokens = 0
        self.before = 0.0  # seconds of training until this window began
        self.window = Window(warm=False)
        self.rates: dict[str, float] = {}  # speeds, as last measured
        self.lr: dict[str, float] = {}
        self.shape: tuple[torch.Size, ...] = ()  # of the batch at hand
        self.work: dict[tuple[torch.Size, ...], int | None] = {}  # FLOPs of forward and backward, by shape of batch
        self.table: Table | None = None  # on the first process only
        self.ours: set[str] = set()  # what was logged from here, and is not the task's
        self.row: dict[str, Value] = {}  # waits until its step is over, validation included

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.before + self.window.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.before = state_dict["tokens"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.row, self.window = trainer.global_step, {}, Window(warm=False)
        if trainer.is_global_zero:
            self.table = Table(self.path, last=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.write()
        # Several processes count together or not at all, for a step may hold collectives; only the first batch is sure to be new to all of them.
        self.shape = shapes(batch)
        if self.measure and self.shape not in self.work and not (self.work and several()):
            with pause(trainer):
                self.work[self.shape] = count(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        groups = optimizer.param_groups
        self.lr = {f"lr/{group.get('name', i)}" if len(groups) > 1 else "lr": float(group["lr"]) for i, group in enumerate(groups)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens, step = positions(self.shape) * trainer.world_size, trainer.global_step
        self.tokens += tokens
        self.window.add(tokens, self.work.get(self.shape))
        if step == self.step:
            return  # more micro-batches of this step are to come
        self.step = step
        self.window.steps += 1
        if told(trainer, step):
            self.take(trainer, pl_module)
        elif not self.window.warm:
            self.turn()

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """The row of this step. Turning what the task logged into numbers waits for the device, so it comes before the clock is read."""
        logged = trainer.logged_metrics.items()
        seen: dict[str, Value] = {name: float(value) for name, value in logged if not name.startswith("val") and name not in self.ours}
        if self.window.warm:
            self.rates = self.window.rates(device_peak(trainer))
        self.turn()
        own: dict[str, Value] = {**self.lr, **self.rates, **peak_memory(module.device)}
        if guard := find(trainer, Guard):
            own |= {"skipped": guard.skipped} | ({} if "grad_norm" in seen else {"grad_norm": guard.norm})
        if trainer.loggers:
            module.log_dict(own)  # type: ignore[arg-type]  # Lightning sends them on together with what the task logs
            self.ours = set(own)
        self.row = {"step": self.step, "tokens": self.tokens, "seconds": self.before} | seen | own

    def turn(self) -> None:
        self.before += self.window.elapsed()
        self.window = Window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.window.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.window.go()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.row = self.row or {"step": self.step, "tokens": self.tokens, "seconds": self.before + self.window.elapsed()}
            self.row |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.write()

    def write(self) -> None:
        if self.row and self.table:
            self.table.add(self.row)
        self.row = {}


class Window:
    """Time and work since the last row, without pauses. Cold is the first step of a process, which compiles and warms up: no measure of speed."""

    def __init__(self, warm: bool = True):
        self.warm = warm
        self.tokens = self.steps = 0
        self.flops: int | None = 0
        self.began = time.perf_counter()
        self.stopped: float | None = None

    def add(self, tokens: int, flops: int | None) -> None:
        self.tokens += tokens
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    def stop(self) -> None:
        self.stopped = time.perf_counter()

    def go(self) -> None:
        self.began += time.perf_counter() - (self.stopped or time.perf_counter())
        self.stopped = None

    def elapsed(self) -> float:
        return (self.stopped or time.perf_counter()) - self.began

    def rates(self, peak: float | None) -> dict[str, float]:
        elapsed = max(self.elapsed(), 1e-9)
        found = {"tokens_per_s": self.tokens / elapsed, "step_ms": 1e3 * elapsed / max(1, self.steps)}
        if self.flops:
            found["tflops"] = self.flops / elapsed / 1e12
            if peak:
                found["mfu"] = self.flops / elapsed / peak
        return found


@contextmanager
def pause(trainer: Trainer) -> Iterator[None]:
    """What happens inside is not training and does not count against its speed."""
    metrics = find(trainer, Metrics)
    if metrics:
        metrics.window.stop()
    try:
        yield
    finally:
        if metrics:
            metrics.window.go()


def shapes(batch: Any) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in tree_leaves(batch) if isinstance(x, Tensor))


def positions(shape: tuple[torch.Size, ...]) -> int:
    """A batch begins with tokens [B, T] or continuous inputs [B, T, C]: B times T. What has no time counts by rows."""
    return math.prod(shape[0][:2])


def peak_memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    if sys.platform == "win32":
        return {}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
