"""The (gated) delta rule for a GPU, in chunks of C tokens; notation and formulas as in torch_impl.

What touches the memory S goes through the chunks one after the other, everything else through all of them at once. So M is multiplied out first,
U = U' - W S with U' = M beta V and W = M beta e^G K, and the pass over the chunks is left with two products each:

    _solve  -> M, W, U'    _scan  -> S before every chunk, U    _read  -> O

The backward repeats the first two, as what they write is several times the inputs, and goes the same way back, dS being the gradient of S after a chunk:

    _inside     dU' = (Q K^T o D)^T dO                                        what the chunk itself asks of U
    _scan_back  dU = dU' + (e^{G_C - G} K) dS,  dS <- e^{G_C} dS + (e^G Q)^T dO - W^T dU
    _scores     dZ = M^T dU,  dV = beta dZ,  dA = dO U^T o D,  Y = dZ U^T o D  both without their diagonals
    _gradients  E = e^G dZ S^T + Y K,  the erasing k gets -beta E,  dbeta = v.dZ - k.E,  and the rest as in torch_impl

A product with a transposed factor reads that factor transposed, so whatever is needed both ways makes a way through memory between two kernels.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   X = B H   OP type of factors   ACC type of sums
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.delta_rule.torch_impl import step
from memarch.kernels.launch import Check, accumulator, begin, dot, launch, load, noted, operand, precision, store, tile

CHUNK = 64  # rows of one Hopper matrix instruction
PLAIN = 16  # the same for float32, whose exact products go through registers and spill with more (and with keys over 128 even so)
BLOCK = 64  # widths are worked on in pieces of this

Maybe = Tensor | None


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    if lengths is not None:  # a token of zeros changes nothing and answers 0
        pad = (torch.arange(q.shape[1], device=q.device) >= lengths[:, None])[:, :, None]  # [B, T, 1]
        q, k, v = (x.masked_fill(pad[..., None], 0) for x in (q, k, v))
        beta, g = (x if x is None else x.masked_fill(pad, 0) for x in (beta, g))
    if q.shape[1] == 1:
        return step(q, k, v, beta, g, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state))
    run = operator if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
    return run(q, k, v, beta, g, state)


@triton.jit
def _gate(g, at, i, H, left, ACC: tl.constexpr):
    """G [C], and its last entry."""
    G = tl.zeros_like(i).to(ACC)
    if g is not None:
        G = tl.cumsum(tl.load(g + at + i * H, i < left, 0.0).to(ACC), 0)
    return G, tl.sum(tl.where(i == i.shape[0] - 1, G, 0.0), 0)


@triton.jit
def _decay(G, H, real):
    """e^{G - H} where real, else 0."""
    return tl.exp(tl.where(real, G - H, float("-inf")))


@triton.jit
def _fine(a, b, OP: tl.constexpr, PRECISION: tl.constexpr):
    """The product of two float32 matrices on units for 16 bits, to twice their precision: each factor is a rounded one and a rounded rest."""
    A, B = a.to(OP), b.to(OP)
    out = tl.dot(A, B, input_precision=PRECISION)
    if OP.primitive_bitwidth == 16:
        out += tl.dot(A, (b - B).to(OP)) + tl.dot((a - A).to(OP), B)
    return out


@triton.jit
def _inverse(L, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + L)^-1 for a strictly lower triangular L [C, C].

    The blocks of 16 on the diagonal are inverted row by row, all at once. With M their inverses and N = -M (what is below them), N^4 = 0 for C = 64
    and the answer is (1 + N^2) (1 + N) M. The same for L itself would be shorter, but powers of L can be huge where the inverse is not.
    """
    b: tl.constexpr = C // 16
    block = tl.arange(0, C) // 16
    diagonal = block[:, None] == block[None, :]
    own = tl.sum(tl.reshape(tl.where(diagonal, L, 0.0), [b, 16, b, 16]), 2)  # [b, 16, 16]
    i = tl.arange(0, 16)
    M = tl.zeros_like(own) + tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None]
    for r in range(1, 16):
        here = i[None, :, None] == r
        row = tl.sum(tl.where(here, own, 0.0), 1)  # [b, 16]
        M -= tl.where(here, tl.sum(row[:, :, None] * M, 1)[:, None, :], 0.0)
    M = tl.where(diagonal, tl.reshape(tl.broadcast_to(M[:, :, None, :], [b, 16, b, 16]), [C, C]), 0.0)
    if C > 16:
        N = -_fine(M, tl.where(diagonal, 0.0, L), OP, PRECISION)
        M += _fine(N, M, OP, PRECISION)
        M += _fine(_fine(N, N, OP, PRECISION), M, OP, PRECISION)
    return M


@triton.jit
def _solve(
    k, v, beta, g, inverse, w, value, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    i = tl.arange(0, C)
    G, _ = _gate(g, at, i, H, left, ACC)
    b = tl.load(beta + at + i * H, i < left, 0.0).to(ACC)
    L = tl.zeros([C, C], ACC)
    for d in range(0, K, BK):
        j = d + tl.arange(0, BK)
        L += dot(load(k + at * K, i, j, H * K, 1, left, K, OP), load(k + at * K, j, i, 1, H * K, K, left, OP), OP, PRECISION)
    L *= b[:, None] * _decay(G[:, None], G[None, :], i[:, None] > i[None, :])
    M = _inverse(L, C, OP, PRECISION).to(OP)
    store(inverse + (x.to(tl.int64) * tl.num_programs(1) + n) * C * C, i, i, C, 1, C, C, M)
    for d in range(0, K, BK):
        j = d + tl.arange(0, BK)
        erase = load(k + at * K, i, j, H * K, 1, left, K, ACC) * (b * tl.exp(G))[:, None]
        store(w + at * K, i, j, H * K, 1, left, K, dot(M, erase, OP, PRECISION))
    for d in range(0, V, BV):
        j = d + tl.arange(0, BV)
        scaled = load(v + at * V, i, j, H * V, 1, left, V, ACC) * b[:, None]
        store(value + at * V, i, j, H * V, 1, left, V, dot(M, scaled, OP, PRECISION))


@triton.jit
def _scan(
    k, w, value, g, state, states, u, final, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """value: U' with beta (then U is written), else V, which is U. BK holds all of K."""
    x = tl.program_id(0)
    i, d, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    whole = x.to(tl.int64) * K * V
    S = tl.zeros([BK, BV], ACC)
    if state is not None:
        S += load(state + whole, d, j, V, 1, K, V, ACC)
    for n in range(N):
        at, left = begin(x, n, T, H, C)
        G, last = _gate(g, at, i, H, left, ACC)
        store(states + (x.to(tl.int64) * N + n) * K * V, d, j, V, 1, K, V, S)
        U = load(value + at * V, i, j, H * V, 1, left, V, ACC)
        if w is not None:
            U -= dot(load(w + at * K, i, d, H * K, 1, left, K, OP), S, OP, PRECISION)
            store(u + at * V, i, j, H * V, 1, left, V, U)
        S = S * tl.exp(last) + dot(load(k + at * K, d, i, 1, H * K, K, left, OP), U * tl.exp(last - G)[:, None], OP, PRECISION)
    store(final + whole, d, j, V, 1, K, V, S)


@triton.jit
def _read(
    q, k, u, g, states, o, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    i, j = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    G, _ = _gate(g, at, i, H, left, ACC)
    A, O = tl.zeros([C, C], ACC), tl.zeros([C, BV], ACC)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        Q = load(q + at * K, i, d, H * K, 1, left, K, OP)
        A += dot(Q, load(k + at * K, d, i, 1, H * K, K, left, OP), OP, PRECISION)
        O += dot(Q, load(states + (x.to(tl.int64) * N + n) * K * V, d, j, V, 1, K, V, OP), OP, PRECISION)
    A *= _decay(G[:, None], G[None, :], i[:, None] >= i[None, :])
    O = O * tl.exp(G)[:, None] + dot(A, load(u + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION)
    store(o + at * V, i, j, H * V, 1, left, V, O)


@triton.jit
def _inside(
    q, k, do, g, inside, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at, left = begin(tl.program_id(0), tl.program_id(1), T, H, C)
    i = tl.arange(0, C)
    G, _ = _gate(g, at, i, H, left, ACC)
    A = tl.zeros([C, C], ACC)  # transposed
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        A += dot(load(k + at * K, i, d, H * K, 1, left, K, OP), load(q + at * K, d, i, 1, H * K, K, left, OP), OP, PRECISION)
    A = (A * _decay(G[None, :], G[:, None], i[None, :] >= i[:, None])).to(OP)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        store(inside + at * V, i, j, H * V, 1, left, V, dot(A, load(do + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION))


@triton.jit
def _scan_back(
    q, k, w, do, g, dfinal, inside, du, after, dstate, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """after: dS after every chunk."""
    x = tl.program_id(0)
    i, d, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    whole = x.to(tl.int64) * K * V
    dS = tl.zeros([BK, BV], ACC)
    if dfinal is not None:
        dS += load(dfinal + whole, d, j, V, 1, K, V, ACC)
    for m in range(N):
        n = N - 1 - m
        at, left = begin(x, n, T, H, C)
        G, last = _gate(g, at, i, H, left, ACC)
        store(after + (x.to(tl.int64) * N + n) * K * V, d, j, V, 1, K, V, dS)
        dU = dot(load(k + at * K, i, d, H * K, 1, left, K, OP), dS, OP, PRECISION) * tl.exp(last - G)[:, None]
        dU += load(inside + at * V, i, j, H * V, 1, left, V, ACC)
        store(du + at * V, i, j, H * V, 1, left, V, dU)
        dO = load(do + at * V, i, j, H * V, 1, left, V, ACC) * tl.exp(G)[:, None]
        dS = dS * tl.exp(last) + dot(load(q + at * K, d, i, 1, H * K, K, left, OP), dO, OP, PRECISION)
        if w is not None:
            dS -= dot(load(w + at * K, d, i, 1, H * K, K, left, OP), dU, OP, PRECISION)
    store(dstate + whole, d, j, V, 1, K, V, dS)


@triton.jit
def _scores(
    v, beta, g, inverse, u, do, du, dz, dv, da, y, dbeta, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbeta: the part v.dZ. Without beta only dA is wanted: dV is dU."""
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    square = (x.to(tl.int64) * tl.num_programs(1) + n) * C * C
    i = tl.arange(0, C)
    G, _ = _gate(g, at, i, H, left, ACC)
    dA, Y, told = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C], ACC)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        U = load(u + at * V, j, i, 1, H * V, V, left, OP)  # transposed
        dA += dot(load(do + at * V, i, j, H * V, 1, left, V, OP), U, OP, PRECISION)
        if beta is not None:
            dU = load(du + at * V, i, j, H * V, 1, left, V, OP)
            dZ = dot(load(inverse + square, i, i, 1, C, C, C, OP), dU, OP, PRECISION)
            Y += dot(dZ, U, OP, PRECISION)
            told += tl.sum(dZ * load(v + at * V, i, j, H * V, 1, left, V, ACC), 1)
            store(dz + at * V, i, j, H * V, 1, left, V, dZ)
            store(dv + at * V, i, j, H * V, 1, left, V, dZ * tl.load(beta + at + i * H, i < left, 0.0).to(ACC)[:, None])
    D = _decay(G[:, None], G[None, :], i[:, None] > i[None, :])
    store(da + square, i, i, C, 1, C, C, dA * D)
    if beta is not None:
        store(y + square, i, i, C, 1, C, C, Y * D)
        tl.store(dbeta + at + i * H, told, i < left)


@triton.jit
def _gradients(
    q, k, beta, g, states, after, u, do, dz, da, y, dq, dk, dbeta, dg, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of K. dbeta [1 + tiles, B, T, H] and dg [tiles, B, T, H] are to be summed over the tiles; the first of dbeta is of _scores."""
    x, n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, left = begin(x, n, T, H, C)
    square, whole = (x.to(tl.int64) * N + n) * C * C, (x.to(tl.int64) * N + n) * K * V
    tokens = tl.num_programs(0).to(tl.int64) * T
    i, d = tl.arange(0, C), part * BK + tl.arange(0, BK)
    G, last = _gate(g, at, i, H, left, ACC)
    newest = i == tl.minimum(left, C) - 1
    dQ, dK, E = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    same, kept = tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        S, dS = load(states + whole, j, d, 1, V, V, K, ACC), load(after + whole, j, d, 1, V, V, K, ACC)  # transposed
        dO, U = load(do + at * V, i, j, H * V, 1, left, V, OP), load(u + at * V, i, j, H * V, 1, left, V, OP)
        dQ += dot(dO, S, OP, PRECISION)
        dK += dot(U, dS, OP, PRECISION)
        same += tl.sum(dO.to(ACC) * U.to(ACC), 1)
        kept += tl.sum(S * dS, 0)
        if beta is not None:
            E += dot(load(dz + at * V, i, j, H * V, 1, left, V, OP), S, OP, PRECISION)
    Q, k_ = load(q + at * K, i, d, H * K, 1, left, K, ACC), load(k + at * K, i, d, H * K, 1, left, K, ACC)
    dQ = dQ * tl.exp(G)[:, None] + dot(load(da + square, i, i, C, 1, C, C, OP), k_, OP, PRECISION)
    dK *= tl.exp(last - G)[:, None]
    older = tl.where(newest, 0.0, tl.sum(dK * k_, 1))
    near = dot(load(da + square, i, i, 1, C, C, C, OP), Q, OP, PRECISION)
    if beta is not None:
        b = tl.load(beta + at + i * H, i < left, 0.0).to(ACC)
        E = E * tl.exp(G)[:, None] + dot(load(y + square, i, i, C, 1, C, C, OP), k_, OP, PRECISION)
        told = tl.sum(k_ * E, 1)
        tl.store(dbeta + (1 + part) * tokens + at + i * H, -told, i < left)
        near -= dot(load(y + square, i, i, 1, C, C, C, OP), k_ * b[:, None], OP, PRECISION)
        dK -= b[:, None] * E
    if g is not None:
        dG = tl.sum(Q * dQ, 1) - older - tl.sum(k_ * near, 1)
        if beta is not None:
            dG -= b * told
        dG += tl.where(newest, tl.sum(older, 0) + tl.exp(last) * tl.sum(kept, 0), 0.0)
        tl.store(dg + part * tokens + at + i * H, tl.cumsum(dG, 0, reverse=True), i < left)
    store(dq + at * K, i, d, H * K, 1, left, K, dQ + same[:, None] * k_)
    store(dk + at * K, i, d, H * K, 1, left, K, dK + near + same[:, None] * Q)


def _remembered(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe) -> dict[str, Any]:
    """Everything that kernels ask for, by the names they use, once the pass over the chunks is done: states [X,N,K,V] before every chunk, the new state,
    U as u, and with beta W and M; kind is the dtype of factors."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    C, widest = (PLAIN, 32) if kind == torch.float32 else (CHUNK, BLOCK)
    a: dict[str, Any] = {n: None if x is None else x.contiguous() for n, x in zip(("q", "k", "v", "beta", "g", "state"), (q, k, v, beta, g, state))}
    a |= {"T": T, "H": H, "N": triton.cdiv(T, C), "K": K, "V": V, "C": C, "BK": min(tile(K), widest), "BV": min(tile(V), widest), "kind": kind}
    a |= {"OP": operand(kind), "ACC": accumulator(kind), "PRECISION": precision()}
    a["states"], a["final"] = (q.new_empty(*n, K, V, dtype=torch.promote_types(kind, torch.float32)) for n in ((B * H, a["N"]), (B, H)))
    a |= {"w": None, "inverse": None, "value": a["v"], "u": a["v"]}
    if beta is not None:
        a["w"], a["value"], a["u"] = (x.new_empty(x.shape, dtype=kind) for x in (k, v, v))
        a["inverse"] = q.new_empty(B * H, a["N"], C, C, dtype=kind)
        launch(_solve, (B * H, a["N"]), **a)
    scan(_scan, a)
    return a


def scan(kernel: Any, a: dict[str, Any]) -> None:
    """One program for all chunks of a tile of V, with all of K: as many columns as leave S in the registers."""
    BK, BV = tile(a["K"]), a["BV"] if a["K"] <= 128 and a["C"] == CHUNK else 16
    launch(kernel, (a["states"].shape[0], triton.cdiv(a["V"], BV)), warps=8, **a | {"BK": BK, "BV": BV})


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe) -> tuple[Tensor, Tensor]:
    a = _remembered(q, k, v, beta, g, state)
    o = v.new_empty(v.shape)
    launch(_read, (*a["states"].shape[:2], triton.cdiv(a["V"], a["BV"])), o=o, **a)
    return o, a["final"]


def backward(
    do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, beta, g (empty where there is none) and of the initial state."""
    a = _remembered(q, k, v, beta, g, state)
    (B, T, H), (X, N), tiles = v.shape[:3], a["states"].shape[:2], triton.cdiv(a["K"], a["BK"])
    a |= {"do": do.contiguous(), "dfinal": None if dfinal is None else dfinal.contiguous()}
    a |= {"dq": q.new_empty(q.shape), "dk": k.new_empty(k.shape), "dv": v.new_empty(v.shape)}
    a |= {"dstate": torch.empty_like(a["final"]), "after": torch.empty_like(a["states"])}
    a |= {"inside": v.new_empty(v.shape, dtype=a["kind"]), "da": v.new_empty(X, N, a["C"], a["C"], dtype=a["kind"])}
    a |= {"du": a["dv"], "dz": None, "y": None, "dbeta": None, "dg": None}
    if beta is not None:
        a |= {"du": torch.empty_like(a["inside"]), "dz": torch.empty_like(a["inside"]), "y": torch.empty_like(a["da"])}
        a["dbeta"] = a["states"].new_empty(1 + tiles, B, T, H)
    if g is not None:
        a["dg"] = a["states"].new_empty(tiles, B, T, H)
    launch(_inside, (X, N), **a)
    scan(_scan_back, a)
    launch(_scores, (X, N), **a)
    launch(_gradients, (X, N, tiles), warps=8, **a | {"BV": min(a["BV"], 32)})  # with 64 registers spill
    dbeta, dg = (v.new_empty(0) if x is None else a[f"d{n}"].sum(0).to(x.dtype) for n, x in (("beta", beta), ("g", g)))
    return a["dq"], a["dk"], a["dv"], dbeta, dg, a["dstate"]


operator = torch.library.custom_op("memarch::delta_rule_triton", forward, mutates_args=())
operator_backward = torch.library.custom_op("memarch::delta_rule_triton_backward", backward, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe) -> tuple[Tensor, Tensor]:
    (B, _, H, K), V = q.shape, v.shape[-1]
    return v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))


@operator_backward.register_fake
def _(do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, beta: Maybe, g: Maybe, state: Maybe) -> tuple[Tensor, ...]:
    (B, _, H, K), V = q.shape, v.shape[-1]
    dbeta, dg = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, g))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbeta, dg, v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients_of(ctx: Any, do: Maybe, dfinal: Maybe) -> tuple[Maybe, ...]:
    q, k, v, beta, g, state = ctx.saved_tensors
    dq, dk, dv, dbeta, dg, dstate = operator_backward(torch.zeros_like(v) if do is None else do, dfinal, q, k, v, beta, g, state)
    return dq, dk, dv, None if beta is None else dbeta, None if g is None else dg, None if state is None else dstate.to(state.dtype)


operator.register_autograd(_gradients_of, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, score_like: int, value_like: int, memory_like: int) -> int:
    """How many products cost like [C,K][K,C], like [C,C][C,V] and like [C,K][K,V] in every chunk."""
    (B, T, H, K), V = q, v[3]
    return 2 * B * H * triton.cdiv(T, CHUNK) * CHUNK * (CHUNK * (score_like * K + value_like * V) + memory_like * K * V)


flops.file(
    {
        "delta_rule_triton": lambda q, k, v, beta, *_, **__: _flops(q, v, *((1, 1, 2) if beta is None else (3, 2, 3))),
        "delta_rule_triton_backward": lambda do, ds, q, k, v, beta, *_, **__: _flops(q, v, *((3, 2, 5) if beta is None else (7, 5, 8))),
    }
)


def checks() -> Iterator[Check]:
    for dtype, K, V, erases, decays in (
        (torch.bfloat16, 64, 64, True, True),
        (torch.bfloat16, 128, 128, True, True),
        (torch.bfloat16, 256, 512, True, True),
        (torch.bfloat16, 128, 128, True, False),
        (torch.bfloat16, 128, 256, False, True),
        (torch.bfloat16, 128, 128, False, False),
        (torch.float32, 64, 64, True, True),
        (torch.float32, 128, 256, True, True),
        (torch.float32, 64, 64, False, True),
    ):
        q, v = (torch.empty(1, 2 * CHUNK, 1, n, dtype=dtype, device="meta") for n in (K, V))
        beta, g, state = q[..., 0] if erases else None, q[..., 0] if decays else None, q.new_empty(1, 1, K, V, dtype=torch.float32)
        with noted() as found:
            forward(q, q, v, beta, g, state if decays else None)
            backward(v, state if decays else None, q, q, v, beta, g, state if decays else None)
        yield from {repr(check): check._replace(wgmma=dtype != torch.float32) for check in found}.values()
