"""Taylor attention in chunks of C tokens, with its backward written by hand (Based, arXiv 2402.18668).

Inside a chunk the weights come from A = Q K^T, between chunks through the features; with S the state before the chunk and V1 = [V, 1]:

    W = tril(1 + A + A^2/2)
    O = W V1 + read(Q) S
    S <- S + write(K)^T V1

One chunk is the quadratic form, one token the recurrence; `chunk` says which. The backward keeps nothing but the inputs. dQ needs S only, dK
and dV need dS only, so it sweeps twice: backward for dK, dV and dS, then forward for dQ, making S again on the way. Its memory, like
the forward's, is that of a group of chunks, whatever T is.

Features lie in rows, [E, C]: they are products of whole rows of K^T then, and no gather is needed.

    B rows   T tokens   H heads   F key width   V value width   E features   N chunks   C tokens in a chunk   X = B H
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import crop, cut, groups, padded, put, view

CHUNK = 64  # forward and backward at B 2, H 4, F 16, V 64, T 1024 in float32 on one CPU core: 31 ms; with 32 or 128 it is 34
QUADRATIC = 256  # up to here one chunk: half the time forward and backward without a state, the same with one; at 320 forward is slower

Maybe = Tensor | None


def taylor_attention(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    pad = None
    if lengths is not None:  # a token without a value and without a one changes nothing
        pad = (torch.arange(q.shape[1], device=q.device) >= lengths[:, None])[:, :, None]  # [B, T, 1]
        q, k, v = (x.masked_fill(pad[..., None], 0) for x in (q, k, v))
    if q.shape[1] == 1:
        top, bottom, S = step(q, k, v, state, lengths)
    else:
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, state))
        run = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
        top, bottom, S = run(q, k, v, state, lengths, chunk(q.shape[1]))
    return (top, bottom, S) if pad is None else (top.masked_fill(pad[..., None], 0), bottom.masked_fill(pad, 0), S)


def chunk(T: int) -> int:
    """How long a chunk is: all of a short input (the quadratic form), else equal parts; 130 tokens are 3 x 44, not 3 x 64."""
    if T <= QUADRATIC:
        return T
    N = (T + CHUNK - 1) // CHUNK
    return (T + N - 1) // N


@exact
def step(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """One token: the recurrence itself."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q1, k1, v1 = (x.to(dtype).movedim(1, 2) for x in (q, k, v))  # [B, H, 1, F or V]
    one = v1.new_ones(*v1.shape[:3], 1) if lengths is None else (lengths > 0).to(dtype)[:, None, None, None].expand(*v1.shape[:3], 1)
    new = packed(k1, 1.0).mT * torch.cat([v1, one], -1)  # [B, H, E, V + 1]
    S = new if state is None else state.to(dtype) + new
    o = packed(q1, 0.5) @ S
    return o[..., :-1].movedim(2, 1).clone(), o[..., -1].movedim(2, 1).clone(), S


def packed(x: Tensor, square: float) -> Tensor:
    """[.., F] -> [.., E], the squares times `square`."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pairs = x[..., i] * x[..., j]
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs if square == 1 else pairs * torch.where(i == j, square, 1.0).to(x.dtype)], -1)


@exact
def chunked(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> numerator, denominator, and the new state; at pads the first two are of no meaning."""
    (B, T, H, F), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, E = (T + C - 1) // C, 1 + F + F * (F + 1) // 2
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = torch.zeros(X, E, V + 1, dtype=dtype, device=v.device) if state is None else state.to(dtype).reshape(X, E, V + 1)
    top, bottom = S.new_empty(B, N * C, H, V), S.new_empty(B, N * C, H, 1)
    inputs = [*padded(N * C, q, k, v), ones(B, T, N * C, H, lengths, S)]
    for part in groups(N, C, X):
        Q, K, V1 = local(N, part, dtype, *inputs)
        out = torch.bmm(weights(torch.bmm(Q.mT, K)), V1)
        before, S = scan(S, K, V1, part)
        if N > 1 or state is not None:
            out.baddbmm_(rows(Q, 0.5).mT, before)
        put(top, N, part, out[..., :-1])
        put(bottom, N, part, out[..., -1:])
    return crop(top, T), crop(bottom, T).squeeze(-1), S.view(B, H, E, V + 1)


@torch.library.custom_op("memarch::taylor_attention_backward", mutates_args=())
@exact
def chunked_backward(
    dtop: Tensor, dbottom: Tensor, dstate: Maybe, q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe, C: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v and of the initial state (empty where there is none)."""
    (B, T, H, F), V, X = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    N, E = (T + C - 1) // C, 1 + F + F * (F + 1) // 2
    dtype = dtop.dtype
    dS = dtop.new_zeros(X, E, V + 1) if dstate is None else dstate.reshape(X, E, V + 1)
    dq, dk, dv = dtop.new_empty(B, N * C, H, F), k.new_empty(B, N * C, H, F), v.new_empty(B, N * C, H, V)
    inputs = [*padded(N * C, q, k, v), ones(B, T, N * C, H, lengths, dtop)]
    dtop, dbottom = padded(N * C, dtop, dbottom[..., None])

    # From the last chunk to the first: what each chunk does for itself, and what later chunks want from its keys and values.
    for part in reversed(list(groups(N, C, X))):
        Q, K, V1 = local(N, part, dtype, *inputs)
        dO = join(N, part, dtype, dtop, dbottom)
        A = torch.bmm(Q.mT, K)
        dA = torch.bmm(dO, V1.mT).mul_(1 + A).tril_()  # dw/da = 1 + a
        dQ, dK, dV = torch.bmm(K, dA.mT), torch.bmm(Q, dA), torch.bmm(weights(A).mT, dO)  # [F, C], [F, C], [C, V + 1]
        if N > 1 or dstate is not None or state is not None:
            writes = torch.bmm(rows(Q, 0.5), dO)  # what each chunk adds to dS
            after = torch.empty_like(writes)
            for i in reversed(range(part.stop - part.start)):
                at = slice(i * X, (i + 1) * X)
                after[at] = dS
                dS = dS + writes[at]
            dV.baddbmm_(rows(K, 1.0).mT, after)
            unrows(dK, torch.bmm(after, V1.mT), K, 1.0)
        put(dq, N, part, dQ.mT)
        put(dk, N, part, dK.mT)
        put(dv, N, part, dV[..., :-1])

    # From the first to the last: what queries read from the state.
    if N > 1 or state is not None:
        S = dS.new_zeros(X, E, V + 1) if state is None else state.to(dtype).reshape(X, E, V + 1)
        for part in groups(N, C, X):
            Q, K, V1 = local(N, part, dtype, *inputs)
            before, S = scan(S, K, V1, part)
            dQ = cut(dq, N, part, dtype).mT.contiguous()
            unrows(dQ, torch.bmm(before, join(N, part, dtype, dtop, dbottom).mT), Q, 0.5)
            put(dq, N, part, dQ.mT)
    dinitial = dS.new_empty(0) if state is None else dS.view(B, H, E, V + 1).to(state.dtype)
    return crop(dq, T).to(q.dtype), crop(dk, T), crop(dv, T), dinitial


def weights(A: Tensor) -> Tensor:
    return torch.addcmul(A, A, A, value=0.5).add_(1).tril_()


def scan(S: Tensor, K: Tensor, V1: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """-> the state before every chunk of the group [n X, E, V+1] and after the last."""
    X = S.shape[0]
    added = torch.bmm(rows(K, 1.0), V1)
    for i in range(part.stop - part.start):
        at = slice(i * X, (i + 1) * X)
        new = S + added[at]
        added[at] = S
        S = new
    return added, S


def rows(x: Tensor, square: float) -> Tensor:
    """[Y, F, C] -> features [Y, E, C], the squares times `square`."""
    Y, F, C = x.shape
    out = x.new_empty(Y, 1 + F + F * (F + 1) // 2, C)
    out[:, 0] = 1
    out[:, 1 : 1 + F] = x
    for i, at in triangle(F):
        torch.mul(x[:, i, None], x[:, i:], out=out[:, at])
        if square != 1:
            out[:, at.start] *= square
    return out


def unrows(dx: Tensor, dout: Tensor, x: Tensor, square: float) -> None:
    """The backward of `rows`: adds to dx [Y, F, C]."""
    F = x.shape[1]
    dx += dout[:, 1 : 1 + F]
    for i, at in triangle(F):
        if square != 1:
            dout[:, at.start] *= square
        dx[:, i:].addcmul_(dout[:, at], x[:, i, None])
        dx[:, i] += (dout[:, at] * x[:, i:]).sum(1)


def triangle(F: int) -> Iterator[tuple[int, slice]]:
    """Where the products of x_i with x_i, x_{i+1}, .. stand among the features."""
    begin = 1 + F
    for i in range(F):
        yield i, slice(begin, begin + F - i)
        begin += F - i


def ones(B: int, T: int, end: int, H: int, lengths: Maybe, like: Tensor) -> Tensor:
    """[B, end, H, 1]: 1 for a token, 0 for a pad."""
    place = torch.arange(end, device=like.device)
    real = (place < T).expand(B, end) if lengths is None else place < lengths[:, None].clamp(max=T)
    return real.to(like.dtype)[:, :, None, None].expand(B, end, H, 1)


def local(N: int, part: slice, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, one: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> Q^T, K^T [n X, F, C] and V1 [n X, C, V+1]."""
    return turned(q, N, part, dtype), turned(k, N, part, dtype), join(N, part, dtype, v, one)


def turned(x: Tensor, N: int, part: slice, dtype: torch.dtype) -> Tensor:
    """As `cut`, with the tokens last."""
    y = view(x, N, part).mT
    return torch.empty(y.shape, dtype=dtype, device=x.device).copy_(y).flatten(0, 2)


def join(N: int, part: slice, dtype: torch.dtype, x: Tensor, last: Tensor) -> Tensor:
    """As `cut`, with `last` as one more column."""
    y = view(x, N, part)
    out = torch.empty(*y.shape[:-1], y.shape[-1] + 1, dtype=dtype, device=x.device)
    out[..., :-1].copy_(y)
    out[..., -1:].copy_(view(last, N, part))
    return out.flatten(0, 2)


operator = torch.library.custom_op("memarch::taylor_attention", chunked, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe, C: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, F), V = q.shape, v.shape[-1]
    new = v.new_empty(B, T, H, V, dtype=torch.promote_types(v.dtype, torch.float32))
    return new, new.new_empty(B, T, H), new.new_empty(B, H, 1 + F + F * (F + 1) // 2, V + 1)


@chunked_backward.register_fake
def _(
    dtop: Tensor, dbottom: Tensor, dstate: Maybe, q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe, C: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dinitial = dtop.new_empty(0) if state is None else state.new_empty(state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.C = inputs
    ctx.save_for_backward(*tensors)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:2]]
    ctx.set_materialize_grads(False)  # a final state that nobody asks for costs the backward nothing


def _gradients(ctx: Any, dtop: Maybe, dbottom: Maybe, dstate: Maybe) -> tuple[Maybe, ...]:
    dtop, dbottom = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((dtop, dbottom), ctx.like, strict=True))
    q, k, v, state, lengths = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    dq, dk, dv, dinitial = chunked_backward(dtop, dbottom, dstate, q, k, v, state, lengths, ctx.C)
    return dq, dk, dv, None if state is None else dinitial, None, None


operator.register_autograd(_gradients, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, C: int, score_like: int, value_like: int, state_like: int) -> int:
    """How many products cost like [C,F][F,C], like [C,C][C,V+1] and like [E,C][C,V+1] in every chunk."""
    (B, T, H, F), V = q, v[3]
    E = 1 + F + F * (F + 1) // 2
    return 2 * B * H * -(-T // C) * C * (C * (score_like * F + value_like * (V + 1)) + state_like * E * (V + 1))


def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, state: Any, lengths: Any, C: int, **_: Any) -> int:
    return _flops(q, v, C, 1, 1, 2 if q[1] > C or state is not None else 1)


def _backward_flops(dtop: Any, dbottom: Any, dstate: Any, q: torch.Size, k: torch.Size, v: torch.Size, state: Any, lengths: Any, C: int, **_: Any) -> int:
    reads = q[1] > C or state is not None
    return _flops(q, v, C, 3, 2, 3 * (reads or dstate is not None) + 2 * reads)


FLOPS = {"taylor_attention": _forward_flops, "taylor_attention_backward": _backward_flops}
