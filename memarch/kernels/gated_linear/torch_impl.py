"""Gated linear attention in chunks of C tokens, with its backward written by hand (GLA, arXiv 2312.06635, section 4).

Inside a chunk, with P_i the sum of g over the tokens up to i, R_j that over the tokens after j, S the memory before the chunk, o for products by element:

    A_ij = sum_d q_id k_jd e^{g_d summed over j < t <= i}    for i >= j
    O = (e^P o Q) S + A V
    S <- diag(e^{P_C}) S + (e^R o K)^T V

A is no product of two matrices: e^{P_i} e^{-P_j} overflows. It is one for queries of the second half of a span and keys of its first half, with P and R
taken inside the halves: (e^{P_i} o q_i) . (e^{R_j} o k_j), and no exponent is positive. Inside the halves the same again, down to
single tokens: log2 C rounds of products, one exponential for each token and channel in each, where sub-blocks of 16 that are done by element need 16.
P and R of a span come from those of its halves by adding one half's total to the other. Nothing is ever subtracted, neither here nor in the gradient
of g, which goes down the same tree: what a strong decay leaves small keeps its digits.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   X = B H   Y matrices
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import chunks, crop, cut, groups, padded, put

CHUNK = 32

Maybe = Tensor | None


def gated_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    if q.shape[1] == 1:
        if lengths is not None:  # a token of zeros changes nothing and answers 0
            q, k, v, g = (x.masked_fill((lengths <= 0)[:, None, None, None], 0) for x in (q, k, v, g))
        return step(q, k, v, g, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, state))
    run = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
    return run(q, k, v, g, state, lengths, save)[:2]


@exact
def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q1, k1, v1, g1 = (x.to(dtype).movedim(1, 2) for x in (q, k, v, g))  # [B, H, 1, K or V]
    S = k1.mT * v1
    S = S if state is None else torch.addcmul(S, state.to(dtype), g1.exp().mT)
    return (q1 @ S).movedim(2, 1).to(v.dtype), S


class Local(NamedTuple):
    """What a group of n chunks computes by itself."""

    q: Tensor  # [n X, C, K]
    k: Tensor
    v: Tensor  # [n X, C, V]
    A: Tensor  # [n X, C, C]
    grow: Tensor  # e^P [n X, C, K]
    fade: Tensor  # e^R
    rounds: list["Round"]


class Round(NamedTuple):
    """Spans of 2 h tokens, m of them in a chunk: what their second half asks their first, [Y, m, h, K] each."""

    h: int
    late: Tensor  # e^P o q
    early: Tensor  # e^R o k
    up: Tensor  # e^P
    down: Tensor  # e^R


def local(N: int, part: slice, dtype: torch.dtype, lengths: Maybe, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Local:
    q, k, v, P = (cut(x, N, part, dtype, lengths) for x in (q, k, v, g))
    A, R, rounds = q.new_zeros(*q.shape[:2], q.shape[1]), torch.zeros_like(P), []
    A.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for h in halves(q.shape[1]):
        (P1, P2), (R1, _) = half(P, h), half(R, h)
        up, down = P2.exp(), R1.exp()
        rounds.append(Round(h, half(q, h)[1] * up, half(k, h)[0] * down, up, down))
        block(A, h).copy_(rounds[-1].late @ rounds[-1].early.mT)
        R1 += P2[:, :, -1:]
        P2 += P1[:, :, -1:]
    return Local(q, k, v, A, P.exp_(), R.exp_(), rounds)


def halves(C: int) -> list[int]:
    """1, 2, 4, .. up to C / 2."""
    return [1 << i for i in range(C.bit_length() - 1)]


def half(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """[Y, C, .] -> the first and the second half of every span of 2 h tokens, [Y, m, h, .] each."""
    first, second = x.unflatten(1, (-1, 2, h)).unbind(2)
    return first, second


def block(A: Tensor, h: int) -> Tensor:
    """Of [Y, C, C] the parts [Y, m, h, h] where the second half of a span asks the first."""
    return A.unflatten(2, (-1, 2, h))[:, :, :, 0].unflatten(1, (-1, 2, h))[:, :, 1].diagonal(dim1=1, dim2=3).movedim(-1, 1)


@exact
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> o, the new state, and for the backward S before every chunk [N,X,K,V] (empty unless `save`)."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, C = grid(T)
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(X, K, V, dtype=dtype, device=v.device) if state is None else state.to(dtype).reshape(X, K, V)
    states, o = S.new_empty((N, X, K, V) if save else 0), v.new_empty(B, N * C, H, V)
    inputs = padded(N * C, q, k, v, g)
    for part in groups(N, C, X):
        c = local(N, part, dtype, lengths, *inputs)
        out, read, write, last = torch.bmm(c.A, c.v), c.q * c.grow, c.k * c.fade, c.grow[:, -1, :, None]
        for i, at in chunks(part, X):
            if save:
                states[i] = S
            torch.baddbmm(out[at], read[at], S, out=out[at])
            S = torch.baddbmm(S * last[at], write[at].mT, c.v[at])
        put(o, N, part, out)
    return crop(o, T), S.view(B, H, K, V).clone(), states


@torch.library.custom_op("memarch::gated_linear_backward", mutates_args=())
@exact
def chunked_backward(
    do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, lengths: Maybe
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, g and of the initial state."""
    (B, T, H, K), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, C = grid(T)
    dS = dstate.reshape(X, K, V)
    dq, dk, dv, dg = (x.new_empty(B, N * C, H, x.shape[-1]) for x in (q, k, v, g))
    do, *inputs = padded(N * C, do, q, k, v, g)
    for part in reversed(list(groups(N, C, X))):
        c, dO = local(N, part, dS.dtype, lengths, *inputs), cut(do, N, part, dS.dtype, lengths)
        S, read, write, last = states[part].flatten(0, 1), c.q * c.grow, c.k * c.fade, c.grow[:, -1, :, None]
        after = torch.empty_like(S)  # the gradient of the memory after each chunk
        for _, at in reversed(list(chunks(part, X))):
            after[at] = dS
            dS = torch.baddbmm(dS * last[at], read[at].mT, dO[at])

        dA, dread, dwrite = torch.bmm(dO, c.v.mT), torch.bmm(dO, S.mT), torch.bmm(c.v, after.mT)
        dP, dR = dread * read, dwrite * write  # of the exponents, before they meet in the tree
        dP[:, -1] += (after * S * last).sum(-1)
        same = dA.diagonal(dim1=-2, dim2=-1)[..., None]
        dQ, dK = dread.mul_(c.grow).addcmul_(same, c.k), dwrite.mul_(c.fade).addcmul_(same, c.q)
        for r in reversed(c.rounds):
            (dP1, dP2), (dR1, _) = half(dP, r.h), half(dR, r.h)
            first, second = dP2.sum(2), dR1.sum(2)
            dP1[:, :, -1] += first
            dP2[:, :, -1] += second
            d = block(dA, r.h)
            dlate, dearly = d @ r.early, d.mT @ r.late
            half(dQ, r.h)[1].addcmul_(dlate, r.up)
            half(dK, r.h)[0].addcmul_(dearly, r.down)
            dP2.addcmul_(dlate, r.late)
            dR1.addcmul_(dearly, r.early)
        put(dq, N, part, dQ)
        put(dk, N, part, dK)
        put(dv, N, part, torch.bmm(c.A.mT, dO).baddbmm_(write, after))
        put(dg, N, part, dP)
    dg = crop(dg, T)
    if lengths is not None:  # of q, k and v they are zero by themselves
        dg.masked_fill_((torch.arange(T, device=q.device) >= lengths[:, None])[:, :, None, None], 0)
    return crop(dq, T), crop(dk, T), crop(dv, T), dg, dS.view(B, H, K, V).clone()


def grid(T: int) -> tuple[int, int]:
    """How many chunks, and how long: halving wants a power of two."""
    C = min(CHUNK, 1 << (T - 1).bit_length())
    return (T + C - 1) // C, C


operator = torch.library.custom_op("memarch::gated_linear", chunked, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    S = v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))
    return v.new_empty(B, T, H, V), S, S.new_empty((grid(T)[0], B * H, K, V) if save else 0)


@chunked_backward.register_fake
def _(do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, lengths: Maybe) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), dstate.new_empty(dstate.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *inputs_, state, lengths, save = inputs
    assert save, "the operator was told that no gradient is wanted"
    ctx.save_for_backward(*inputs_, output[2], lengths)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:2]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Maybe, dstate: Maybe, *_: None) -> tuple[Maybe, ...]:
    do, dstate = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((do, dstate), ctx.like, strict=True))
    q, k, v, g, states, lengths = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    dq, dk, dv, dg, dS = chunked_backward(do, dstate, q, k, v, g, states, lengths)
    return dq, dk, dv, dg, None if ctx.state_dtype is None else dS.to(ctx.state_dtype), None, None


operator.register_autograd(_gradients, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, score_like: int, value_like: int, memory_like: int) -> int:
    """How many products cost like the strict lower half of [C,K][K,C], like [C,C][C,V] and like [C,K][K,V] in every chunk."""
    (B, T, H, K), V = q, v[3]
    N, C = grid(T)
    return B * H * N * C * (score_like * (C - 1) * K + 2 * value_like * C * V + 2 * memory_like * K * V)


FLOPS = {
    "gated_linear": lambda q, k, v, *_, **__: _flops(q, v, 1, 1, 2),
    "gated_linear_backward": lambda do, ds, q, k, v, *_, **__: _flops(q, v, 3, 2, 4),
}
