"""AdamW that touches the rows of value tables that were read in this step, and no others.

The formulas are in kernels/row_adam: "lazy" keeps as many second moments as weights, "row" one a row. Steps are those of the table, not the visits to a
row, as in torch's SparseAdam. If every row is read, lazy is AdamW without decay. It is another optimiser if not: under AdamW a row nobody reads goes
on moving by its fading momentum.

After the first step, which makes the moments, nothing as long as the table is read, written or allocated.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from memarch.kernels.row_adam import row_adam
from memarch.kernels.weighted_bag.operator import unique_rows


class LazyAdamW(Optimizer):
    """torch's fused AdamW for all groups but those that say "tables": "lazy" or "row"; these are stepped by rows."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._rows if "tables" in group else self._all)(group)
        return loss

    def _all(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        steps, first, second = ([self.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq"))
        rates = {name: group[name] for name in ("lr", "weight_decay", "eps")} | dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        adamw(params, [p.grad for p in params], first, second, [], steps, fused=True, amsgrad=False, maximize=False, **rates)

    def _rows(self, group: dict[str, Any]) -> None:
        for table in group["params"]:
            if table.grad is None:
                continue
            rows, grad = unique(table)
            state = self.state[table]
            if not state:
                width = 1 if group["tables"] == "row" else table.shape[1]
                state |= {"step": 0, "exp_avg": torch.zeros_like(table), "exp_avg_sq": table.new_zeros(table.shape[0], width)}
            state["step"] += 1
            rates = {"lr": float(group["lr"]), "betas": group["betas"], "eps": group["eps"]}
            row_adam(table, state["exp_avg"], state["exp_avg_sq"], rows, grad, step=state["step"], **rates)


def unique(table: nn.Parameter) -> tuple[Tensor, Tensor]:
    """The rows [U] that were read, each once, and their gradients [U, d]. They stay in .grad, so whoever asks next finds them sorted."""
    grad = table.grad
    assert grad is not None
    if not grad.is_sparse:
        raise ValueError(
            "a value table has a dense gradient, and its optimiser wants only the rows that were read: pass sparse_grad=pool.sparse_grad "
            "to every weighted_bag and row_dot that reads the table, or set optim.tables: dense."
        )
    rows, values = unique_rows(grad)
    table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
    return rows, values


@torch.no_grad()
def average(optimizer: Optimizer) -> None:
    """Gradients of lazy tables become their mean over processes, added in the order of ranks. DDP, which knows no row-sparse gradient, must leave
    these tables alone; this is called once per optimiser step, when all micro-batches are in."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for table in (p for group in optimizer.param_groups if "tables" in group for p in group["params"] if p.grad is not None):
        rows, values = unique(table)
        counts = everyones(torch.tensor([len(rows)], device=table.device))
        most = int(counts.max())
        pad = most - len(rows)
        all_rows, all_values = everyones(F.pad(rows, (0, pad))), everyones(F.pad(values, (0, 0, 0, pad)))  # [P, most], [P, most, d]
        real = torch.arange(most, device=table.device) < counts  # [P, most]
        table.grad = torch.sparse_coo_tensor(all_rows[real][None], all_values[real] / len(counts), table.shape, check_invariants=False)


def everyones(x: Tensor) -> Tensor:
    """x of all processes [P, ...], in the order of ranks."""
    many = dist.get_world_size()
    found = x.new_empty(many * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(found, x)
    return found.view(many, *x.shape)
