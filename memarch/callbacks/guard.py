"""A step whose loss or gradient is not finite does not happen.

Weights, optimiser state and the carried state stay what they were before it; the step counts (the data are consumed, the learning rate moves
on) and is logged as `skipped`. A few of them are bad luck. `patience` in a row are a fault, and training stops with the name of the layer.

The verdict costs the one wait for the device that this package makes per optimiser step: loss and gradient norm travel to the host together.
With several processes both are summed over them first, so all decide alike.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from memarch.callbacks.blame import blame
from memarch.callbacks.together import total


class NonFinite(RuntimeError):
    """Training met NaN or infinity `patience` times in a row."""


class Guard(Callback):
    """patience: how many bad steps in a row end the run.

    A task that measures its gradients anyway says so by `self.norms`, a mapping of name -> norm that `configure_gradient_clipping` sets; then
    the gradients are not read a second time."""

    def __init__(self, patience: int = 5):
        if patience < 1:
            raise ValueError(f"patience = {patience}: it counts bad steps in a row, so it must be at least 1.")
        self.patience = patience
        self.skipped = self.row = 0  # in all; in a row until now
        self.norm = 0.0  # of the last step, before clipping
        self.loss: Tensor | None = None  # summed over the micro-batches of this step
        self.batches: list[tuple[Any, int]] = []  # of this step
        self.carried: Any = None  # the task's state before it

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "row": self.row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.row = state_dict["skipped"], state_dict["row"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between clipping and the optimiser's step Lightning has no hook, so the last thing before the step is extended."""
        module: Any = pl_module
        clip = module.configure_gradient_clipping

        def clip_and_judge(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norm = None if hasattr(module, "norms") else gradient_norm(optimizer)
            clip(optimizer, *args, **kwargs)
            self.judge(trainer, module, optimizer, combined(module.norms) if norm is None else norm)

        vars(module)["configure_gradient_clipping"] = clip_and_judge

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop("configure_gradient_clipping", None)
        self.loss, self.batches, self.carried = None, [], None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # after an error Lightning does not

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.batches:
            self.carried = getattr(pl_module, "carried", None)
        self.batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def judge(self, trainer: Trainer, module: LightningModule, optimizer: Any, norm: Tensor) -> None:
        assert self.loss is not None
        values = total(torch.stack([self.loss.to(torch.float32), norm.to(torch.float32)]))  # what the host waits for
        loss, self.norm = (value / trainer.world_size for value in values.tolist())
        # fp16 finds its loss scale by running into infinite gradients, and its scaler skips those steps itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if math.isfinite(loss) and (math.isfinite(self.norm) or scaled):
            self.row = 0
        else:
            self.skip(trainer, module, optimizer, loss)
        self.loss, self.batches, self.carried = None, [], None

    def skip(self, trainer: Trainer, module: LightningModule, optimizer: Any, loss: float) -> None:
        self.skipped, self.row = self.skipped + 1, self.row + 1
        if self.row >= self.patience:
            raise NonFinite(self.verdict(trainer, module, optimizer, loss))
        for parameter in parameters(optimizer):
            parameter.grad = None  # an optimiser leaves alone what has no gradient
        if hasattr(module, "carried"):
            module.carried = self.carried

    def verdict(self, trainer: Trainer, module: LightningModule, optimizer: Any, loss: float) -> str:
        rate = max(group["lr"] for group in optimizer.param_groups)
        return (
            f"loss {loss:g} and gradient norm {self.norm:g} at step {trainer.global_step + 1}: not finite for {self.row} steps in a row "
            f"(skipped in all: {self.skipped}). The weights are those before the first of them.\n"
            f"{blame(trainer, module, self.batches, self.carried)}\n"
            f"What helps most often: a lower learning rate (now {rate:g}), a longer warm-up, a smaller gradient clip; bf16 rather than fp16. "
            "If it happens at once, look at the data and the initialisation."
        )


def combined(norms: Mapping[str, Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def parameters(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def gradient_norm(optimizer: Any) -> Tensor:
    """One pass over all gradients, the rows of sparse ones and the shards of distributed ones included."""
    grads = [parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters(optimizer)[0].device)
    norm = torch.nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
