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

from memarch.kernels.chunks import chunks, cut
from memarch.kernels.neural_memory.gates import Gates, gates, gates_back
from memarch.kernels.neural_memory.grid import Grid
from memarch.kernels.neural_memory.inner import Net, Write, clipped, clipped_back, curve, fed, gradient

Maybe = Tensor | None
Masks = tuple[Tensor, Tensor, Tensor]
Layers = list[Tensor]  # [X, in, out] by layer


class All(NamedTuple):
    """What all chunks of a call are made of."""

    grid: Grid
    masks: Masks
    band: Tensor  # [C, C] of the window
    window: int
    pull: Maybe  # [chunk]
    tokens: list[Any]  # on the grid: q, k, v, log_decay, log_momentum, step, and, where it matters, which are real


class Found(NamedTuple):
    """The gradients of all chunks. The state's are those of what stood before them; () and None where there is nothing."""

    tokens: list[Maybe]  # but for `real`
    w: Layers
    s: Layers
    point: Layers
    init: Layers
    outer: list[Maybe]  # gain, bias [X, V], pull [C]


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
    """What one chunk went through. By layer."""

    write: Write
    u: list[Tensor]  # [X, C, out]
    X: list[Tensor]  # [X, C, in]
    scores: list[Tensor]  # [X, C, C], before G
    Z: list[Tensor]  # [X, C, out]
    curves: list[list[Tensor]]  # of Z, without the last layer


def through(c: Local, at: slice, bases: list[Layers], point: Layers, net: Net, order: int = 0) -> Run:
    """order: of the derivatives of the answers that will be asked for."""
    w = gradient(point, c.k[at], c.v[at], net, 1 + order)
    run = Run(w, [clipped(x, d, net.clip) for x, d in zip(w.x, w.d, strict=True)], [], [], [], [])
    for l, (x, u) in enumerate(zip(w.x, run.u, strict=True)):
        if l:
            run.curves.append(curve(run.Z[-1], net.activation, order))
        run.X.append(fed(run.curves[-1][0] if l else c.q[at], point[l]))
        run.scores.append(torch.bmm(run.X[l], x.mT))
        run.Z.append(torch.bmm(run.scores[l] * c.G[at, :-1], u))
        for coefficient, b in zip(c.c, bases, strict=True):
            run.Z[l].addcmul_(coefficient[at, :-1], torch.bmm(run.X[l], b[l]))
    return run


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
    c: Local, at: slice, bases: list[Layers], point: Layers, s: Layers, net: Net, dO: Tensor, dw: Layers, ds: Layers
) -> Back:  # fmt: skip
    """dw, ds: of what the chunk leaves."""
    run = through(c, at, bases, point, net, 1)
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
        for b, basis in enumerate(bases):
            share, back = c.c[b][at, :-1], torch.bmm(dZ, basis[l].mT)
            dX.addcmul_(share, back)
            dbases[b][l] = torch.bmm(X.mT, share * dZ).addcmul_(c.c[b][at, -1:], dw[l])
            dc[b][:, :-1] += (X * back).sum(-1, keepdim=True)  # of X B by dZ, without X B
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


def forward(
    c: Local, done: list[Any], w: Layers, s: Layers, point: Layers, init: Layers, net: Net, kept: Layers
) -> tuple[Tensor, Layers, Layers, Layers]:  # fmt: skip
    """A group of chunks. done: by chunk, whether it begins anew at M' = W, for all X or [X, 1, 1]. kept: room for what the backward needs, W and S before every
    chunk [n, X, in, out], or empty.

    -> the answers, and W, S and M' after the group"""
    out, X = torch.empty_like(c.v), len(w[0])
    for i, at in chunks(slice(0, len(done)), X):
        point = handed(done[i], w, point)
        for room, x in zip(kept, (*w, *s) if kept else (), strict=True):
            room[i] = x
        bases = mixed(c, w, s, init, point)
        run = through(c, at, bases, point, net)
        out[at] = net.answer(run.Z[-1], c.q[at])
        w, s = leaves(c, at, bases, s, run)
    return out, w, s, point


class Grads(NamedTuple):
    """The gradients of a group of chunks. The state's are those of what stood before the group; () and None where there is nothing."""

    tokens: list[Tensor]  # q, k, v [n X, C, .]
    c: list[Tensor]  # [n X, C + 1, 1] by basis
    G: Tensor  # [n X, C + 1, C]
    E: Maybe  # [n X, C, C], zero but for the last row
    m: Maybe  # [n X, C, 1]
    w: Layers
    s: Layers
    point: Layers
    init: Layers
    gain: Maybe  # [X, V]
    bias: Maybe


def backward(
    c: Local, done: list[Any], kept: Layers, given: Layers, init: Layers, net: Net, dO: Tensor, dw: Layers, ds: Layers, dpoint: Layers
) -> Grads:  # fmt: skip
    """given: M' of the first chunk where that is not W. dw, ds, dpoint: of what the group leaves; no dpoint is zeros."""
    L, X = len(dw), len(dw[0])
    tokens, dc, dG = [torch.empty_like(x) for x in (c.q, c.k, c.v)], [torch.empty_like(x) for x in c.c], torch.empty_like(c.G)
    dE, dm = (None, None) if c.gates.m is None else (torch.zeros_like(c.gates.E), torch.zeros_like(c.gates.m))
    dinit: Layers = []
    dgain: Maybe = None
    dbias: Maybe = None
    for i, at in reversed(list(chunks(slice(0, len(done)), X))):
        w, s = ([x[i] for x in xs] for xs in (kept[:L], kept[L:]))
        point = given if given and not i else w
        d = through_back(c, at, mixed(c, w, s, init, point), point, s, net, dO[at], dw, ds)
        for room, x in zip((*tokens, *dc, dG), (*d.tokens, *d.c, d.G), strict=True):
            room[at] = x
        if dE is not None and dm is not None:
            dE[at, -1], dm[at, -1, 0] = d.E, d.m
        dbases = list(d.bases)
        dw, ds = dbases.pop(0), dbases.pop(0) if s else []
        dinit = added(dinit, dbases.pop(0)) if init else []
        dw, dpoint = handed_back(done[i], dw, added(added(dpoint, d.point), dbases.pop(0) if dbases else []))
        dgain, dbias = plus(dgain, d.gain), plus(dbias, d.bias)
    return Grads(tokens, dc, dG, dE, dm, dw, ds, dpoint, dinit, dgain, dbias)


def mixed(c: Local, w: Layers, s: Layers, init: Layers, point: Layers) -> list[Layers]:
    """The bases."""
    return [x for x in (w, s, init, [] if c.pull is None else point) if x]


def handed(done: Any, w: Layers, point: Layers) -> Layers:
    """Where a chunk takes its gradients: at the memory of its start, if it starts."""
    if isinstance(done, bool):
        return w if done else point
    return [torch.where(done, x, y) for x, y in zip(w, point, strict=True)]


def handed_back(done: Any, dw: Layers, dpoint: Layers) -> tuple[Layers, Layers]:
    """No dpoint is a dpoint of zeros."""
    if isinstance(done, bool):
        return (added(dw, dpoint), []) if done else (dw, dpoint)
    return added(dw, [y * done for y in dpoint]), [y * ~done for y in dpoint]


def plus(x: Maybe, y: Maybe) -> Maybe:
    return x if y is None else y if x is None else x + y


def added(xs: Layers, ys: Layers) -> Layers:
    return [x + y for x, y in zip(xs, ys, strict=True)] if xs and ys else xs or ys
