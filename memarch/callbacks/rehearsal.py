"""Run a training step to look at it. Afterwards everything is as it was: weights, gradients, buffers, random numbers, what the task remembers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


@contextmanager
def rehearsal(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, call `module.training_step`. A compiled function runs as plain Python, so hooks and counters see every module and operator."""
    attributes, logs = dict(vars(module)), {"log": silent, "log_dict": silent}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    counts = [(usage, usage.mass) for usage in getattr(module, "uses", ())]  # of rows that were read
    cards = [module.device] if module.device.type == "cuda" else []
    vars(module).update(logs)
    for parameter, _ in grads:
        parameter.grad = None
    for usage, _ in counts:
        usage.mass = None
    try:
        with torch.random.fork_rng(cards), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
            yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, grad in grads:
            parameter.grad = grad
        for usage, mass in counts:
            usage.mass = mass


def loss_of(output: Any) -> Tensor:
    """What a training_step may return: the loss, or a mapping that holds it."""
    return output if isinstance(output, Tensor) else output["loss"]


def silent(*args: Any, **kwargs: Any) -> None:
    pass
