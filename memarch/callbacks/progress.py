"""How far a run is: a bar on a terminal, plain lines anywhere else.

On a terminal the bar is redrawn at most four times a second, and only then the loss is fetched from the device. In a file or a pipe a line
comes for the first step, for every twentieth of the run, and after ten minutes without one, always at a step that is logged. Only the first
process speaks.
"""

import os
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from memarch.callbacks.metrics import Metrics
from memarch.callbacks.together import find, told

SHOWN = ("loss", "bits", "accuracy")
REDRAW, LINES, SILENCE, WIDE = 0.25, 20, 600.0, 90  # seconds; lines a run; seconds; columns


class Bar(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.live: Progress | None = None  # on a terminal
        self.task = TaskID(0)
        self.total: int | None = None
        self.step = self.first = 0  # the last one seen; where this process began
        self.began = self.spoke = self.validating = 0.0
        self.next = 0  # the step that gets the next line

    def disable(self) -> None:
        """Lightning calls it on every process but the first."""
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total = trainer.max_steps if trainer.max_steps > 0 else None
        self.step = self.first = trainer.global_step
        self.began, self.spoke, self.next = time.monotonic(), 0.0, self.step + 1
        if self.enabled and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            console = Console()
            bar = [BarColumn(bar_width=None)] if console.width >= WIDE else []  # numbers first
            columns = [TextColumn("{task.fields[step]}"), *bar, TextColumn("{task.fields[text]}")]
            self.live = Progress(*columns, console=console, auto_refresh=False, expand=True)
            self.task = self.live.add_task("", total=self.total, completed=self.step, step=f"step {self.step}", text="")
            self.live.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.enabled or trainer.global_step == self.step:
            return
        self.step, now = trainer.global_step, time.monotonic()
        if self.first + 1 == self.step:
            self.began = now  # the first step compiles: it says nothing about the rest
        last = self.step == self.total
        if self.live and (last or now - self.spoke >= REDRAW):
            self.spoke = now
            self.draw(self.text(trainer))
        elif not self.live and told(trainer, self.step) and (last or self.step >= self.next or now - self.spoke >= self.silence()):
            self.spoke = now
            share = max(1, self.total // LINES) if self.total else sys.maxsize
            self.next = (self.step // share + 1) * share
            print(f"step {self.count()}  {self.text(trainer)}", flush=True)

    def draw(self, text: str) -> None:
        if self.live:
            self.live.update(self.task, completed=self.step, step=f"step {self.count()}", text=text, refresh=True)

    def silence(self) -> float:
        return SILENCE if self.total else 10.0

    def count(self) -> str:
        return f"{self.step:>{len(str(self.total))}}/{self.total}" if self.total else str(self.step)

    def text(self, trainer: Trainer) -> str:
        """Where training is and how long it will take."""
        found = [f"{name} {value}" for name, value in values(trainer, "train").items()]
        if metrics := find(trainer, Metrics):
            found.append(f"{short(metrics.tokens)} tokens")
            if rate := metrics.rates.get("tokens_per_s", metrics.window.rates(None)["tokens_per_s"]):
                found.append(f"{short(rate)}/s")
        steps = self.step - self.first - 1
        if self.total and steps > 0:
            found.append(f"ETA {clock((time.monotonic() - self.began) / steps * (self.total - self.step))}")
        return "  ".join(found)

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validating = time.monotonic()
        self.draw("validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        took = time.monotonic() - self.validating
        self.began += took  # ETA is about training
        found = values(trainer, "val")
        if self.enabled and found and not trainer.sanity_checking:
            when = f"step {self.count()}  " if trainer.state.fn == "fit" else ""
            self.print(when + "  ".join(f"val {name} {value}" for name, value in found.items()) + f"  ({took:.1f} s)")
            self.draw(self.text(trainer))

    # ---------------------------------------------------------------------------------------------- the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(self.text(trainer))
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def close(self) -> None:
        if self.live:
            self.live.stop()
        self.live = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Above the bar, where there is one."""
        text = " ".join(map(str, args))
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def values(trainer: Trainer, where: str) -> dict[str, str]:
    """What the task has logged as train/loss and so on; names without a part of their own are training's."""
    logged = trainer.callback_metrics
    found = {name: logged.get(f"{where}/{name}", logged.get(name) if where == "train" else None) for name in SHOWN}
    return {name: f"{float(value):.4g}" if name != "accuracy" else f"{float(value):.3f}" for name, value in found.items() if value is not None}


def short(number: float) -> str:
    """1234567 is 1.23M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def clock(seconds: float) -> str:
    """3725 is 1:02:05."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
