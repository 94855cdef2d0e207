"""AdamW that touches the rows of value tables that were read in this step, and no others.

    m[u] <- b1 m[u] + (1 - b1) g[u]
    v[u] <- b2 v[u] + (1 - b2) g[u]^2            lazy: as many second moments as weights
    v[u] <- b2 v[u] + (1 - b2) mean(g[u]^2)      row: one a row, the mean over its columns
    p[u] <- p[u] - lr m[u] / (1 - b1^t) / (sqrt(v[u] / (1 - b2^t)) + eps)

for the rows u of a row-sparse gradient g; t counts the steps of the table, not the visits to a row, as in torch's SparseAdam. If every row is
read, lazy is AdamW without decay. It is another optimiser if not: under AdamW a row nobody reads goes on moving by its fading momentum.

After the first step, which makes the moments, nothing as long as the table is read, written or allocated.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from memarch.kernels.weighted_bag.operator import unique_rows

PIECE = 2**16  # elements: on a CPU the rows of a piece stay in the cache from gathering to putting back (129k rows x 64: 37 ms; all at once 105)


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
            tensors = table, state["exp_avg"], state["exp_avg_sq"]
            many = max(1, PIECE // table.shape[1]) if table.device.type == "cpu" else max(1, len(rows))
            for u, g in zip(rows.split(many), grad.split(many), strict=True):
                update(tensors, u, g, state["step"], group["lr"], group["betas"], group["eps"])


def update(tensors: tuple[Tensor, Tensor, Tensor], u: Tensor, g: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    """table [N, d], m [N, d], v [N, d or 1], u [U], g [U, d]. Narrow dtypes are computed in float32 and rounded when they are put back."""
    wide = torch.promote_types(g.dtype, torch.float32)
    g, p, m, v = g.to(wide), *(x.index_select(0, u).to(wide) for x in tensors)
    square = g.square()
    m.lerp_(g, 1 - betas[0])
    v.lerp_(square if v.shape == square.shape else square.mean(1, keepdim=True), 1 - betas[1])
    p.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - betas[1] ** t)).add_(eps), value=-lr / (1 - betas[0] ** t))
    for x, new in zip(tensors, (p, m, v), strict=True):
        x.index_copy_(0, u, new.to(x.dtype))


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
