"""Adam on the rows of a table that have a gradient, in place.

    m[u] <- b1 m[u] + (1 - b1) g[u]
    v[u] <- b2 v[u] + (1 - b2) g[u]^2            or, with one second moment a row, the mean of g[u]^2 over its columns
    p[u] <- p[u] - lr m[u] / (1 - b1^t) / (sqrt(v[u] / (1 - b2^t)) + eps)

Nothing as long as the table is read or written. What an optimiser makes of it is in memarch/optim/tables.py. It has no gradient of its own, so it is not
among the operators of `memarch.kernels.OPS`.

    N rows   d width   U rows with a gradient, each once
"""

import math

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import machine

PIECE = 2**16  # elements: on a CPU the rows of a piece stay in the cache from gathering to putting back (2.7 times faster than all at once)
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def row_adam(
    p: Tensor, m: Tensor, v: Tensor, rows: Tensor, g: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float, impl: str | None = None
) -> None:
    """p, m [N, d], v [N, d] or [N, 1], rows [U] int64, g [U, d]; step counts from 1. Narrow dtypes are computed in float32 and rounded when they are put
    back. impl: "torch" or "cpp"; None: C++ where it is built and knows the dtype."""
    if impl is None:
        impl = "torch" if native.cannot(p.device.type, p.dtype, machine(p.device.type), SUFFIX) else "cpp"
    how = betas[0], betas[1], lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), eps
    if impl == "cpp":
        numbers = torch.tensor(how, dtype=torch.float64)
        native.call(f"row_adam_{SUFFIX[p.dtype]}", p, m, v, rows, g.to(p.dtype).contiguous(), numbers, len(rows), p.shape[1], int(v.shape != p.shape))
        torch.autograd.graph.increment_version(p)  # autograd has not seen it change
        return
    many = max(1, PIECE // p.shape[1]) if p.device.type == "cpu" else max(1, len(rows))
    for u, piece in zip(rows.split(many), g.split(many), strict=True):
        _piece((p, m, v), u, piece, *how)


def _piece(tensors: tuple[Tensor, Tensor, Tensor], u: Tensor, g: Tensor, b1: float, b2: float, rate: float, root: float, eps: float) -> None:
    wide = torch.promote_types(g.dtype, torch.float32)
    g, p, m, v = g.to(wide), *(x.index_select(0, u).to(wide) for x in tensors)
    square = g.square()
    m.lerp_(g, 1 - b1)
    v.lerp_(square if v.shape == square.shape else square.mean(1, keepdim=True), 1 - b2)
    p.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate)
    for x, new in zip(tensors, (p, m, v), strict=True):
        x.index_copy_(0, u, new.to(x.dtype))
