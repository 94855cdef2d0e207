"""A run that is killed and started again ends with the weights of one that never was.

Checkpoints are taken between two steps: the step before is over, its validation and its row in metrics.csv included, and the next batch has
not been looked at. (Lightning's own callback saves before the validation of a step, which a resumed run then leaves out.) What Lightning
does not save is added: how many micro-batches are consumed, which is where the data go on (`datamodule.start_step`), and the state of the
random generators of every process. docs/resume.md says the same for users.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from memarch.callbacks.files import AtomicIO, keep, latest, place, sweep
from memarch.callbacks.metrics import pause
from memarch.callbacks.together import anywhere, everyone, find
from memarch.config import ConfigError, encode

KEY = "memarch"  # our part of the checkpoint


class Stopped(SystemExit):
    """A signal ended the run between two steps. The exit status is 128 + its number (143 for SIGTERM, 130 for SIGINT), so that a scheduler
    does not take an unfinished run for a finished one."""


class Checkpoints(Checkpoint):
    """run_dir: checkpoints/ is in it. every: steps between two checkpoints; None: none by steps. minutes: and at least this often; None: never
    by time. keep: how many of the newest stay on disk. One more is taken at the end of a run and on SIGTERM or SIGINT."""

    def __init__(self, run_dir: str | os.PathLike[str], every: int | None = 1000, minutes: float | None = 10.0, keep: int = 2):
        for name, value in (("every", every), ("minutes", minutes), ("keep", keep)):
            if value is not None and value <= 0:
                raise ValueError(f"checkpoints: {name} = {value}: must be above 0" + ("." if name == "keep" else ", or null for never."))
        self.run_dir, self.every, self.minutes, self.keep = os.fspath(run_dir), every, minutes, keep
        self.batches = 0  # micro-batches consumed
        self.step = 0  # the last boundary between two steps that was dealt with
        self.saved = -1  # the last step that has a checkpoint
        self.clock = time.monotonic()
        self.random: dict[str, Any] | None = None  # to be put back before the first batch of a resumed run
        self.signal: int | None = None
        self.running = False

    # ---------------------------------------------------------------------------------------------- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicIO(lambda checkpoint: same_model(checkpoint, pl_module))
        if stage == "fit" and trainer.is_global_zero:
            sweep(self.run_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.clock, self.signal, self.running = trainer.global_step, time.monotonic(), None, True
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's handler, which lets a step be the last but saves nothing and exits with status 0. At the end, also after
            # an error, Lightning puts back what was there before the run.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.receive)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The end of one step is the beginning of the next: Lightning has no hook between a step's validation and the next batch."""
        if self.random is not None:
            restore(self.random)
            # Lightning counts a step again when it resumes one whose validation is over. Loggers take their step from this.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self.random = None
        if trainer.global_step == self.step:
            return  # between micro-batches
        self.step = trainer.global_step
        stop, due = anywhere(pl_module.device, self.signal is not None, self.due(trainer))
        if stop or due:
            self.save(trainer)
        if stop:
            raise Stopped(128 + (self.signal or signal.SIGTERM))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.saved != trainer.global_step:
            self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.running and (path := latest(self.run_dir)):
            why = "Stopped by a signal" if isinstance(exception, Stopped) else "Training failed"
            tell(trainer, f"{why} at step {trainer.global_step}. --resume {self.run_dir} goes on from {path.name}.")

    def due(self, trainer: Trainer) -> bool:
        by_time = self.minutes is not None and trainer.is_global_zero and time.monotonic() - self.clock >= 60 * self.minutes
        return by_time or (self.every is not None and trainer.global_step % self.every == 0)

    def save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial, which nobody wants to go on from
        with pause(trainer):
            trainer.save_checkpoint(place(self.run_dir, trainer.global_step), weights_only=False)
        self.saved, self.clock = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            keep(self.run_dir, self.keep)

    # ---------------------------------------------------------------------------------------------- what

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {
            "batches": self.batches,
            "data": json.dumps(data_of(trainer)),
            "random": everyone(random_state(pl_module.device)),
            "stopped": trainer.should_stop,  # at the end of a run: it was asked to end before its last step
        }
        settle(checkpoint["loops"]["fit_loop"], endless=trainer.num_training_batches == float("inf"))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if KEY not in checkpoint:
            raise ValueError("this checkpoint was not written by memarch.callbacks.Checkpoints: it does not say where in the data the run stood.")
        same_data(checkpoint, trainer)
        same_tables(checkpoint, pl_module)
        self.batches, self.saved = checkpoint[KEY]["batches"], checkpoint["global_step"]
        states = checkpoint[KEY]["random"]
        self.random = states[trainer.global_rank] if trainer.global_rank < len(states) else {}  # a process that was not there has its seed
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "start_step"):
            data.start_step = self.batches
        else:
            rank_zero_warn(f"this run resumes after {self.batches} batches, but its data cannot begin there (no `start_step`): they are seen again.")
        if 0 <= trainer.max_steps <= self.saved:
            tell(trainer, f"This run is finished: {self.saved} of {trainer.max_steps} steps are done. A larger trainer.max_steps goes on from here.")
        elif checkpoint[KEY]["stopped"] and find(trainer, EarlyStopping):
            trainer.should_stop = True
            tell(trainer, f"This run is finished: it stopped early, at step {self.saved}. Without the early stop it goes on from here.")

    # ---------------------------------------------------------------------------------------------- signals

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Printing could meet a print that it has interrupted; os.write cannot."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C (again) stops at once, without.\n")


def tell(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, flush=True)


def settle(fit: dict[str, Any], endless: bool) -> None:
    """What Lightning has counted, as it stands between two steps: begun batches are forgotten, and an endless epoch never ends. Resumed from
    anything else, Lightning would skip the next batch, count a step twice, or begin another epoch."""
    batches = fit["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        done = counts["processed"]
        counts |= {"ready": done, "started": done, "completed": done}
    if endless:
        batches["is_last_batch"] = False
        for counts in (fit["epoch_progress"]["total"], fit["epoch_progress"]["current"]):
            counts |= {"processed": counts["started"] - 1, "completed": counts["started"] - 1}


# ------------------------------------------------------------------------------------------------ the same run?


def same_model(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Weights of another shape fail to load with a list of sizes; another window or decay would load and go on as a different model."""
    config = getattr(getattr(module, "model", None), "config", None)
    if "config" in checkpoint and config is not None:
        refuse("model", json.loads(checkpoint["config"]), json.loads(json.dumps(encode(config))))


def same_data(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    refuse("data", json.loads(checkpoint[KEY]["data"]), json.loads(json.dumps(data_of(trainer))))


def same_tables(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Dense, lazy and row are three optimisers, and each would take the moments of another as they are."""
    now = getattr(getattr(module, "optim", None), "tables", None)
    for group in (group for state in checkpoint["optimizer_states"] for group in state["param_groups"]):
        if now is not None and group.get("name") == "tables":
            refuse("optim", {"tables": group.get("tables", "dense")}, {"tables": now})


def data_of(trainer: Trainer) -> dict[str, Any]:
    """What decides which batch comes when. Text is known by its content: it may move to another folder, and must not change in its own."""
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "start_step"):
        return {}
    train = encode(data.train)
    if hasattr(data.train, "fingerprint"):
        train = {**{key: value for key, value in train.items() if key != "path"}, "fingerprint": data.train.fingerprint}
    return {"train": train, "batch_size": data.batch_size, "seed": data.seed}


def refuse(what: str, then: Any, now: Any) -> None:
    found = list(differences(what, then, now))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ConfigError(
            f"the checkpoint belongs to another {what}: {'; '.join(found[:3])}{more}. A run is resumed with the config it began with; "
            "to train something else, begin a new run."
        )


def differences(path: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(f"{path}.{key}", then.get(key), now.get(key))
    elif then != now:
        yield f"{path} was {json.dumps(then)} and is {json.dumps(now)}"


# ------------------------------------------------------------------------------------------------ random numbers


def random_state(device: torch.device) -> dict[str, Any]:
    """Of this process. As tensors, numbers and tuples of them, which is all that a checkpoint may hold."""
    legacy: Any = np.random.get_state()  # noqa: NPY002 the global one, which others may use
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (legacy[0], legacy[1].tolist(), *legacy[2:])}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(state: Mapping[str, Any]) -> None:
    if state:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
