"""Gated linear attention for a GPU, in chunks of C tokens: what S goes through from chunk to chunk is done in turn, everything else for all at once.

With G the sum of g over the tokens of a chunk up to one, P_ij = sum_d q_id k_jd e^{G_id - G_jd} for i >= j is no product of two matrices: e^{-G}
overflows. But tokens whose numbers first differ in a certain bit lie on the two sides of the middle m of the span whose numbers agree above that bit, so

    e^{G_i - G_j} = E_i E_j    E = e^{-|G - G_m|}

and for them P is (q o E) (k o E)^T: one product for each bit, no factor above q and k. The rest, with dS the gradient of S after a chunk:

    _read        O = (e^G o Q) S + P V                              back  dV = (e^{G_C - G} o K) dS + P^T dO
    _scan        S <- diag(e^{G_C}) S + (e^{G_C - G} o K)^T V       back  dS <- diag(e^{G_C}) dS + (e^G o Q)^T dO
    _gradients   with dP = dO V^T for each bit  E o dP (k o E)  to dQ  and  E o dP^T (q o E)  to dK;  dG = q o dQ - k o dK

where dG leaves out what does not depend on G, as in delta_rule. What is called back is the same kernel.
Differences of G are what counts, and a strong decay makes G large: it has twice the digits of the factors, float64 for float32.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   X = B H   OP type of factors   ACC type of sums
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.gated_linear.torch_impl import step
from memarch.kernels.launch import Check, accumulator, begin, dot, launch, load, noted, operand, precision, store, tile

CHUNK = 64  # rows of one Hopper matrix instruction
PLAIN = 16  # the same for float32, whose exact products go through registers and spill with more
BLOCK = 64  # widths are worked on in pieces of this

Maybe = Tensor | None


def gated_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor]:
    if lengths is not None:  # a token of zeros changes nothing and answers 0
        pad = (torch.arange(q.shape[1], device=q.device) >= lengths[:, None])[:, :, None, None]  # [B, T, 1, 1]
        q, k, v, g = (x.masked_fill(pad, 0) for x in (q, k, v, g))
    if q.shape[1] == 1:
        return step(q, k, v, g, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, state))
    run = operator if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
    return run(q, k, v, g, state)


@triton.jit
def _sum(g, G, T, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    at, left = begin(tl.program_id(0), tl.program_id(1), T, H, C)
    i, d = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    store(G + at * K, i, d, H * K, 1, left, K, tl.cumsum(load(g + at * K, i, d, H * K, 1, left, K, G.dtype.element_ty), 0))


@triton.jit
def _last(G, d, left, H, K: tl.constexpr, C: tl.constexpr):
    """G of the newest token [BK]; G points to the chunk."""
    return tl.load(G + (tl.minimum(left, C) - 1) * H * K + d, d < K, 0.0)


@triton.jit
def _parting(i, bit):
    """The token m in the middle of the 2^{bit+1} tokens that i is among."""
    return (i | ((2 << bit) - 1)) - (1 << bit)


@triton.jit
def _meet(late, early, bit):
    """Whether two tokens part at this bit, and in this order."""
    return (late > early) & ((late ^ early) >> bit == 1)


@triton.jit
def _pairs(
    q, k, G, pairs, T, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pairs: P."""
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    i = tl.arange(0, C)
    q += at * K
    k += at * K
    G += at * K
    P, same = tl.zeros([C, C], ACC), tl.zeros([C], ACC)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        Q, G1 = load(q, i, d, H * K, 1, left, K, ACC), load(G, i, d, H * K, 1, left, K, G.dtype.element_ty)
        Kt, G2 = load(k, d, i, 1, H * K, K, left, ACC), load(G, d, i, 1, H * K, K, left, G.dtype.element_ty)  # transposed
        same += tl.sum(Q * load(k, i, d, H * K, 1, left, K, ACC), 1)
        for bit in tl.range(BITS, num_stages=1):
            m = _parting(i, bit)
            E1 = tl.exp(-tl.abs(G1 - load(G, m, d, H * K, 1, left, K, G.dtype.element_ty)).to(ACC))
            E2 = tl.exp(-tl.abs(G2 - load(G, d, m, 1, H * K, K, left, G.dtype.element_ty)).to(ACC))
            P += tl.where(_meet(i[:, None], i[None, :], bit), dot(Q * E1, Kt * E2, OP, PRECISION), 0.0)
    P += tl.where(i[:, None] == i[None, :], same[:, None], 0.0)
    store(pairs + (x.to(tl.int64) * tl.num_programs(1) + n) * C * C, i, i, C, 1, C, C, P)


@triton.jit
def _scan(
    x, y, G, start, memory, end, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From k, v and the state S before every chunk and the new state; back, from q, dO and the new state's gradient dS after every chunk and the state's."""
    head = tl.program_id(0)
    i, d, j = tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    whole = head.to(tl.int64) * K * V
    S = tl.zeros([BK, BV], ACC)
    if start is not None:
        S += load(start + whole, d, j, V, 1, K, V, ACC)
    for m in range(N):
        n = N - 1 - m if BACK else m
        at, left = begin(head, n, T, H, C)
        store(memory + (head.to(tl.int64) * N + n) * K * V, d, j, V, 1, K, V, S)
        last, sums = _last(G + at * K, d, left, H, K, C), load(G + at * K, d, i, 1, H * K, K, left, G.dtype.element_ty)
        far = sums if BACK else last[:, None] - sums
        X = load(x + at * K, d, i, 1, H * K, K, left, ACC) * tl.exp(far.to(ACC))  # transposed
        S = S * tl.exp(last.to(ACC))[:, None] + dot(X, load(y + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION)
    store(end + whole, d, j, V, 1, K, V, S)


@triton.jit
def _read(
    x, y, G, memory, pairs, out, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O from q, v and S; back, dV from k, dO and dS."""
    head, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(head, n, T, H, C)
    i, j = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    square = pairs + (head.to(tl.int64) * N + n) * C * C
    P = load(square, i, i, 1, C, C, C, OP) if BACK else load(square, i, i, C, 1, C, C, OP)
    O = dot(P, load(y + at * V, i, j, H * V, 1, left, V, OP), OP, PRECISION)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        sums = load(G + at * K, i, d, H * K, 1, left, K, G.dtype.element_ty)
        far = _last(G + at * K, d, left, H, K, C)[None, :] - sums if BACK else sums
        X = load(x + at * K, i, d, H * K, 1, left, K, ACC) * tl.exp(far.to(ACC))
        O += dot(X, load(memory + (head.to(tl.int64) * N + n) * K * V, d, j, V, 1, K, V, OP), OP, PRECISION)
    store(out + at * V, i, j, H * V, 1, left, V, O)


@triton.jit
def _dpairs(
    v, do, dpairs, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpairs: dP, of which what stands on and above the diagonal is not read."""
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    i = tl.arange(0, C)
    dP = tl.zeros([C, C], ACC)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        dP += dot(load(do + at * V, i, j, H * V, 1, left, V, OP), load(v + at * V, j, i, 1, H * V, V, left, OP), OP, PRECISION)
    store(dpairs + (x.to(tl.int64) * tl.num_programs(1) + n) * C * C, i, i, C, 1, C, C, dP)


@triton.jit
def _gradients(
    q, k, v, G, states, after, do, dpairs, dq, dk, dg, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BITS: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, n = tl.program_id(0), tl.program_id(1)
    at, left = begin(x, n, T, H, C)
    square, whole = dpairs + (x.to(tl.int64) * N + n) * C * C, (x.to(tl.int64) * N + n) * K * V
    i, d = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    dQ, dK = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    same, kept = tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        S, dS = load(states + whole, j, d, 1, V, V, K, ACC), load(after + whole, j, d, 1, V, V, K, ACC)  # transposed
        dO, U = load(do + at * V, i, j, H * V, 1, left, V, OP), load(v + at * V, i, j, H * V, 1, left, V, OP)
        dQ += dot(dO, S, OP, PRECISION)
        dK += dot(U, dS, OP, PRECISION)
        same += tl.sum(dO.to(ACC) * U.to(ACC), 1)
        kept += tl.sum(S * dS, 0)
    G += at * K
    last, sums = _last(G, d, left, H, K, C), load(G, i, d, H * K, 1, left, K, G.dtype.element_ty)
    dQ *= tl.exp(sums.to(ACC))
    dK *= tl.exp((last[None, :] - sums).to(ACC))
    Q, k_ = load(q + at * K, i, d, H * K, 1, left, K, ACC), load(k + at * K, i, d, H * K, 1, left, K, ACC)
    newest = (i == tl.minimum(left, C) - 1)[:, None]
    older = tl.where(newest, 0.0, k_ * dK)
    dG = tl.where(newest, (tl.sum(older, 0) + tl.exp(last.to(ACC)) * kept)[None, :], -older) + Q * dQ
    dP, dPt = load(square, i, i, C, 1, C, C, OP), load(square, i, i, 1, C, C, C, OP)
    for bit in tl.range(BITS, num_stages=1):
        E = tl.exp(-tl.abs(sums - load(G, _parting(i, bit), d, H * K, 1, left, K, G.dtype.element_ty)).to(ACC))
        near = E * dot(tl.where(_meet(i[:, None], i[None, :], bit), dP, 0.0), k_ * E, OP, PRECISION)
        dQ += near
        dG += Q * near
        near = E * dot(tl.where(_meet(i[None, :], i[:, None], bit), dPt, 0.0), Q * E, OP, PRECISION)
        dK += near
        dG -= k_ * near
    store(dq + at * K, i, d, H * K, 1, left, K, dQ + same[:, None] * k_)
    store(dk + at * K, i, d, H * K, 1, left, K, dK + same[:, None] * Q)
    store(dg + at * K, i, d, H * K, 1, left, K, tl.cumsum(dG, 0, reverse=True))


def _remembered(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> dict[str, Any]:
    """Everything that kernels ask for, by the names they use, once the pass over the chunks is done: states [X,N,K,V] before every chunk, the new state,
    G [B,T,H,K] and P [X,N,C,C] as pairs."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    C, widest = (PLAIN, 32) if kind == torch.float32 else (CHUNK, BLOCK)
    N, BK, BV = triton.cdiv(T, C), min(tile(K), widest), min(tile(V), widest)
    a: dict[str, Any] = {n: None if x is None else x.contiguous() for n, x in zip(("q", "k", "v", "g", "state"), (q, k, v, g, state))}
    a |= {"T": T, "H": H, "N": N, "K": K, "V": V, "C": C, "BK": BK, "BV": BV, "BITS": C.bit_length() - 1, "BACK": False}
    a |= {"OP": operand(kind), "ACC": accumulator(kind), "PRECISION": precision()}
    sums = torch.promote_types(kind, torch.float32)
    a |= {"states": q.new_empty(B * H, N, K, V, dtype=sums), "final": q.new_empty(B, H, K, V, dtype=sums)}
    a |= {"G": q.new_empty(q.shape, dtype=torch.float32 if kind.itemsize == 2 else torch.float64), "pairs": q.new_empty(B * H, N, C, C, dtype=kind)}
    launch(_sum, (B * H, N, triton.cdiv(K, BK)), **a)
    launch(_pairs, (B * H, N), **a)
    launch(_scan, _tiles(a), x=a["k"], y=a["v"], start=a["state"], memory=a["states"], end=a["final"], **a)
    return a


def _tiles(a: dict[str, Any]) -> tuple[int, int, int]:
    """A program for every tile of S."""
    return a["states"].shape[0], triton.cdiv(a["K"], a["BK"]), triton.cdiv(a["V"], a["BV"])


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> tuple[Tensor, Tensor]:
    a = _remembered(q, k, v, g, state)
    o = v.new_empty(v.shape)
    launch(_read, (*a["states"].shape[:2], triton.cdiv(a["V"], a["BV"])), x=a["q"], y=a["v"], memory=a["states"], out=o, **a)
    return o, a["final"]


def backward(do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, g and of the initial state."""
    a = _remembered(q, k, v, g, state) | {"do": do.contiguous(), "BACK": True}
    X, N = a["states"].shape[:2]
    a |= {"dq": q.new_empty(q.shape), "dk": k.new_empty(k.shape), "dg": g.new_empty(g.shape)}
    a |= {"after": torch.empty_like(a["states"]), "dpairs": torch.empty_like(a["pairs"])}
    dv, dstate = v.new_empty(v.shape), torch.empty_like(a["final"])
    dfinal = None if dfinal is None else dfinal.contiguous()
    launch(_scan, _tiles(a), x=a["q"], y=a["do"], start=dfinal, memory=a["after"], end=dstate, **a)
    launch(_read, (X, N, triton.cdiv(a["V"], a["BV"])), x=a["k"], y=a["do"], memory=a["after"], out=dv, **a)
    launch(_dpairs, (X, N), **a)
    a["BK"] = min(a["BK"], 32)  # with 64 registers spill
    launch(_gradients, (X, N, triton.cdiv(a["K"], a["BK"])), warps=8, **a)
    return a["dq"], a["dk"], dv, a["dg"], dstate


operator = torch.library.custom_op("memarch::gated_linear_triton", forward, mutates_args=())
operator_backward = torch.library.custom_op("memarch::gated_linear_triton_backward", backward, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> tuple[Tensor, Tensor]:
    (B, _, H, K), V = q.shape, v.shape[-1]
    return v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))


@operator_backward.register_fake
def _(do: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Maybe) -> tuple[Tensor, ...]:
    (B, _, H, K), V = q.shape, v.shape[-1]
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), v.new_empty(B, H, K, V, dtype=torch.promote_types(v.dtype, torch.float32))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients_of(ctx: Any, do: Maybe, dfinal: Maybe) -> tuple[Maybe, ...]:
    q, k, v, g, state = ctx.saved_tensors
    dq, dk, dv, dg, dstate = operator_backward(torch.zeros_like(v) if do is None else do, dfinal, q, k, v, g, state)
    return dq, dk, dv, dg, None if state is None else dstate.to(state.dtype)


operator.register_autograd(_gradients_of, setup_context=_remember)


def _flops(q: torch.Size, v: torch.Size, score_like: int, value_like: int, memory_like: int) -> int:
    """How many products cost like [C,K][K,C], like [C,C][C,V] and like [C,K][K,V] in every chunk."""
    (B, T, H, K), V = q, v[3]
    return 2 * B * H * triton.cdiv(T, CHUNK) * CHUNK * (CHUNK * (score_like * K + value_like * V) + memory_like * K * V)


BITS = CHUNK.bit_length() - 1
flops.file(
    {
        "gated_linear_triton": lambda q, k, v, *_, **__: _flops(q, v, BITS, 1, 2),
        "gated_linear_triton_backward": lambda do, ds, q, k, v, *_, **__: _flops(q, v, 3 * BITS, 2, 5),
    }
)


def checks() -> Iterator[Check]:
    for dtype, K, V, carried in (
        (torch.bfloat16, 64, 64, True),
        (torch.bfloat16, 128, 128, True),
        (torch.bfloat16, 128, 256, False),
        (torch.bfloat16, 256, 512, True),
        (torch.float32, 64, 64, True),
        (torch.float32, 128, 256, False),
    ):
        q, v = (torch.empty(1, 2 * CHUNK, 1, n, dtype=dtype, device="meta") for n in (K, V))
        state = q.new_empty(1, 1, K, V, dtype=torch.float32) if carried else None
        with noted() as found:
            forward(q, q, v, q, state)
            backward(v, state, q, q, v, q, state)
        for check in {repr(check): check for check in found}.values():
            yield check._replace(wgmma=dtype != torch.float32 and "OP" in check.constants)
