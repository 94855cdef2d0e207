"""The gated delta rule in chunks of C tokens, with its backward written by hand (Gated Delta Networks, arXiv 2412.06464, section 3.3).

Inside a chunk, with G the running sum of g, D_ij = e^{G_i - G_j} for i >= j and else 0, S the memory before the chunk:

    M = (1 + strictly_lower(beta K K^T o D))^-1          unit lower triangular, [C, C]
    R = V - e^G K S                                      what the memory does not answer yet
    U = M (beta R)                                       what is written, with the chunk's own erasures resolved; U = V without beta
    O = e^G Q S + (Q K^T o D) U
    S <- e^{G_C} S + (e^{G_C - G} K)^T U

Every exponent is <= 0, so nothing overflows however strong the decay is. M is kept for the backward: with dZ = M^T dU the gradient of the
matrix it inverts is -dZ U^T, and no second solve is needed. Nor does the gradient of G need sums over [C, C]: e^{+G} comes with q and with
the erasing k, e^{-G} with the writing k, so dG = q.dq + k.dk_erasing - k.dk_writing. What does not depend on G, the diagonal of D
and the newest token's part in the new S, is left out of these sums: added and subtracted it would drown the small gradients of a strong decay.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   X = B H
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import chunks, crop, cut, groups, padded, put

CHUNK = 32  # against 64: 25 % faster at 64 x 64 in float32 on a CPU
WIDE = 128 * 128  # from this memory size on both take the same time, and chunks of twice the length keep half as many memories
LEAF = 16  # up to this size a triangular solve is faster than splitting once more

Maybe = Tensor | None


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    if q.shape[1] == 1:
        if lengths is not None:  # a token of zeros changes nothing and answers 0
            pad = (lengths <= 0)[:, None, None]
            q, k, v = (x.masked_fill(pad[..., None], 0) for x in (q, k, v))
            beta, g = (x if x is None else x.masked_fill(pad, 0) for x in (beta, g))
        return step(q, k, v, beta, g, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state))
    run = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
    return run(q, k, v, beta, g, state, lengths, save)[:2]


@exact
def step(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself, reading the memory once for key and query together."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q1, k1, v1 = (x.to(dtype).movedim(1, 2) for x in (q, k, v))  # [B, H, 1, K or V]
    S = q1.new_zeros(*q1.shape[:2], q1.shape[-1], v1.shape[-1]) if state is None else state.to(dtype)
    S = S if g is None else S * g.to(dtype).exp().movedim(1, 2)[..., None]
    told, read = (torch.cat([k1, q1], 2) @ S).split(1, 2)  # [B, H, 1, V] each
    u = v1 if beta is None else (v1 - told) * beta.to(dtype).movedim(1, 2)[..., None]
    o = read + (q1 * k1).sum(-1, keepdim=True) * u
    return o.movedim(2, 1).to(v.dtype), S + k1.mT * u


class Local(NamedTuple):
    """What a group of n chunks computes by itself; None where there is no g or no beta."""

    q: Tensor  # [n X, C, K]
    k: Tensor
    v: Tensor  # [n X, C, V]
    beta: Any  # [n X, C, 1]
    D: Tensor  # [n X, C, C], or [C, C] without g
    grow: Any  # e^G [n X, C, 1]
    fade: Any  # e^{G_C - G} [n X, C, 1]
    last: Any  # e^{G_C} [n X, 1, 1]
    A: Tensor  # Q K^T o D
    read: Tensor  # e^G Q
    erase: Tensor  # e^G K
    write: Tensor  # e^{G_C - G} K


def local(
    N: int, part: slice, keep: bool, like: Tensor, masks: tuple[Tensor, Tensor, Tensor], lengths: Maybe, q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe
) -> Local:
    q, k, v, beta, g = (cut(x, N, part, like.dtype, lengths) for x in (q, k, v, beta, g))
    D, grow, fade, last = decay(g, *masks)
    A = torch.bmm(q, k.mT).mul_(D)
    read, erase, write = q, k, k
    if g is not None:  # what will not be asked for again is scaled where it stands
        erase = k if beta is None else k * grow
        read, write = q * grow if keep else q.mul_(grow), k * fade if keep or beta is not None else k.mul_(fade)
    return Local(q, k, v, beta, D, grow, fade, last, A, read, erase, write)


@exact
def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None, lengths: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, the new state, and for the backward S before every chunk [N,X,K,V] and M [N,X,C,C] (empty unless `save`)."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, C = grid(T, K, V)
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(X, K, V, dtype=dtype, device=v.device) if state is None else state.to(dtype).reshape(X, K, V)
    states, inverse = S.new_empty((N, X, K, V) if save else 0), S.new_empty((N, X, C, C) if save and beta is not None else 0)
    o = v.new_empty(B, N * C, H, V)
    inputs, masks = padded(N * C, q, k, v, beta, g), triangles(C, S)
    for part in groups(N, C, X):
        c = local(N, part, False, S, masks, lengths, *inputs)
        if beta is not None:
            M = invert(torch.bmm(c.k, c.k.mT).mul_(c.D).mul_(c.beta))
        out = torch.empty_like(c.v)
        for i, at in chunks(part, X):
            if save:
                states[i] = S
            U = c.v[at] if beta is None else torch.bmm(M[at], torch.baddbmm(c.v[at], c.erase[at], S, alpha=-1).mul_(c.beta[at]))
            torch.bmm(c.read[at], S, out=out[at]).baddbmm_(c.A[at], U)
            S = torch.baddbmm(S if g is None else S * c.last[at], c.write[at].mT, U)
        if save and beta is not None:
            inverse[part] = M.view_as(inverse[part])
        put(o, N, part, out)
    return crop(o, T), S.view(B, H, K, V), states, inverse


@torch.library.custom_op("memarch::delta_rule_backward", mutates_args=())
@exact
def chunked_backward(
    do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, states: Tensor, inverse: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, beta, g (empty where there is none) and of the initial state."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, C = grid(T, K, V)
    dS = dstate.reshape(X, K, V)
    dq, dk, dv = (x.new_empty(B, N * C, H, x.shape[-1]) for x in (q, k, v))
    dbeta, dg = (q.new_empty(0) if x is None else x.new_empty(B, N * C, H, 1) for x in (beta, g))
    (do, *inputs), masks = padded(N * C, do, q, k, v, beta, g), triangles(C, dS)
    for part in reversed(list(groups(N, C, X))):
        c, dO = local(N, part, True, dS, masks, lengths, *inputs), cut(do, N, part, dS.dtype, lengths)
        S = states[part].flatten(0, 1)  # [n X, K, V]
        U = c.v
        if beta is not None:
            M = inverse[part].flatten(0, 1)
            R = torch.baddbmm(c.v, c.erase, S, alpha=-1)
            U = torch.bmm(M, c.beta * R)

        # From the last chunk to the first: the gradient of the memory after each chunk, of what it wrote, of M's argument.
        dU, after = torch.bmm(c.A.mT, dO), torch.empty_like(S)
        dZ = torch.empty_like(dU)
        for _, at in reversed(list(chunks(part, X))):
            after[at] = dS
            dU[at].baddbmm_(c.write[at], dS)
            dS = torch.baddbmm(dS if g is None else dS * c.last[at], c.read[at].mT, dO[at])
            if beta is not None:
                torch.bmm(M[at].mT, dU[at], out=dZ[at])
                dS.baddbmm_(c.erase[at].mT, dZ[at] * c.beta[at], alpha=-1)

        # The rest for all chunks of the group at once; for dG without what does not depend on G.
        if g is not None:
            c.D.diagonal(dim1=-2, dim2=-1).zero_()
        dA = torch.bmm(dO, U.mT).mul_(c.D)
        dread, dwrite = torch.bmm(dO, S.mT), torch.bmm(U, after.mT)  # [n X, C, K]: the gradients of q and of the writing k
        if g is not None:
            dread, dwrite = dread.mul_(c.grow), dwrite.mul_(c.fade)
            newest = dwrite[:, -1].clone()
            dwrite[:, -1] = 0
            dlast = (dwrite * c.k).sum((-2, -1)) + (after * S).sum((-2, -1)) * c.last[:, 0, 0]
        dread, dwrite = dread.baddbmm_(dA, c.k), dwrite.baddbmm_(dA.mT, c.q)
        if beta is not None:
            Y = torch.bmm(dZ, U.mT).mul_(c.D)
            if g is None:
                Y.diagonal(dim1=-2, dim2=-1).zero_()
            Yk = torch.bmm(Y, c.k)
            put(dbeta, N, part, R.mul_(dZ).sum(-1, keepdim=True) - (c.k * Yk).sum(-1, keepdim=True))
            dwrite.baddbmm_(Y.mT, c.beta * c.k, alpha=-1)
            derase = torch.bmm(dZ, S.mT)
            derase = (derase if g is None else derase.mul_(c.grow)).add_(Yk).mul_(c.beta).neg_()  # of the erasing k
            dU = dZ.mul_(c.beta)
        if g is not None:
            dG = (c.q * dread).sum(-1, keepdim=True) - (c.k * (dwrite if beta is None else dwrite - derase)).sum(-1, keepdim=True)
            dG[:, -1, 0] += dlast
            put(dg, N, part, dG.flip(1).cumsum(1).flip(1))
            same = (dO * U).sum(-1, keepdim=True)
            dread, dwrite = dread.addcmul_(same, c.k), dwrite.addcmul_(same, c.q)
            dwrite[:, -1] += newest
        put(dq, N, part, dread)
        put(dk, N, part, dwrite if beta is None else dwrite.add_(derase))
        put(dv, N, part, dU)
    dbeta, dg = (x if x.ndim == 1 else crop(x, T).squeeze(-1) for x in (dbeta, dg))
    if lengths is not None:  # of q, k and v they are zero by themselves
        pad = (torch.arange(T, device=q.device) >= lengths[:, None])[:, :, None]
        dbeta, dg = (x if x.ndim == 1 else x.masked_fill_(pad, 0) for x in (dbeta, dg))
    return crop(dq, T), crop(dk, T), crop(dv, T), dbeta, dg, dS.view(B, H, K, V)


def grid(T: int, K: int, V: int) -> tuple[int, int]:
    """How many chunks, and how long: 33 tokens are 2 x 17, not 2 x 32."""
    chunk = CHUNK if K * V < WIDE else 2 * CHUNK
    N = (T + chunk - 1) // chunk
    return N, (T + N - 1) // N


def triangles(C: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ones on and below the diagonal; below it only; minus infinity above it."""
    lower = like.new_ones(C, C).tril()
    return lower, lower.tril(-1), like.new_full((C, C), -torch.inf).triu(1)


def decay(g: Maybe, lower: Tensor, below: Tensor, future: Tensor) -> tuple[Tensor, Any, Any, Any]:
    """-> D, e^G, e^{G_C - G}, e^{G_C} as in `Local`."""
    if g is None:
        return lower, None, None, None
    D = (g * below).cumsum(-2).add_(future).exp_()  # sums of their own, for G_i - G_j has lost what is small next to G
    grow = g.cumsum(-2).exp_()
    return D, grow, D[..., -1:, :].mT.clone(), grow[..., -1:, :]


def invert(L: Tensor) -> Tensor:
    """(1 + strictly_lower(L))^-1 by halves; what stands on and above the diagonal of L is not read."""
    out = torch.zeros_like(L)
    _invert(L, out)
    return out


def _invert(L: Tensor, out: Tensor) -> None:
    C = L.shape[-1]
    if C <= LEAF:
        one = torch.eye(C, dtype=L.dtype, device=L.device).expand_as(L)
        out.copy_(torch.linalg.solve_triangular(L, one, upper=False, left=False, unitriangular=True))
        return
    h = C // 2
    top, low = out[:, :h, :h], out[:, h:, h:]
    _invert(L[:, :h, :h], top)
    _invert(L[:, h:, h:], low)
    out[:, h:, :h] = torch.bmm(low, torch.bmm(L[:, h:, :h], top)).neg_()


operator = torch.library.custom_op("memarch::delta_rule", chunked, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, ...]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    N, C = grid(T, K, V)
    S = v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))
    states, inverse = S.new_empty((N, B * H, K, V) if save else 0), S.new_empty((N, B * H, C, C) if save and beta is not None else 0)
    return v.new_empty(B, T, H, V), S, states, inverse


@chunked_backward.register_fake
def _(
    do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, states: Tensor, inverse: Tensor, lengths: Maybe
) -> tuple[Tensor, ...]:
    dbeta, dg = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, g))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbeta, dg, dstate.new_empty(dstate.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *inputs_, state, lengths, save = inputs
    assert save, "the operator was told that no gradient is wanted"
    ctx.save_for_backward(*inputs_, *output[2:], lengths)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:2]]
    ctx.set_materialize_grads(False)  # the zeros for `states` alone would cost as much as a tenth of the backward


def _gradients(ctx: Any, do: Maybe, dstate: Maybe, *_: None) -> tuple[Maybe, ...]:
    do, dstate = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((do, dstate), ctx.like, strict=True))
    q, k, v, beta, g, states, inverse, lengths = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    dq, dk, dv, dbeta, dg, dS = chunked_backward(do, dstate, q, k, v, beta, g, states, inverse, lengths)
    return dq, dk, dv, None if beta is None else dbeta, None if g is None else dg, None if ctx.state_dtype is None else dS.to(ctx.state_dtype), None, None


operator.register_autograd(_gradients, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, score_like: int, value_like: int, memory_like: int) -> int:
    """How many products cost like [C,K][K,C], like [C,C][C,V] and like [C,K][K,V] in every chunk."""
    (B, T, H, K), V = q, v[3]
    N, C = grid(T, K, V)
    return 2 * B * H * N * C * (C * (score_like * K + value_like * V) + memory_like * K * V)


FLOPS = {
    "delta_rule": lambda q, k, v, beta, *_, **__: _flops(q, v, *((1, 1, 2) if beta is None else (2, 2, 3))),
    "delta_rule_backward": lambda do, ds, q, k, v, beta, *_, **__: _flops(q, v, *((3, 2, 4) if beta is None else (5, 5, 7))),
}
