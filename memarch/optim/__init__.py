"""AdamW over groups that account for every trainable parameter exactly once, learning-rate schedules, and clipping.

| group    | what is in it                                                             | decay | learning rate  | clipped |
| -------- | ------------------------------------------------------------------------- | ----- | -------------- | ------- |
| matrices | the `weight` of every linear map, embedding and convolution               | yes   | lr             | together with vectors |
| vectors  | everything else: norms, biases, A_log, dt_bias, memory vectors, sub-keys  | no    | lr             | together with matrices |
| tables   | the rows of value tables (`ValuePool`)                                    | no    | lr x memory_lr | by their own norm |

A parameter decays for what it is, not for its shape: Mamba's A_log [E, N] and RMT's memory [M, D] are two-dimensional, and pulling
them towards zero changes what they mean. A row of a table gets a gradient only when it is read: decay would erase the facts nobody asked
for lately, and the gradient of few rows must not decide how far all other weights move, so tables are clipped alone. Whether a step touches
all rows or those that were read is `OptimConfig.tables`; the latter is in tables.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memarch.config import ConfigError, require
from memarch.layers.parts import ShortConv
from memarch.layers.parts.bank import Bank
from memarch.layers.parts.pool import ValuePool
from memarch.optim.tables import LazyAdamW, average, unique

__all__ = ["LazyAdamW", "OptimConfig", "average", "build", "clip", "factor", "kept", "param_groups", "table_factor", "table_names"]

DECAYS = (nn.Linear, nn.Embedding, nn.Conv1d, ShortConv, Bank)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: the highest learning rate
        betas: AdamW's averages of the gradient and of its square
        eps: AdamW's epsilon
        weight_decay: on matrices only
        tables: what a step does to value tables. dense: AdamW on every row. lazy: only rows that were read move, and only their moments. row: as
            lazy, with one second moment a row, which halves what is kept
        memory_lr: value tables learn at lr times this
        memory_decay: the share of the run over which memory_lr falls, or rises, linearly to 1; null: it stays
        memory_schedule: whether tables follow the schedule, warm-up included, or stay at their rate
        clip: the largest gradient norm, of tables and of all the rest each; null for no clipping
        schedule: how the rate moves after warm-up; wsd is flat and then falls
        warmup: steps over which the rate rises linearly
        decay: the share of the run that wsd's fall takes
        min_lr: where cosine and wsd end, as a share of lr
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    tables: Literal["dense", "lazy", "row"] = "dense"
    memory_lr: float = 1.0
    memory_decay: float | None = None
    memory_schedule: Literal["same", "constant"] = "same"
    clip: float | None = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 100
    decay: float = 0.2
    min_lr: float = 0.1

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr must be above 0, got {self.lr}.")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in 0 .. 1, 1 excluded, got {self.betas}.")
        require(self.eps > 0, f"eps must be above 0, got {self.eps}.")
        require(self.weight_decay >= 0, f"weight_decay must be 0 or more, got {self.weight_decay}.")
        require(self.memory_lr >= 0, f"memory_lr multiplies lr for value tables; it must be 0 or more, got {self.memory_lr}.")
        if self.memory_decay is not None:
            require(0 < self.memory_decay <= 1, f"memory_decay is a share of the run, above 0 and at most 1, got {self.memory_decay}.")
            require(self.memory_lr > 0, "memory_decay leads from memory_lr to 1, and memory_lr 0 is for tables that do not learn; set it above 0.")
        require(self.clip is None or self.clip > 0, f"clip must be above 0, or null for no clipping, got {self.clip}.")
        require(self.warmup >= 0, f"warmup counts steps, 0 for none, got {self.warmup}.")
        require(0 < self.decay <= 1, f"decay is a share of the run, above 0 and at most 1, got {self.decay}.")
        require(0 <= self.min_lr <= 1, f"min_lr is a share of lr, between 0 and 1, got {self.min_lr}.")


# ------------------------------------------------------------------------------------------------ groups


def param_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """What the optimiser takes. A parameter that several modules share (a tied head) is counted once, where it is met first; a frozen one is left out."""
    found: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "tables": []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found[kind_of(module, name)].append(parameter)
    rates = {"matrices": cfg.lr, "vectors": cfg.lr, "tables": cfg.lr * cfg.memory_lr}
    decays = {"matrices": cfg.weight_decay, "vectors": 0.0, "tables": 0.0}
    groups = [{"name": kind, "params": params, "lr": rates[kind], "weight_decay": decays[kind]} for kind, params in found.items() if params]
    for group in groups:
        if group["name"] == "tables" and cfg.tables != "dense":
            group["tables"] = cfg.tables  # which makes LazyAdamW step it by rows
    return groups


def kind_of(module: nn.Module, name: str) -> str:
    if isinstance(module, ValuePool):
        return "tables"
    return "matrices" if name == "weight" and isinstance(module, DECAYS) else "vectors"


def build(model: nn.Module, cfg: OptimConfig, total: int | None) -> tuple[Optimizer, LambdaLR]:
    """The optimiser and its schedule over `total` steps. Fused AdamW is one pass over memory on a CPU too."""
    if total is None and cfg.schedule != "constant":
        raise ConfigError(f"schedule {cfg.schedule!r} must know where the run ends: set trainer.max_steps, or optim.schedule constant.")
    if total is None and cfg.memory_decay is not None:
        raise ConfigError("memory_decay is a share of the run and must know where it ends: set trainer.max_steps, or optim.memory_decay null.")
    for module in model.modules():
        if isinstance(module, ValuePool):
            module.sparse_grad = cfg.tables != "dense"
    make = partial(AdamW, fused=True) if cfg.tables == "dense" else LazyAdamW
    optimizer = make(param_groups(model, cfg), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    return optimizer, LambdaLR(optimizer, [multiplier(cfg, group["name"], total or 0) for group in optimizer.param_groups])


def kept(model: nn.Module, cfg: OptimConfig) -> int:
    """Bytes of the moments: two a weight, in its dtype; of tables stepped by row, one a weight and one a row. The weights are their own masters."""
    total = 0
    for group in param_groups(model, cfg):
        for p in group["params"]:
            total += p.element_size() * (p.numel() + (p.shape[0] if group.get("tables") == "row" else p.numel()))
    return total


def table_names(model: nn.Module) -> list[str]:
    """The names of the tables that learn."""
    found = ((f"{name}.table".lstrip("."), module.table) for name, module in model.named_modules() if isinstance(module, ValuePool))
    return [name for name, table in found if table.requires_grad]


# ------------------------------------------------------------------------------------------------ schedules


def factor(cfg: OptimConfig, step: int, total: int) -> float:
    """What the learning rate of step 0, 1, .. total - 1 is multiplied by. A pure function: resuming needs the step and nothing else."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup  # the first step moves too
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * share(step, cfg.warmup, total)))
    else:  # Warm-up, stable, decay; the fall is 1 - sqrt, which Haegele et al. 2024 (arXiv 2405.18392) found better than a line or a cosine
        left = 1 - math.sqrt(share(step, max(cfg.warmup, round(total * (1 - cfg.decay))), total))
    return cfg.min_lr + (1 - cfg.min_lr) * left


def multiplier(cfg: OptimConfig, group: str, total: int) -> Callable[[int], float]:
    rule = table_factor if group == "tables" else factor
    return lambda step: rule(cfg, step, total)


def table_factor(cfg: OptimConfig, step: int, total: int) -> float:
    """The same of tables, whose rate is lr x (1 + (memory_lr - 1) max(0, 1 - step / (memory_decay total))), times the schedule if they follow it."""
    gone = 0.0 if cfg.memory_decay is None else share(step, 0, cfg.memory_decay * total)
    own = 1 - gone + gone / cfg.memory_lr if gone else 1.0  # of lr x memory_lr, where the group begins
    return own * (factor(cfg, step, total) if cfg.memory_schedule == "same" else 1.0)


def share(step: int, begin: float, end: float) -> float:
    """How far between two steps, 0 .. 1; beyond the end it stays 1."""
    return min(1.0, max(0.0, (step - begin) / max(1, end - begin)))


# ------------------------------------------------------------------------------------------------ clipping


@torch.no_grad()
def clip(optimizer: Optimizer, most: float | None, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Multiply all gradients by `scale`, then shrink each of (tables, the rest) to a norm of at most `most`. One pass over the gradients does both;
    of a row-sparse one it sees the rows that were read, each once.

    Returns the scaled norms before clipping, under "tables" and "rest"."""
    norms: dict[str, Tensor] = {}
    for name, grads in gradients(optimizer).items():
        norm = torch.nn.utils.get_total_norm(grads, foreach=True) * scale
        shrink = 1.0 if most is None else (most / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads), torch.as_tensor(shrink * scale, dtype=norm.dtype, device=norm.device))
        norms[name] = norm
    return norms


@torch.no_grad()
def table_norms(model: nn.Module) -> dict[str, Tensor]:
    """Of the gradient of every table, as it is."""
    present = {name: _present([model.get_parameter(name)]) for name in table_names(model)}
    return {name: torch.nn.utils.get_total_norm(grads) for name, grads in present.items() if grads}


def gradients(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        found.setdefault("tables" if group.get("name") == "tables" else "rest", []).extend(_present(group["params"]))
    return {name: grads for name, grads in found.items() if grads}


def _present(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [unique(p)[1] if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
