"""The exact linear memory for a GPU, in chunks of C tokens; notation as in linear.py and gates.py, but the steps are a factor of E and of all it is in:

    E = D^eta theta    G = D^a r E    L = K K^T o G-    A^-1 = (1 + L)^-1    e = A^-1 (V - beta- K M - f- K S)

What is solved for are the errors e_t = v_t - k_t M_{t-1} and not what is written, theta e, so that the gradient of a step divides by nothing.

What touches the memory goes through the chunks one after the other, everything else through all of them at once:

    _solve  -> the gates, A^-1, W = A^-1 [beta- K, f- K], A^-1 V, P = Q K^T o G
    _scan   -> [M, S] before every chunk    e = A^-1 V - W [M, S]    M <- beta_C M + f_C S + K^T (G_C e)    S <- m_C S + K^T (E_C e)
    _read   O = beta Q M + f Q S + P e

The backward repeats the first two, as what they write is several times the inputs, and goes the same way back, [dM, dS] after a chunk:

    _inside     de = P^T dO, what the chunk itself asks of e
    _scan_back  de += G_C K dM + E_C K dS    dM <- beta_C dM + Q^T (beta dO) - W_M^T de    dS <- f_C dM + m_C dS + Q^T (f dO) - W_S^T de
    _scores     dV = A^-T de    dP = dO e^T    dL = -dV e^T    dG = dP o Q K^T + dL o K K^T, the latter one row higher
    _gradients  dQ = beta dO M^T + f dO S^T + (dP o G) K    alike dK, and the gradients of the vectors
    _gates      of x_t = y_t x_{t-1} + z_t, which is what all of them are: dz = D^y^T dx, and log y_t has the gradient dz_t . y_t x_{t-1}

A product with a transposed factor reads that factor transposed, so whatever is needed both ways makes a way through memory between two kernels.
The vectors of a chunk are rows of [R, C]: beta, beta-, G_C, with momentum f, f-, E_C too, and m, of which only the last entry counts.

    B rows   T tokens   H heads   K key width   V value width   J K or 2 K   N chunks   C tokens in a chunk   X = B H
    OP type of factors   MIX type of the gates' factors   ACC type of sums
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.delta_rule.triton_impl import _fine, _inverse
from memarch.kernels.launch import Check, accumulator, begin, dot, launch, load, noted, operand, precision, store, tile

CHUNK = 64  # rows of one Hopper matrix instruction
PLAIN = 16  # the same for float32, whose exact products go through registers and spill with more
BLOCK = 64  # widths are worked on in pieces of this
HELD = 8192  # numbers of a memory that go through the chunks in the registers of one program
WIDEST = 256  # a program holds all of K, of M and of S

BETA, BETA_BEFORE, LEFT_M, F, F_BEFORE, LEFT_S, ALONE = (tl.constexpr(r) for r in range(7))  # rows of a chunk's vectors

Maybe = Tensor | None


def why_not(K: int) -> str | None:
    return f"keys are at most {WIDEST} wide, for all of them have to be on chip; they are {K}" if K > WIDEST else None


def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    inputs = q, k, v, log_decay, log_momentum, step, state
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call = operator if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
    return call(*inputs, lengths)


@triton.jit
def _begin(x, n, T, H, lengths, C: tl.constexpr):
    """As `begin`, and how many of the tokens left are to be counted."""
    at, room = begin(x, n, T, H, C)
    left = room
    if lengths is not None:
        left = tl.minimum(room, tl.load(lengths + x // H) - n * C)
    return at, left, room


@triton.jit
def _gate(x, at, i, H, left, ACC: tl.constexpr):
    """The numbers of tokens i [C], zero for a token that is none."""
    return tl.load(x + at + i * H, (i >= 0) & (i < left), 0.0).to(ACC)


@triton.jit
def _decay(log, late, early, REVERSE: tl.constexpr = False):
    """The product of gates after `early` up to `late`, zero if they come the other way round. Along the last axis late grows, log being that of late; or in
    REVERSE early, log being that of the next token. Every entry is a sum of its own: differences lose what is small."""
    return tl.where(late >= early, tl.exp(tl.cumsum(tl.where(late > early, log, 0.0), 1, REVERSE)), 0.0)


@triton.jit
def _solve(
    q, k, v, log_decay, log_momentum, step, lengths, inverse, w, value, rows, p, g, T, H,
    K: tl.constexpr, V: tl.constexpr, J: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, MIX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inverse and g are for the backward, or None."""
    x, n = tl.program_id(0), tl.program_id(1)
    at, left, _ = _begin(x, n, T, H, lengths, C)
    chunk = x.to(tl.int64) * tl.num_programs(1) + n
    i = tl.arange(0, C)
    last = (i == C - 1)[:, None]
    rows += chunk * R * C + i
    theta = _gate(step, at, i, H, left, ACC)
    log = _gate(log_decay, at, i, H, left, ACC)
    beta_before = tl.exp(tl.cumsum(_gate(log_decay, at, i - 1, H, left, ACC), 0))
    tl.store(rows + BETA * C, tl.exp(tl.cumsum(log, 0)))
    tl.store(rows + BETA_BEFORE * C, beta_before)
    D = _decay(_gate(log_decay, at, i + 1, H, left, ACC)[None, :], i[:, None] - 1, i[None, :], True)  # D-
    f_before = tl.zeros([C], ACC)
    if log_momentum is not None:
        m = tl.exp(tl.cumsum(_gate(log_momentum, at, i, H, left, ACC), 0))
        E = _decay(_gate(log_momentum, at, i + 1, H, left, ACC)[None, :], i[:, None], i[None, :], True) * theta[None, :]
        known = tl.where(i < left, m, 0.0)
        f_before = tl.sum(D * known[None, :], 1)
        tl.store(rows + F * C, tl.exp(log) * f_before + known)
        tl.store(rows + F_BEFORE * C, f_before)
        tl.store(rows + LEFT_S * C, tl.sum(tl.where(last, E, 0.0), 0))
        tl.store(rows + ALONE * C, m)
        E = tl.where((i < left)[:, None], E, 0.0)
        before = _fine(D, E, MIX, PRECISION)
    else:
        E = tl.where(i[:, None] == i[None, :], theta[None, :], 0.0)
        before = D * theta[None, :]
    G = tl.exp(log)[:, None] * before + E
    tl.store(rows + LEFT_M * C, tl.sum(tl.where(last, G, 0.0), 0))
    if g is not None:
        store(g + chunk * C * C, i, i, C, 1, C, C, G)

    P, L = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    for d in range(0, K, BK):
        j = d + tl.arange(0, BK)
        keys = load(k + at * K, j, i, 1, H * K, K, left, OP)  # transposed
        P += dot(load(q + at * K, i, j, H * K, 1, left, K, OP), keys, OP, PRECISION)
        L += dot(load(k + at * K, i, j, H * K, 1, left, K, OP), keys, OP, PRECISION)
    store(p + chunk * C * C, i, i, C, 1, C, C, P * G)
    A = _inverse(L * before, C, OP, PRECISION).to(OP)
    if inverse is not None:
        store(inverse + chunk * C * C, i, i, C, 1, C, C, A)
    for d in range(0, K, BK):
        j = d + tl.arange(0, BK)
        erase = load(k + at * K, i, j, H * K, 1, left, K, ACC)
        store(w + at * J, i, j, H * J, 1, left, K, dot(A, erase * beta_before[:, None], OP, PRECISION))
        if log_momentum is not None:
            store(w + at * J + K, i, j, H * J, 1, left, K, dot(A, erase * f_before[:, None], OP, PRECISION))
    for d in range(0, V, BV):
        j = d + tl.arange(0, BV)
        store(value + at * V, i, j, H * V, 1, left, V, dot(A, load(v + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION))


@triton.jit
def _scan(
    k, w, value, rows, lengths, state, states, e, final, T, H, N,
    K: tl.constexpr, V: tl.constexpr, J: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK holds all of K."""
    x = tl.program_id(0)
    i, d, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    whole = x.to(tl.int64) * J * V
    M, S = tl.zeros([BK, BV], ACC), tl.zeros([BK, BV], ACC)
    if state is not None:
        M += load(state + whole, d, j, V, 1, K, V, ACC)
        if J > K:
            S += load(state + whole + K * V, d, j, V, 1, K, V, ACC)
    for n in range(N):
        at, left, _ = _begin(x, n, T, H, lengths, C)
        chunk = x.to(tl.int64) * N + n
        row = rows + chunk * R * C
        error = load(value + at * V, i, j, H * V, 1, left, V, ACC)
        error -= dot(load(w + at * J, i, d, H * J, 1, left, K, OP), M, OP, PRECISION)
        store(states + chunk * J * V, d, j, V, 1, K, V, M)
        if J > K:
            error -= dot(load(w + at * J + K, i, d, H * J, 1, left, K, OP), S, OP, PRECISION)
            store(states + chunk * J * V + K * V, d, j, V, 1, K, V, S)
        store(e + at * V, i, j, H * V, 1, left, V, error)
        keys = load(k + at * K, d, i, 1, H * K, K, left, OP)  # transposed
        M = M * tl.load(row + BETA * C + C - 1) + dot(keys, error * tl.load(row + LEFT_M * C + i)[:, None], OP, PRECISION)
        if J > K:
            M += S * tl.load(row + F * C + C - 1)
            S = S * tl.load(row + ALONE * C + C - 1) + dot(keys, error * tl.load(row + LEFT_S * C + i)[:, None], OP, PRECISION)
    store(final + whole, d, j, V, 1, K, V, M)
    if J > K:
        store(final + whole + K * V, d, j, V, 1, K, V, S)


@triton.jit
def _read(
    q, p, rows, lengths, states, e, o, T, H, N,
    K: tl.constexpr, V: tl.constexpr, J: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left, room = _begin(x, n, T, H, lengths, C)
    chunk = x.to(tl.int64) * N + n
    i, j = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    rows += chunk * R * C + i
    OM, OS = tl.zeros([C, BV], ACC), tl.zeros([C, BV], ACC)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        Q = load(q + at * K, i, d, H * K, 1, left, K, OP)
        OM += dot(Q, load(states + chunk * J * V, d, j, V, 1, K, V, OP), OP, PRECISION)
        if J > K:
            OS += dot(Q, load(states + chunk * J * V + K * V, d, j, V, 1, K, V, OP), OP, PRECISION)
    O = OM * tl.load(rows + BETA * C)[:, None]
    if J > K:
        O += OS * tl.load(rows + F * C)[:, None]
    O += dot(load(p + chunk * C * C, i, i, C, 1, C, C, OP), load(e + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION)
    store(o + at * V, i, j, H * V, 1, room, V, O)


@triton.jit
def _inside(
    p, do, lengths, inside, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left, _ = _begin(x, n, T, H, lengths, C)
    i = tl.arange(0, C)
    P = load(p + (x.to(tl.int64) * tl.num_programs(1) + n) * C * C, i, i, 1, C, C, C, OP)  # transposed
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        store(inside + at * V, i, j, H * V, 1, left, V, dot(P, load(do + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION))


@triton.jit
def _scan_back(
    q, k, w, do, rows, lengths, dfinal, inside, de, after, dstate, T, H, N,
    K: tl.constexpr, V: tl.constexpr, J: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """after: [dM, dS] after every chunk."""
    x = tl.program_id(0)
    i, d, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    whole = x.to(tl.int64) * J * V
    dM, dS = tl.zeros([BK, BV], ACC), tl.zeros([BK, BV], ACC)
    if dfinal is not None:
        dM += load(dfinal + whole, d, j, V, 1, K, V, ACC)
        if J > K:
            dS += load(dfinal + whole + K * V, d, j, V, 1, K, V, ACC)
    for b in range(N):
        n = N - 1 - b
        at, left, _ = _begin(x, n, T, H, lengths, C)
        chunk = x.to(tl.int64) * N + n
        row = rows + chunk * R * C
        K_ = load(k + at * K, i, d, H * K, 1, left, K, OP)
        dE = load(inside + at * V, i, j, H * V, 1, left, V, ACC)
        dE += dot(K_, dM, OP, PRECISION) * tl.load(row + LEFT_M * C + i)[:, None]
        store(after + chunk * J * V, d, j, V, 1, K, V, dM)
        if J > K:
            dE += dot(K_, dS, OP, PRECISION) * tl.load(row + LEFT_S * C + i)[:, None]
            store(after + chunk * J * V + K * V, d, j, V, 1, K, V, dS)
        store(de + at * V, i, j, H * V, 1, left, V, dE)
        asked = load(q + at * K, d, i, 1, H * K, K, left, OP)  # transposed
        dO = load(do + at * V, i, j, H * V, 1, left, V, ACC)
        if J > K:
            dS = dS * tl.load(row + ALONE * C + C - 1) + dM * tl.load(row + F * C + C - 1)
            dS += dot(asked, dO * tl.load(row + F * C + i)[:, None], OP, PRECISION)
            dS -= dot(load(w + at * J + K, d, i, 1, H * J, K, left, OP), dE, OP, PRECISION)
        dM = dM * tl.load(row + BETA * C + C - 1) + dot(asked, dO * tl.load(row + BETA * C + i)[:, None], OP, PRECISION)
        dM -= dot(load(w + at * J, d, i, 1, H * J, K, left, OP), dE, OP, PRECISION)
    store(dstate + whole, d, j, V, 1, K, V, dM)
    if J > K:
        store(dstate + whole + K * V, d, j, V, 1, K, V, dS)


@triton.jit
def _scores(
    q, k, inverse, g, lengths, e, do, de, dv, dp, dl, dg, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dp: dP o G; dl: dL o G-. Token t finds what G has at t - 1, so dV and K are taken from the next token on, and from the first after the last."""
    x, n = tl.program_id(0), tl.program_id(1)
    at, left, room = _begin(x, n, T, H, lengths, C)
    square = (x.to(tl.int64) * tl.num_programs(1) + n) * C * C
    i = tl.arange(0, C)
    later = (i + 1) % C
    dP, dL = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        error = load(e + at * V, j, i, 1, H * V, V, left, OP)  # transposed
        dV = dot(load(inverse + square, later, i, 1, C, C, C, OP), load(de + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION)
        store(dv + at * V, later, j, H * V, 1, room, V, dV)
        dP += dot(load(do + at * V, i, j, H * V, 1, left, V, OP), error, OP, PRECISION)
        dL -= dot(dV, error, OP, PRECISION)
    dL = tl.where(later[:, None] > i[None, :], dL, 0.0)
    G = load(g + square, i, i, C, 1, C, C, ACC)
    store(dp + square, i, i, C, 1, C, C, dP * G)
    store(dl + square, later, i, C, 1, C, C, dL * G)
    read, erase = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        keys = load(k + at * K, d, i, 1, H * K, K, left, OP)  # transposed
        read += dot(load(q + at * K, i, d, H * K, 1, left, K, OP), keys, OP, PRECISION)
        erase += dot(load(k + at * K, later, d, H * K, 1, left, K, OP), keys, OP, PRECISION)
    store(dg + square, i, i, C, 1, C, C, dP * read + dL * erase)


@triton.jit
def _gradients(
    q, k, rows, lengths, states, after, e, do, dv, dp, dl, dq, dk, drows, T, H, N,
    K: tl.constexpr, V: tl.constexpr, J: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of K. drows [tiles, X, N, R, C] is to be summed over the tiles."""
    x, n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, left, room = _begin(x, n, T, H, lengths, C)
    chunk = x.to(tl.int64) * N + n
    square, whole = chunk * C * C, chunk * J * V
    i, d = tl.arange(0, C), part * BK + tl.arange(0, BK)
    last = i == C - 1
    rows += chunk * R * C + i
    drows += (part * tl.num_programs(0).to(tl.int64) * N + chunk) * R * C + i
    dQ, dK = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    for s in tl.static_range(J // K):  # S is M, then S
        read, erase, write = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
        kept, alone = tl.zeros([BK], ACC), tl.zeros([BK], ACC)
        for first in range(0, V, BV):
            j = first + tl.arange(0, BV)
            S = load(states + whole + s * K * V, j, d, 1, V, V, K, ACC)  # transposed, as are dM and dS
            dM = load(after + whole, j, d, 1, V, V, K, ACC)
            dS = dM
            if s == 1:
                dS = load(after + whole + K * V, j, d, 1, V, V, K, ACC)
                alone += tl.sum(S * dS, 0)
            kept += tl.sum(S * dM, 0)
            read += dot(load(do + at * V, i, j, H * V, 1, left, V, OP), S, OP, PRECISION)
            erase -= dot(load(dv + at * V, i, j, H * V, 1, left, V, OP), S, OP, PRECISION)
            write += dot(load(e + at * V, i, j, H * V, 1, left, V, OP), dS, OP, PRECISION)
        Q, K_ = load(q + at * K, i, d, H * K, 1, left, K, ACC), load(k + at * K, i, d, H * K, 1, left, K, ACC)
        row, drow = rows + 3 * s * C, drows + 3 * s * C
        dQ += read * tl.load(row + BETA * C)[:, None]
        dK += erase * tl.load(row + BETA_BEFORE * C)[:, None] + write * tl.load(row + LEFT_M * C)[:, None]
        tl.store(drow + BETA * C, tl.sum(Q * read, 1) + tl.where(last, tl.sum(kept, 0), 0.0))
        tl.store(drow + BETA_BEFORE * C, tl.sum(K_ * erase, 1))
        tl.store(drow + LEFT_M * C, tl.sum(K_ * write, 1))
        if s == 1:
            tl.store(drows + ALONE * C, tl.where(last, tl.sum(alone, 0), 0.0))
    Q, K_ = load(q + at * K, i, d, H * K, 1, left, K, OP), load(k + at * K, i, d, H * K, 1, left, K, OP)
    dQ += dot(load(dp + square, i, i, C, 1, C, C, OP), K_, OP, PRECISION)
    dK += dot(load(dp + square, i, i, 1, C, C, C, OP), Q, OP, PRECISION)
    both = load(dl + square, i, i, C, 1, C, C, OP) + load(dl + square, i, i, 1, C, C, C, OP)  # one of the two is zero
    dK += dot(both, K_, OP, PRECISION)
    store(dq + at * K, i, d, H * K, 1, room, K, dQ)
    store(dk + at * K, i, d, H * K, 1, room, K, dK)


@triton.jit
def _sum(drows, row, i, tiles, apart, C: tl.constexpr, ACC: tl.constexpr):
    """The gradient of entries i of a row, zero past its end."""
    total = tl.zeros([C], ACC)
    for part in range(tiles):
        total += tl.load(drows + part * apart + row * C + i, i < C, 0.0)
    return total


@triton.jit
def _gates(
    log_decay, log_momentum, step, lengths, dg, drows, dlog_decay, dlog_momentum, dstep, T, H, N, tiles,
    R: tl.constexpr, C: tl.constexpr, MIX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left, room = _begin(x, n, T, H, lengths, C)
    chunk = x.to(tl.int64) * N + n
    each = tl.num_programs(0).to(tl.int64) * N * R * C
    drows += chunk * R * C
    i = tl.arange(0, C)
    real, last, below = i < left, (i == C - 1)[:, None], i[:, None] > i[None, :]
    writes = tl.where(real, i, C)  # what a token that is none has to write never comes
    theta = _gate(step, at, i, H, left, ACC)
    log = _gate(log_decay, at, i, H, left, ACC)
    dG = load(dg + chunk * C * C, i, i, C, 1, C, C, ACC) + tl.where(last, _sum(drows, LEFT_M, i, tiles, each, C, ACC)[None, :], 0.0)
    dE = _fine(_decay(log[None, :], i[None, :], writes[:, None]), dG, MIX, PRECISION)
    D = _decay(_gate(log_decay, at, i + 1, H, left, ACC)[None, :], i[:, None], writes[None, :], True)
    before = tl.where(below, D, 0.0)  # a_t D- of token t
    dbeta = _sum(drows, BETA, i, tiles, each, C, ACC) + _sum(drows, BETA_BEFORE, i + 1, tiles, each, C, ACC)
    dlog = tl.sum(D * dbeta[:, None], 0) * tl.exp(tl.cumsum(log, 0))
    if log_momentum is not None:
        log_eta = _gate(log_momentum, at, i, H, left, ACC)
        m = tl.exp(tl.cumsum(log_eta, 0))
        df = _sum(drows, F, i, tiles, each, C, ACC) + _sum(drows, F_BEFORE, i + 1, tiles, each, C, ACC)
        df = tl.sum(D * df[:, None], 0)
        dlog += df * tl.sum(before * m[None, :], 1)
        P = _decay(_gate(log_momentum, at, i + 1, H, left, ACC)[None, :], i[:, None], i[None, :], True)
        dlog += tl.sum(dE * _fine(before, P * theta[None, :], MIX, PRECISION), 1)
        dE += tl.where(last, _sum(drows, LEFT_S, i, tiles, each, C, ACC)[None, :], 0.0)
        dtheta = tl.sum(P * dE, 0)
        dP = _fine(_decay(log_eta[None, :], i[None, :], i[:, None]), dE * theta[None, :], MIX, PRECISION)
        dm = df + _sum(drows, ALONE, i, tiles, each, C, ACC)
        dlog_eta = tl.sum(tl.where(below, dP * P, 0.0), 1) + tl.sum(P * dm[:, None], 0) * m
        tl.store(dlog_momentum + at + i * H, tl.where(real, dlog_eta, 0.0), i < room)
    else:
        dlog += tl.sum(dE * before * theta[None, :], 1)
        dtheta = tl.sum(tl.where(i[:, None] == i[None, :], dE, 0.0), 0)
    tl.store(dlog_decay + at + i * H, dlog, i < room)
    tl.store(dstep + at + i * H, dtheta, i < room)


def _remembered(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe, back: bool
) -> dict[str, Any]:
    """Everything that kernels ask for, by the names they use, once the pass over the chunks is done: states [X,N,J,V] before every chunk, the new state,
    the errors e, W, P and the vectors as rows; A^-1 and G for the way back."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    sums = torch.promote_types(kind, torch.float32)
    C, widest = (PLAIN, 32) if kind == torch.float32 else (CHUNK, BLOCK)
    X, N, (J, R) = B * H, triton.cdiv(T, C), (K, 3) if log_momentum is None else (2 * K, 7)
    names = "q", "k", "v", "log_decay", "log_momentum", "step", "state", "lengths"
    given = (q, k, v, log_decay, log_momentum, step, state, lengths)
    a: dict[str, Any] = {n: None if x is None else x.contiguous() for n, x in zip(names, given, strict=True)}
    a |= {"T": T, "H": H, "N": N, "K": K, "V": V, "J": J, "R": R, "C": C, "BK": min(tile(K), widest), "BV": min(tile(V), widest)}
    a |= {"OP": operand(kind), "ACC": accumulator(kind), "PRECISION": precision()}
    a["MIX"] = operand(torch.bfloat16 if kind == torch.float16 else kind)  # the gradients of gates need the range of float32
    a |= {"w": q.new_empty(B, T, H, J, dtype=kind), "states": q.new_empty(X, N, J, V, dtype=kind), "final": q.new_empty(B, H, J, V, dtype=sums)}
    a |= {n: q.new_empty(B, T, H, V, dtype=kind) for n in ("value", "e")}
    a |= {n: q.new_empty(X, N, C, C, dtype=kind) if n == "p" or back else None for n in ("p", "inverse", "g")}
    a["rows"] = q.new_empty(X, N, R, C, dtype=sums)
    launch(_solve, (X, N), warps=8, **a)  # with 4 registers spill
    scan(_scan, a)
    return a


def scan(kernel: Any, a: dict[str, Any]) -> None:
    """One program for all chunks of a tile of V, with all of K: as many columns as leave M and S in the registers. Eight warps need 128 rows: what has
    only 64, as everywhere else, both halves would compute."""
    BK = tile(a["K"])
    height = BK * a["J"] // a["K"]
    BV = min(a["BV"], HELD // height) if a["C"] == CHUNK else 16
    grid = a["states"].shape[0], triton.cdiv(a["V"], BV)
    launch(kernel, grid, warps=4 if BK <= 64 else 8, stages=2 if height <= 256 else 1, **a | {"BK": BK, "BV": BV})


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    a = _remembered(q, k, v, log_decay, log_momentum, step, state, lengths, back=False)
    o = v.new_empty(v.shape)
    launch(_read, (*a["states"].shape[:2], triton.cdiv(a["V"], a["BV"])), o=o, **a)
    return o, a["final"]


def backward(
    do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe
) -> list[Tensor]:
    """-> the gradients of q, k, v, log_decay, log_momentum (empty where there is none), step and the initial state."""
    a = _remembered(q, k, v, log_decay, log_momentum, step, state, lengths, back=True)
    (X, N), BK = a["states"].shape[:2], min(a["BK"], 32)  # of _gradients, whose registers spill with 64
    tiles = triton.cdiv(a["K"], BK)
    a |= {"do": do.contiguous(), "dfinal": None if dfinal is None else dfinal.contiguous(), "tiles": tiles}
    for name in ("q", "k", "v", "log_decay", "log_momentum", "step"):
        a[f"d{name}"] = q.new_empty(0) if a[name] is None else torch.empty_like(a[name])
    for name, like in (("dstate", "final"), ("after", "states"), ("inside", "e"), ("de", "e"), ("dp", "p"), ("dl", "p")):
        a[name] = torch.empty_like(a[like])
    a["dg"] = torch.empty_like(a["p"], dtype=a["rows"].dtype)
    a["drows"] = a["rows"].new_empty(tiles, *a["rows"].shape)
    launch(_inside, (X, N), **a)
    scan(_scan_back, a)
    launch(_scores, (X, N), **a)
    launch(_gradients, (X, N, tiles), **a | {"BK": BK})
    launch(_gates, (X, N), warps=8, **a)  # with 4 registers spill
    return [a[f"d{n}"] for n in ("q", "k", "v", "log_decay", "log_momentum", "step", "state")]


operator = torch.library.custom_op("memarch::neural_memory_linear_triton", forward, mutates_args=())
operator_backward = torch.library.custom_op("memarch::neural_memory_linear_triton_backward", backward, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _new_state(q, v, log_momentum)


@operator_backward.register_fake
def _(
    do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, state: Maybe, lengths: Maybe
) -> list[Tensor]:
    gates = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_decay, log_momentum, step))
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *gates, _new_state(q, v, log_momentum)]


def _new_state(q: Tensor, v: Tensor, log_momentum: Maybe) -> Tensor:
    (B, _, H, K), V = q.shape, v.shape[-1]
    return v.new_empty(B, H, K if log_momentum is None else 2 * K, V, dtype=torch.promote_types(v.dtype, torch.float32))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients_of(ctx: Any, do: Maybe, dfinal: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    _, _, v, _, log_momentum, _, state, _ = saved
    *dx, dmomentum, dstep, dstate = operator_backward(torch.zeros_like(v) if do is None else do, dfinal, *saved)
    return *dx, None if log_momentum is None else dmomentum, dstep, None if state is None else dstate.to(state.dtype), None


operator.register_autograd(_gradients_of, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, momentum: Any, scores: int, values: int, memory: int, scalars: tuple[int, int]) -> int:
    """How many products cost like [C,K][K,C], like [C,C][C,V], like [C,J][J,V], and like [C,C][C,C] without and with momentum in every chunk; and W."""
    (B, T, H, K), V, has = q, v[3], momentum is not None
    N, C = triton.cdiv(T, CHUNK), CHUNK
    return 2 * B * H * N * C * (C * (scores * K + values * V) + (1 + has) * (C * K + memory * K * V) + scalars[has] * C * C)


flops.file(
    {
        "neural_memory_linear_triton": lambda q, k, v, a, e, *_, **__: _flops(q, v, e, 2, 2, 3, (0, 1)),
        "neural_memory_linear_triton_backward": lambda do, ds, q, k, v, a, e, *_, **__: _flops(q, v, e, 7, 5, 8, (1, 4)),
    }
)


def checks() -> Iterator[Check]:
    for dtype, K, V, momentum, carried in (
        (torch.bfloat16, 64, 64, True, True),
        (torch.bfloat16, 128, 128, True, True),
        (torch.bfloat16, 128, 256, True, False),
        (torch.bfloat16, 256, 512, True, True),
        (torch.bfloat16, 64, 64, False, True),
        (torch.bfloat16, 128, 128, False, False),
        (torch.float16, 64, 64, True, False),
        (torch.float32, 64, 64, True, True),
        (torch.float32, 128, 128, True, True),
        (torch.float32, 128, 256, False, False),
    ):
        q, v = (torch.empty(1, 2 * CHUNK, 1, n, dtype=dtype, device="meta") for n in (K, V))
        gate, state = q[..., 0], q.new_empty(1, 1, 2 * K if momentum else K, V, dtype=torch.float32)
        inputs = (q, q, v, gate, gate if momentum else None, gate, state if carried else None, q.new_empty(1, dtype=torch.int64) if carried else None)
        with noted() as found:
            forward(*inputs)
            backward(v, state if carried else None, *inputs)
        for check in {repr(check): check for check in found}.values():
            yield check._replace(wgmma=dtype != torch.float32)
