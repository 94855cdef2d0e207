"""The one LightningModule: a model, its loss and its optimiser. What is learned is decided elsewhere.

    training loss = sum(loss) / sum(count) + the model's auxiliary losses, averaged over micro-batches and processes by count

The sums run over all processes and all micro-batches of one optimiser step, so a run means the same however its batch is divided. (A mean of
means would weigh a micro-batch with few targets as much as one with many.) How many targets a step will have is known at its end; until then
losses are divided by a guess, `unit`, made of its first micro-batch, and the gradients are put right when they are clipped.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from memarch import optim as optimisers
from memarch import state as states
from memarch.config import ConfigError, encode
from memarch.contracts import LossOutput, State
from memarch.data.batch import Batch
from memarch.data.packed import Packed
from memarch.layers.parts.pool import readers, watch
from memarch.layers.parts.usage import Usage
from memarch.models.lm import LM, LMConfig
from memarch.optim import OptimConfig


class Task(LightningModule):
    """A model in training.

    Args:
        model: a config, built here from `seed`, or a model
        optim: the optimiser
        carry: truncated backpropagation through time: the state after a batch, detached, is where the next batch begins
        compile: torch.compile the loss
        recompute: keep the inputs of blocks only and compute the rest again in the backward
        seed: of the weights
    """

    def __init__(
        self,
        model: LMConfig | LM,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 frozen
        *,
        carry: bool = False,
        compile: bool = False,
        recompute: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model if isinstance(model, LM) else LM(model, seed=seed)
        if recompute:
            self.model.core.recompute = True
        self.optim, self.carry = optim, carry
        lazy = [] if optim.tables == "dense" else optimisers.table_names(self)
        if compile and lazy:
            raise ConfigError(f"compiled code makes no row-sparse gradients, as optim.tables {optim.tables} needs: set task.compile false, or tables dense.")
        self._ddp_params_and_buffers_to_ignore = lazy  # DDP has none either: here they are averaged, before they are clipped
        # A compiled function, not a compiled module: names of parameters stay as they are.
        self.loss = torch.compile(self.model.loss) if compile else self.model.loss
        self.carried: State | None = None  # [rows of this process, ...], only with carry
        self.sums: Tensor | None = None  # loss, correct, count since the last optimiser step
        self.unit: Tensor | None = None  # targets a process has in a micro-batch, by the first of this step
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients, by group
        self.uses: list[Usage] = []  # of the layers that read tables, while they train
        self.val_carried: State | None = None
        self.val_sums: Tensor | None = None

    def forward(self, tokens: Tensor, state: State | None = None) -> Any:
        return self.model(tokens, state)

    def setup(self, stage: str) -> None:
        self.carried = self.sums = self.unit = None
        self.uses = watch(self.model) if stage == "fit" else []

    def teardown(self, stage: str) -> None:
        for reader in readers(self.model):
            reader.usage = None

    # ---------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Batch, index: int) -> Tensor:
        for usage in self.uses:
            usage.due = self.telling and self.sums is None  # once in a step
        out = self.loss(batch.tokens, batch.targets, self.carried, starts=batch.starts, lengths=batch.lengths)
        if self.carry:
            self.carried = states.detach(out.state)
        mine = totals(out)
        if self.sums is None or self.unit is None:
            self.unit = self.all_sum(mine[2]).clamp(min=1) / self.trainer.world_size
        self.sums = mine if self.sums is None else self.sums + mine
        self.gauges(out.aux)
        extra = [value for name, value in out.aux.items() if name.startswith("loss/")]
        return out.loss / self.unit + (torch.stack(extra).sum() * (mine[2] / self.unit) if extra else 0)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Called once per optimiser step, when all gradients are there: puts the guessed count right, clips, and logs what the step saw."""
        if gradient_clip_val is not None:
            raise ConfigError("trainer.gradient_clip_val would clip value tables and dense weights by one norm; set optim.clip instead.")
        assert self.sums is not None and self.unit is not None
        micro, told = self.trainer.accumulate_grad_batches, self.telling
        sums = self.all_sum(self.sums) if told or micro > 1 else self.sums
        # DDP has divided by the processes and Lightning by the micro-batches. With one micro-batch the guess was right.
        scale = 1.0 if micro == 1 else self.unit * self.trainer.world_size * micro / sums[2].clamp(min=1)
        self.sums = self.unit = None
        optimisers.average(optimizer)
        tables = {f"grad_norm/{name}": norm * scale for name, norm in optimisers.table_norms(self.model).items()} if told else {}
        norms = self.norms = optimisers.clip(optimizer, self.optim.clip, scale)  # the guard reads them
        if told:
            self.log_dict(self.report("train", sums) | {"grad_norm" if name == "rest" else f"grad_norm/{name}": norm for name, norm in norms.items()} | tables)

    @property
    def telling(self) -> bool:
        """Whether this step is logged. Lightning takes a millisecond to note three numbers, whether anybody reads them or not."""
        step = self.trainer.global_step + 1
        return step % self.trainer.log_every_n_steps == 0 or step in (1, self.trainer.max_steps)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        steps = self.trainer.max_steps
        optimizer, schedule = optimisers.build(self.model, self.optim, steps if steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.val_carried = self.val_sums = None

    def validation_step(self, batch: Batch, index: int) -> None:
        out = self.loss(batch.tokens, batch.targets, self.val_carried, starts=batch.starts, lengths=batch.lengths)
        self.val_carried = out.state if self.carry else None
        self.val_sums = totals(out) if self.val_sums is None else self.val_sums + totals(out)

    def on_validation_epoch_end(self) -> None:
        assert self.val_sums is not None
        sums, self.val_carried, self.val_sums = self.all_sum(self.val_sums), None, None
        self.log_dict(self.report("val", sums))

    def all_sum(self, values: Tensor) -> Tensor:
        """Over processes. The reduction works in place, so it gets a copy."""
        found = self.trainer.strategy.reduce(values.clone(), reduce_op="sum")
        assert isinstance(found, Tensor)
        return found

    # ---------------------------------------------------------------------------------------------- reports

    def report(self, where: str, sums: Tensor) -> dict[str, Tensor]:
        """Means per target. Text has bits per token, which are bits per byte when the tokens are bytes."""
        loss, correct, count = sums.unbind()
        count = count.clamp(min=1)
        found = {f"{where}/loss": loss / count}
        if self.model.config.head == "tokens":
            found[f"{where}/accuracy"] = correct / count
        if isinstance(getattr(getattr(self.trainer, "datamodule", None), "train", None), Packed):
            found[f"{where}/bits"] = loss / count / math.log(2)
        return found

    def gauges(self, aux: Mapping[str, Tensor]) -> None:
        """Of the last micro-batch of this process: what a layer reports about itself is looked at, not averaged."""
        if aux and self.telling:
            self.log_dict({f"train/{name}": value.detach() for name, value in aux.items()})

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The config travels with the weights. A carried state is saved with the rows of all processes, as plain tensors by name."""
        checkpoint["config"] = json.dumps(encode(self.model.config))
        checkpoint["usage"] = [usage.mass for usage in self.uses]
        checkpoint["carried"] = {} if self.carried is None else {name: self.all_rows(leaf) for name, leaf in states.leaves(self.carried)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for usage, mass in zip(self.uses, checkpoint.get("usage", ()), strict=False):
            usage.mass = mass
        found = checkpoint.get("carried") or {}
        if self.carry and found:
            names = iter(name for name, _ in states.leaves(self.model.start(1)))
            self.carried = states.tree(lambda _: self.my_rows(found[next(names)]), self.model.start(1))

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            for name in self._ddp_params_and_buffers_to_ignore:
                torch.distributed.broadcast(self.get_parameter(name).data, 0)  # as DDP does with all others
        if self.carried is not None:
            self.carried = states.to(self.carried, self.device)

    def all_rows(self, leaf: Tensor) -> Tensor:
        """Processes hold consecutive rows of the global batch, in order of rank."""
        gathered = self.all_gather(leaf)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if gathered.ndim > leaf.ndim else gathered

    def my_rows(self, leaf: Tensor) -> Tensor:
        return leaf.chunk(self.trainer.world_size)[self.trainer.global_rank].clone()


def totals(out: LossOutput) -> Tensor:
    """loss, correct, count as one tensor: one reduction carries all three. fp32 at least; counts are exact up to 2^24."""
    wide = torch.promote_types(out.loss.dtype, torch.float32)
    return torch.stack([out.loss.detach().to(wide), out.correct.to(wide), out.count.to(wide)])
