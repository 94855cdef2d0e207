"""What a training run does besides learning: it shows how far it is, writes down what happens, survives NaN, and can be killed.

    callbacks = default_callbacks(run_dir)
    trainer = Trainer(callbacks=callbacks, max_steps=500, check_val_every_n_epoch=None, val_check_interval=100, log_every_n_steps=10, logger=False)
    trainer.fit(task, data, ckpt_path=latest(run_dir))  # None for a new folder, and then it begins

Nothing else is needed. No plugin: Checkpoints puts the atomic writer in place of Lightning's. Leave `enable_checkpointing` and
`enable_progress_bar` as they are (true): Lightning adds its own only where a run has none, and refuses false beside ours.
`gradient_clip_val` stays unset: the task clips. A second logger is `Trainer(logger=logger("tensorboard", run_dir, step))`.

What callbacks expect of a LightningModule: `self.log` of "train/loss", "train/accuracy" or "train/bits", "grad_norm", and "val/..." (without
prog_bar, which makes Lightning wait for the device at every step). A state carried from batch to batch, if any, is `self.carried`. Gradient
norms that `configure_gradient_clipping` takes anyway are left in `self.norms`, name -> norm, and then not taken twice.
What they expect of the data: `datamodule.start_step`, read when the training loader is made.
"""

from pathlib import Path

from lightning.pytorch import Callback

from memarch.callbacks.checkpoint import Checkpoints, Stopped
from memarch.callbacks.files import AtomicIO, latest, step_of
from memarch.callbacks.guard import Guard, NonFinite
from memarch.callbacks.loggers import logger
from memarch.callbacks.metrics import Metrics
from memarch.callbacks.progress import Bar

__all__ = ["AtomicIO", "Bar", "Checkpoints", "Guard", "Metrics", "NonFinite", "Stopped", "default_callbacks", "latest", "logger", "step_of"]


def default_callbacks(
    run_dir: str | Path,
    *,
    save_every: int | None = 1000,
    save_minutes: float | None = 10.0,
    keep: int = 2,
    patience: int = 5,
    flops: bool = True,
    bar: bool = True,
) -> list[Callback]:
    """All of them, in the order they must be called in: the row of a step is written before the checkpoint that says the step is done.

    save_every, save_minutes: a checkpoint every so many steps, and at least so often. keep: the newest checkpoints that stay. patience: bad
    steps in a row that end the run. flops: measure FLOPs once per shape of batch. bar: show progress."""
    found: list[Callback] = [Guard(patience), Metrics(run_dir, flops)]
    return [*found, *([Bar()] if bar else []), Checkpoints(run_dir, save_every, save_minutes, keep)]
