"""Linear memory, gradients at M_{t-1}: the recurrence itself, exactly, in chunks of C tokens by one triangular solve, its backward by hand.

With the matrices of gates.py, where G-, beta-, f- stand one row lower (what token t finds: row 0 is 0, 1, 0), theta the steps:

    U = A^-1 theta (V - beta- K M - f- K S)     A = 1 + theta (K K^T o G-), unit lower triangular: u_t = theta_t (v_t - k_t M_{t-1})
    O = beta Q M + f Q S + (Q K^T o G) U
    M <- beta_C M + f_C S + (G_C K)^T U
    S <- m_C S + (E_C K)^T U

M and S are stacked to one memory [2 K, V], read with [beta- K, f- K] and [beta Q, f Q] and written with [G_C K, E_C K]; without momentum it is
[K, V] and there is no S. What the backward needs is computed again from the memory before every chunk and A^-1. With dR = A^-T dU the gradient of A
is -dR U^T.

    B rows   T tokens   H heads   K key width   V value width   J K or 2 K   N chunks   C tokens in a chunk   X = B H
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import chunks, crop, cut, groups, padded, put
from memarch.kernels.delta_rule.torch_impl import grid, invert, triangles
from memarch.kernels.neural_memory.gates import Gates, gates, gates_back

Maybe = Tensor | None
Masks = tuple[Tensor, Tensor, Tensor]


def down(x: Tensor, top: float = 0.0) -> Tensor:
    """The rows one further down: what is there before a token, not after it."""
    y = torch.empty_like(x)
    y[:, 0], y[:, 1:] = top, x[:, :-1]
    return y


def up(dx: Tensor) -> Tensor:
    y = torch.empty_like(dx)
    y[:, -1], y[:, :-1] = 0, dx[:, 1:]
    return y


class Local(NamedTuple):
    """What a group of n chunks computes by itself. The lists are for M and, with momentum, S."""

    q: Tensor  # [n X, C, K]
    k: Tensor
    v: Tensor  # [n X, C, V]
    step: Tensor  # [n X, C, 1]
    gates: Gates
    after: list[Tensor]  # beta, f [n X, C, 1]
    before: list[Tensor]  # beta-, f-
    left: list[Tensor]  # G_C, E_C
    G_before: Tensor  # [n X, C, C]
    QK: Tensor
    KK: Tensor
    read: Tensor  # [n X, C, J]
    erase: Tensor
    write: Tensor


def local(N: int, part: slice, T: int, like: Tensor, masks: Masks, lengths: Maybe, *xs: Maybe) -> Local:
    q, k, v, log_decay, log_momentum, step = (cut(x, N, part, like.dtype, lengths) for x in xs)
    g = gates(log_decay, log_momentum, real(N, part, T, lengths, k, log_momentum), None, masks)
    after, before, left = [g.beta], [down(g.beta, 1.0)], [g.G[:, -1:].mT]
    if g.f is not None:
        after, before, left = [*after, g.f], [*before, down(g.f)], [*left, g.E[:, -1:].mT]
    products = torch.bmm(q, k.mT), torch.bmm(k, k.mT)
    return Local(q, k, v, step, g, after, before, left, down(g.G), *products, spread(after, q), spread(before, k), spread(left, k))


def spread(scales: list[Tensor], x: Tensor) -> Tensor:
    return torch.cat([s * x for s in scales], -1)


def real(N: int, part: slice, T: int, lengths: Maybe, k: Tensor, log_momentum: Maybe) -> Maybe:
    """r of gates.py for a group of chunks, where it is needed: [n X, C, 1]."""
    C = k.shape[1]
    if log_momentum is None or (lengths is None and part.stop * C <= T):
        return None
    n = part.stop - part.start
    t = part.start * C + torch.arange(n * C, device=k.device).view(n, 1, 1, C)
    ends = torch.full((1, 1, 1, 1), T, device=k.device) if lengths is None else lengths.clamp(max=T).view(1, -1, 1, 1)
    X = k.shape[0] // n
    return (t < ends).expand(n, ends.shape[1], X // ends.shape[1], C).reshape(n * X, C, 1).to(k.dtype)


def kept(c: Local, at: slice, S: Tensor) -> Tensor:
    """What the chunk leaves of the stacked memory, before its own writes."""
    beta, f, m, K = c.gates.beta[at, -1:], c.gates.f, c.gates.m, c.k.shape[-1]
    if m is None:
        return beta * S
    return torch.cat([beta * S[:, :K] + f[at, -1:] * S[:, K:], m[at, -1:] * S[:, K:]], 1)


def kept_back(c: Local, at: slice, dS: Tensor) -> Tensor:
    beta, f, m, K = c.gates.beta[at, -1:], c.gates.f, c.gates.m, c.k.shape[-1]
    if m is None:
        return beta * dS
    return torch.cat([beta * dS[:, :K], f[at, -1:] * dS[:, :K] + m[at, -1:] * dS[:, K:]], 1)


@exact
def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Tensor | None, step: Tensor, state: Tensor | None, lengths: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """state [B, H, J, V] -> o, the new state, and for the backward the state before every chunk [N,X,J,V] and A^-1 [N,X,C,C] (empty unless `save`)."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    J = K if log_momentum is None else 2 * K
    N, C = grid(T, K, V)
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(X, J, V, dtype=dtype, device=v.device) if state is None else state.to(dtype).reshape(X, J, V)
    states, inverse = S.new_empty((N, X, J, V) if save else 0), S.new_empty((N, X, C, C) if save else 0)
    o = v.new_empty(B, N * C, H, V)
    inputs, masks = padded(N * C, q, k, v, log_decay, log_momentum, step), triangles(C, S)
    for part in groups(N, C, X):
        c = local(N, part, T, S, masks, lengths, *inputs)
        M, scores, out = invert(c.KK * c.G_before * c.step), c.QK * c.gates.G, torch.empty_like(c.v)
        for i, at in chunks(part, X):
            if save:
                states[i] = S
            U = torch.bmm(M[at], torch.baddbmm(c.v[at], c.erase[at], S, alpha=-1).mul_(c.step[at]))
            torch.bmm(c.read[at], S, out=out[at]).baddbmm_(scores[at], U)
            S = kept(c, at, S).baddbmm_(c.write[at].mT, U)
        if save:
            inverse[part] = M.view_as(inverse[part])
        put(o, N, part, out)
    return crop(o, T), S.view(B, H, J, V), states, inverse


@torch.library.custom_op("memarch::neural_memory_linear_backward", mutates_args=())
@exact
def chunked_backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    step: Tensor,
    states: Tensor,
    inverse: Tensor,
    lengths: Tensor | None,
) -> list[Tensor]:
    """-> the gradients of q, k, v, log_decay, log_momentum (empty where there is none), step and the initial state."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, C = grid(T, K, V)
    dS = dstate.reshape(X, -1, V)
    dq, dk, dv = (x.new_empty(B, N * C, H, x.shape[-1]) for x in (q, k, v))
    dgates = [q.new_empty(0) if x is None else x.new_empty(B, N * C, H, 1) for x in (log_decay, log_momentum, step)]
    (do, *inputs), masks = padded(N * C, do, q, k, v, log_decay, log_momentum, step), triangles(C, dS)
    below = masks[1]
    for part in reversed(list(groups(N, C, X))):
        c, dO = local(N, part, T, dS, masks, lengths, *inputs), cut(do, N, part, dS.dtype, lengths)
        g, S, M = c.gates, states[part].flatten(0, 1), inverse[part].flatten(0, 1)
        E = torch.baddbmm(c.v, c.erase, S, alpha=-1)
        U = torch.bmm(M, c.step * E)

        # From the last chunk to the first: the gradient of the memory after each chunk, of what it wrote, of the solved right-hand side.
        dU, later = torch.bmm((c.QK * g.G).mT, dO), torch.empty_like(S)
        dR = torch.empty_like(dU)
        for _, at in reversed(list(chunks(part, X))):
            later[at] = dS
            dU[at].baddbmm_(c.write[at], dS)
            torch.bmm(M[at].mT, dU[at], out=dR[at])
            dS = kept_back(c, at, dS).baddbmm_(c.read[at].mT, dO[at]).baddbmm_(c.erase[at].mT, dR[at] * c.step[at], alpha=-1)

        # The rest for all chunks of the group at once.
        dE = dR * c.step
        dread, derase, dwrite = torch.bmm(dO, S.mT), torch.bmm(dE, S.mT).neg_(), torch.bmm(U, later.mT)  # [n X, C, J]
        dP, dA = torch.bmm(dO, U.mT), torch.bmm(dR, U.mT).mul_(below).neg_()
        dAKK, dscores, dKK = dA * c.KK, dP * g.G, c.step * dA * c.G_before
        dG = dP * c.QK + up(c.step * dAKK)
        put(dv, N, part, dE)
        put(dgates[2], N, part, (dR * E).sum(-1, keepdim=True) + (dAKK * c.G_before).sum(-1, keepdim=True))

        dQ, dK = torch.bmm(dscores, c.k), torch.bmm(dscores.mT, c.q).baddbmm_(dKK + dKK.mT, c.k)
        dafter, dleft = [], []
        for j, (after, before, left) in enumerate(zip(c.after, c.before, c.left, strict=True)):
            r, e, w = (y[..., j * K : (j + 1) * K] for y in (dread, derase, dwrite))
            dQ.addcmul_(after, r)
            dK.addcmul_(before, e).addcmul_(left, w)
            dafter.append((c.q * r).sum(-1, keepdim=True) + up((c.k * e).sum(-1, keepdim=True)))
            dafter[j][:, -1, 0] += (S[:, j * K : (j + 1) * K] * later[:, :K]).sum((-2, -1))
            dleft.append((c.k * w).sum(-1))
        put(dq, N, part, dQ)
        put(dk, N, part, dK)

        dG[:, -1] += dleft[0]
        dmomentum: tuple[Maybe, Maybe, Maybe] = None, None, None  # of E, f, m
        if g.f is not None:
            dlast, dm = torch.zeros_like(g.E), torch.zeros_like(g.m)
            dlast[:, -1] = dleft[1]
            dm[:, -1, 0] = (S[:, K:] * later[:, K:]).sum((-2, -1))
            dmomentum = dlast, dafter[1], dm
        dlog_decay, dlog_momentum, _ = gates_back(g, dafter[0], dG, *dmomentum, masks)
        put(dgates[0], N, part, dlog_decay)
        if dlog_momentum is not None:
            put(dgates[1], N, part, dlog_momentum)
    dgates = [x if x.ndim == 1 else crop(x, T).squeeze(-1) for x in dgates]
    if lengths is not None:  # of q, k and v they are zero by themselves
        pad = (torch.arange(T, device=q.device) >= lengths[:, None])[:, :, None]
        dgates = [x if x.ndim == 1 else x.masked_fill_(pad, 0) for x in dgates]
    return [*(crop(x, T) for x in (dq, dk, dv)), *dgates, dS.view(B, H, -1, V)]


operator = torch.library.custom_op("memarch::neural_memory_linear", chunked, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, ...]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    N, C = grid(T, K, V)
    S = v.new_empty(B, H, K if log_momentum is None else 2 * K, V, dtype=torch.promote_types(v.dtype, torch.float32))
    states, inverse = S.new_empty((N, B * H, *S.shape[2:]) if save else 0), S.new_empty((N, B * H, C, C) if save else 0)
    return v.new_empty(B, T, H, V), S, states, inverse


@chunked_backward.register_fake
def _(do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, *_: Any) -> list[Tensor]:
    dgates = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_decay, log_momentum, step))
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *dgates, dstate.new_empty(dstate.shape)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *inputs_, state, lengths, save = inputs
    assert save, "the operator was told that no gradient is wanted"
    ctx.save_for_backward(*inputs_, *output[2:], lengths)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:2]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Maybe, dstate: Maybe, *_: None) -> tuple[Maybe, ...]:
    do, dstate = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((do, dstate), ctx.like, strict=True))
    saved = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    *dx, dmomentum, dstep, dS = chunked_backward(do, dstate, *saved)
    return *dx, None if saved[4] is None else dmomentum, dstep, None if ctx.state_dtype is None else dS.to(ctx.state_dtype), None, None


operator.register_autograd(_gradients, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, momentum: Any, scores: int, values: int, memory: int, scalars: tuple[int, int]) -> int:
    """How many products cost like [C,K][K,C], like [C,C][C,V], like [C,J][J,V], and like [C,C][C,C] without and with momentum in every chunk."""
    (B, T, H, K), V, has = q, v[3], momentum is not None
    N, C = grid(T, K, V)
    return 2 * B * H * N * C * (C * (scores * K + values * V) + memory * (1 + has) * K * V + scalars[has] * C * C)


FLOPS = {
    "neural_memory_linear": lambda q, k, v, a, e, *_, **__: _flops(q, v, e, 2, 2, 3, (0, 1)),
    "neural_memory_linear_backward": lambda do, ds, q, k, v, a, e, *_, **__: _flops(q, v, e, 5, 5, 7, (1, 5)),
}


def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    inputs = q, k, v, log_decay, log_momentum, step, state
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
    return call(*inputs, lengths, save)[:2]
