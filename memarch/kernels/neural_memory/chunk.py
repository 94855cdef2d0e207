"""One chunk of a memory whose gradients are all taken at the chunk's start, in dual form, and its backward.

The memory stands at M' (`point`). All C tokens take their gradients there, x_l^T u_l in layer l (inner.py: u is d, clipped), and with the matrices of
gates.py, P_ji = -step_j for the tokens i in the window that ends with j (without a window: for i = j),

    W_t = beta_t W + f_t S + (1 - beta_t) W_0 + sum_i G_ti x_i^T u_i        W_0 only where the memory decays to its start
    S_t = m_t S + sum_i E_ti x_i^T u_i

so that the queries meet their own weights, layer by layer, at the price of an attention:

    Z_l = beta X_l W + f X_l S + (1 - beta) X_l W_0 + (X_l x_l^T o G) u_l       X_{l+1} = phi(Z_l)       O = post(Z_L, Q)

With a pull p the rows of all this are taken p_t of the way from M':  W_t -> (1 - p_t) M' + p_t W_t. So a layer's answer is a mixture of products
X B with a few matrices B (`bases`: W, S, W_0, M') by coefficients c [C], plus the attention. One more row, C, is the memory that the chunk leaves:
W <- sum of c_C B over the bases + (G_C x)^T u.

    C tokens in a chunk   n chunks of a group   L layers   X = B H
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch.kernels.chunks import cut
from memarch.kernels.neural_memory.gates import Gates, gates, gates_back
from memarch.kernels.neural_memory.grid import Grid
from memarch.kernels.neural_memory.inner import Net, Write, clipped, clipped_back, curve, fed, gradient

Maybe = Tensor | None
Masks = tuple[Tensor, Tensor, Tensor]
Layers = list[Tensor]  # [X, in, out] by layer


class Local(NamedTuple):
    """What a group of n chunks computes by itself."""

    q: Tensor  # [n X, C, K]
    k: Tensor
    v: Tensor  # [n X, C, V]
    gates: Gates
    over: Any  # [n X, 1, 1]: the chunk ends in this call; this and the pull [n X, C + 1, 1] are None without a pull
    pull: Any
    c: list[Tensor]  # [n X, C + 1, 1] for every basis
    G: Tensor  # [n X, C + 1, C]


def local(g: Grid, part: slice, like: Tensor, H: int, masks: Masks, band: Tensor, pull: Maybe, to_start: bool, *tokens: Maybe) -> Local:
    q, k, v, log_decay, log_momentum, step, real = (cut(x, g.N, part, like.dtype) for x in tokens)
    m = gates(log_decay, log_momentum, real, -step * band, masks)
    c, G = [one_more(x) for x in free(m, to_start)], one_more(m.G)
    if pull is None:
        return Local(q, k, v, m, None, None, c, G)
    over = torch.cat([g.done(i + 1, H) | masks[0].new_zeros(len(like), 1, 1, dtype=torch.bool) for i in range(part.start, part.stop)])
    seen = pull[: g.C, None].expand(len(q), -1, 1)
    pulls = torch.cat([seen, torch.where(over, seen[:, -1:], 1)], 1)
    return Local(q, k, v, m, over, pulls, [*(x * pulls for x in c), 1 - pulls], G * pulls)


def free(m: Gates, to_start: bool) -> list[Tensor]:
    """The coefficients of W, S and W_0 before any pull."""
    return [m.beta, *(x for x in (m.f,) if x is not None), *(1 - m.beta for _ in range(to_start))]


def local_back(c: Local, to_start: bool, dc: list[Tensor], dG: Tensor, dE: Maybe, dm: Maybe, masks: Masks) -> tuple[Tensor, Maybe, Any, Maybe]:
    """-> the gradients of log_decay, log_momentum [n X, C, 1], P [n X, C, C] and pull [C]"""
    dpull = None
    if c.pull is not None:
        *dc, dpoint = dc
        d = (dG * one_more(c.gates.G)).sum(-1, keepdim=True) - dpoint
        for x, y in zip(dc, free(c.gates, to_start), strict=True):
            d = d.addcmul(x, one_more(y))
        dc, dG = [x * c.pull for x in dc], dG * c.pull
        dpull = d[:, :-1].sum((0, 2))
        dpull[-1] += (d[:, -1:] * c.over).sum()
    dbeta = dc[0] - dc[-1] if to_start else dc[0]
    df = None if c.gates.f is None else one_less(dc[1])
    dlog_decay, dlog_momentum, dP = gates_back(c.gates, one_less(dbeta), one_less(dG), dE, df, dm, masks)
    return dlog_decay, dlog_momentum, dP, dpull


def one_more(x: Tensor) -> Tensor:
    """The last row twice: for the last token, and for what the chunk leaves."""
    return torch.cat([x, x[:, -1:]], 1)


def one_less(dx: Tensor) -> Tensor:
    y = dx[:, :-1].clone()
    y[:, -1] += dx[:, -1]
    return y


class Run(NamedTuple):
    """One chunk, kept for its backward. By layer."""

    write: Write
    u: list[Tensor]  # [X, C, out]
    X: list[Tensor]  # [X, C, in]
    XB: list[list[Tensor]]  # [X, C, out] by basis
    scores: list[Tensor]  # [X, C, C], before G
    Z: list[Tensor]
    curves: list[list[Tensor]]  # of Z, without the last layer


def through(c: Local, at: slice, bases: list[Layers], point: Layers, net: Net, order: int = 0) -> tuple[Tensor, Run]:
    """-> the chunk's answers. order: of the derivatives of the answers that will be asked for."""
    q, G = c.q[at], c.G[at, :-1]
    w = gradient(point, c.k[at], c.v[at], net, 1 + order)
    run = Run(w, [clipped(x, d, net.clip) for x, d in zip(w.x, w.d, strict=True)], [], [], [], [], [])
    for l, (x, u) in enumerate(zip(w.x, run.u, strict=True)):
        if l:
            run.curves.append(curve(run.Z[-1], net.activation, order))
        X = fed(run.curves[-1][0] if l else q, point[l])
        run.X.append(X)
        run.scores.append(torch.bmm(X, x.mT))
        run.XB.append([torch.bmm(X, b[l]) for b in bases])
        Z = torch.bmm(run.scores[l] * G, u)
        for coefficient, y in zip(c.c, run.XB[l], strict=True):
            Z.addcmul_(coefficient[at, :-1], y)
        run.Z.append(Z)
    return net.answer(run.Z[-1], q), run


def leaves(c: Local, at: slice, bases: list[Layers], s: Layers, run: Run) -> tuple[Layers, Layers]:
    """-> W and S after the chunk"""
    w_new, s_new = [], []
    for l, (x, u) in enumerate(zip(run.write.x, run.u, strict=True)):
        w_new.append(torch.bmm((x * c.G[at, -1:].mT).mT, u))
        for coefficient, b in zip(c.c, bases, strict=True):
            w_new[l].addcmul_(coefficient[at, -1:], b[l])
        if s:
            s_new.append(torch.bmm((x * c.gates.E[at, -1:].mT).mT, u).addcmul_(c.gates.m[at, -1:], s[l]))
    return w_new, s_new


class Back(NamedTuple):
    """The gradients of one chunk."""

    tokens: tuple[Tensor, Tensor, Tensor]  # q, k, v [X, C, .]
    c: list[Tensor]  # [X, C + 1, 1] by basis
    G: Tensor  # [X, C + 1, C]
    E: Any  # [X, C], of the last row; None without momentum
    m: Any  # [X], of the last one
    bases: list[Layers]
    point: Layers
    gain: Maybe  # [X, V]
    bias: Maybe


def through_back(
    c: Local, at: slice, bases: list[Layers], point: Layers, s: Layers, run: Run, net: Net, dO: Tensor, dw: Layers, ds: Layers
) -> Back:  # fmt: skip
    """dw, ds: of what the chunk leaves."""
    k, v, G, (x, d, z, curves, e), L = c.k[at], c.v[at], c.G[at], run.write, len(point)
    dx: list[Any] = [None] * L
    du, dz, dpoint = list(dx), list(dx), list(dx)
    dbases = [list(dx) for _ in bases]
    dc, dG, dE, dm = [torch.zeros_like(y[at]) for y in c.c], torch.zeros_like(G), None, None
    if s:
        dE, dm = torch.zeros_like(G[:, 0]), torch.zeros_like(G[:, 0, 0])

    def written(l: int, row: Tensor, drow: Tensor, dleft: Tensor) -> None:
        """Backwards through (row x_l)^T u_l"""
        told = torch.bmm(run.u[l], dleft.mT)
        drow += (x[l] * told).sum(-1)
        du[l].baddbmm_(row.mT * x[l], dleft)
        dx[l].addcmul_(row.mT, told)

    # What the queries met, from the last layer to the first, and what was left.
    dZ, dq, dgain, dbias = net.answer_back(run.Z[-1], dO)
    for l in reversed(range(L)):
        X, scores = run.X[l], run.scores[l]
        dA = torch.bmm(dZ, run.u[l].mT)
        dG[:, :-1] += dA * scores
        dscores = dA.mul_(G[:, :-1])
        du[l] = torch.bmm((scores * G[:, :-1]).mT, dZ)
        dX, dx[l] = torch.bmm(dscores, x[l]), torch.bmm(dscores.mT, X)
        for b, (basis, XB) in enumerate(zip(bases, run.XB[l], strict=True)):
            y = c.c[b][at, :-1] * dZ
            dX.baddbmm_(y, basis[l].mT)
            dbases[b][l] = torch.bmm(X.mT, y).addcmul_(c.c[b][at, -1:], dw[l])
            dc[b][:, :-1] += (dZ * XB).sum(-1, keepdim=True)
            dc[b][:, -1, 0] += dot(dw[l], basis[l])
        written(l, G[:, -1:], dG[:, -1], dw[l])
        if dE is not None and dm is not None:
            written(l, c.gates.E[at, -1:], dE, ds[l])
            dm += dot(ds[l], s[l])
            dbases[1][l].addcmul_(c.gates.m[at, -1:], ds[l])
        if l:
            dZ = dX[..., : run.Z[l - 1].shape[-1]] * run.curves[l - 1][1]
    dX = dX[..., : k.shape[-1]]

    # How the writes came about: up through the errors, down through the keys.
    if net.clip is not None:
        for l in range(L):
            more, du[l] = clipped_back(x[l], d[l], net.clip, du[l])
            dx[l] += more
    dd = du
    for l in range(L - 1):
        _, slope, bend = curves[l]
        dz[l] = (dd[l] * e[l]).mul_(bend)
        dd[l].mul_(slope)  # now the gradient of e
        dd[l + 1].baddbmm_(dd[l], point[l + 1][:, : slope.shape[-1]])
    dz[-1], dk, dv, more_gain, more_bias = net.error_back(z[-1], k, v, dd[-1])
    for l in reversed(range(L)):
        dpoint[l] = torch.bmm(x[l].mT, dz[l])
        dx[l].baddbmm_(dz[l], point[l].mT)
        if l:
            slope = curves[l - 1][1]
            dpoint[l][:, : slope.shape[-1]].baddbmm_(dd[l - 1].mT, d[l])
            dz[l - 1].addcmul_(dx[l][..., : slope.shape[-1]], slope)
    dx_keys = dx[0][..., : k.shape[-1]]
    return Back(
        (dX if dq is None else dq + dX, dx_keys if dk is None else dk + dx_keys, dv),
        dc, dG, dE, dm, dbases, dpoint,
        None if net.gain is None else (dgain + more_gain).sum(1),
        None if net.bias is None else (dbias + more_bias).sum(1),
    )  # fmt: skip


def dot(x: Tensor, y: Tensor) -> Tensor:
    """[X, in, out] twice -> [X]"""
    return torch.bmm(x.flatten(1)[:, None], y.flatten(1)[..., None])[:, 0, 0]
