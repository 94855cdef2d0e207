"""Taylor attention for a GPU: square inside a segment of a few hundred tokens, through the state from segment to segment.

With x~ = [1, x], the features of x are the products x~_i x~_j of all pairs i <= j in the order of the triangle, times c_e = 1/2 for the square
of a query and 1 for everything else. V1 = [V, 1]; S is what the segments before add up to:

    out_t = sum_{s<=t} w_ts v1_s + features(q_t) . S              s in the segment of t          w = 1 + a + a^2/2
    S = sum_s features(k_s) v1_s^T                                s in the segments before

Its gradient is the same thing with the roles of queries and keys exchanged and time running backwards, dS being the state of that direction:

    dv_s = sum_{t>=s} w_ts dout_t + features(k_s) . dS            dS = sum_t features(q_t) dout_t^T, t in the segments after
    dk_s = sum_{t>=s} (v1_s . dout_t) (1 + a) q_t + (dfeatures / dk_s) . (dS v1_s)
    dq_t = sum_{s<=t} (dout_t . v1_s) (1 + a) k_s + (dfeatures / dq_t) . (S dout_t)

So there are four kernels, each written for an x that looks at ys, on one side of it in time, that carry a u: _collect (what every segment adds to
the state), _scan (adds them up), _attend (out, dv) and _pull (dq, dk). All but _scan are parallel over tokens, too. The other way, a state that
stays in registers while a program walks through the tokens, has only B H programs, and each takes T/64 steps that wait for one another.

The factors x~_i are picked by a product with zeros and ones, which is exact and leaves them where the next product wants them. Weights, features
and states are rounded to OP where they are multiplied with values; the denominator is summed in ACC all the way.

    B rows   T tokens   H heads   F key width   V value width   E features   N segments   L tokens in a segment   X = B H
    OP type of factors   ACC type of sums   SQUARE c_e of a square   LATER x looks at what comes after it   ET, VT, VS, FT tiles of E, V, V, F
    col   the last column of u: 1 for a token, the gradient of the denominator for dout
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.launch import Check, accumulator, dot, launch, noted, operand, precision, tile
from memarch.kernels.taylor_attention.torch_impl import FLOPS

TILE = 64  # tokens in a tile; a quarter of them in float32
BLOCK = 1024  # numbers of a state in one program of _scan

Maybe = Tensor | None


def taylor_attention(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, state))
    run = operator if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
    return run(q, k, v, state, lengths)


def segment(F: int) -> int:
    """Tokens, about 32 F: looking back takes about as many products inside as through the state, and all states less memory than all tokens."""
    return TILE * triton.cdiv(F, 2)


@triton.jit
def _tokens(x, head, t, col, end, H, WIDTH: tl.constexpr, OP: tl.constexpr):
    """A tile of x [T, H, WIDTH] at tokens t and columns col, one of them [., 1] and the other [1, .]; zero from `end` on."""
    return tl.load(x + (head + t.to(tl.int64) * H) * WIDTH + col, (t < end) & (col < WIDTH), 0.0).to(OP)


@triton.jit
def _last(col, head, t, end, H, ACC: tl.constexpr):
    """The last column of u at tokens t."""
    if col is None:
        return (t < end).to(ACC)
    else:
        return tl.load(col + head + t.to(tl.int64) * H, t < end, 0.0).to(ACC)


@triton.jit
def _place(head, T, H, lengths):
    """-> where head `head` = b H + h begins in [B, T, H], in rows, and where its tokens end."""
    b = head // H
    end = T if lengths is None else tl.minimum(tl.load(lengths + b), T).to(tl.int32)
    return b.to(tl.int64) * T * H + head % H, end


@triton.jit
def _side(t, end, L: tl.constexpr, TILE: tl.constexpr, LATER: tl.constexpr):
    """-> the segment of the tile at t, and the range of the tokens in it that the tile looks at."""
    n = t // L
    if LATER:
        return n, t, tl.minimum(n * L + L, end)
    else:
        return n, n * L, tl.minimum(t + TILE, end)


@triton.jit
def _attend(
    x, y, u, states, out, total, lengths, pairs, T, H, N,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SQUARE: tl.constexpr, LATER: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, FT: tl.constexpr, VT: tl.constexpr, ET: tl.constexpr
):  # fmt: skip
    """out [B,T,H,V], total [B,T,H] or None: sums of u1 with the weights of x and y."""
    start, v = tl.program_id(1) * TILE, tl.program_id(2) * VT + tl.arange(0, VT)[None, :]
    head, end = _place(tl.program_id(0), T, H, lengths)
    n, low, high = _side(start, end, L, TILE, LATER)
    t, f = start + tl.arange(0, TILE)[:, None], tl.arange(0, FT)
    xs = _tokens(x, head, t, f[None, :], end, H, F, OP)
    acc, sums = tl.zeros([TILE, VT], ACC), tl.zeros([TILE], ACC)
    for begin in range(low, high, TILE):
        s = begin + tl.arange(0, TILE)
        a = dot(xs, _tokens(y, head, s[None, :], f[:, None], end, H, F, OP), OP, PRECISION)
        seen = ((s[None, :] >= t) if LATER else (s[None, :] <= t)) & (s[None, :] < end)
        w = tl.where(seen, 1 + a + a * a * 0.5, 0.0)
        acc += dot(w, _tokens(u, head, s[:, None], v, end, H, V, OP), OP, PRECISION)
        sums += tl.sum(w, 1)
    if states is not None:
        state = states + (tl.program_id(0).to(tl.int64) * N + n) * E * (V + 1)
        for begin in range(0, E, ET):
            e = begin + tl.arange(0, ET)
            left, right = tl.load(pairs + e, e < E, -1)[None, :], tl.load(pairs + E + e, e < E, -1)[None, :]
            first = dot(xs, left == f[:, None] + 1, OP, PRECISION) + (left == 0)
            second = dot(xs, right == f[:, None] + 1, OP, PRECISION) + (right == 0)
            features = first * second * tl.where((left == right) & (left > 0), SQUARE, 1.0)
            acc += dot(features, tl.load(state + e[:, None] * (V + 1) + v, (e[:, None] < E) & (v < V), 0.0), OP, PRECISION)
            sums += tl.sum(features * tl.load(state + e * (V + 1) + V, e < E, 0.0)[None, :], 1)
    row = head + t.to(tl.int64) * H
    tl.store(out + row * V + v, tl.where(t < end, acc, 0.0).to(out.dtype.element_ty), (t < T) & (v < V))
    if total is not None:
        tl.store(total + row, tl.where(t < end, sums[:, None], 0.0).to(total.dtype.element_ty), (t < T) & (tl.program_id(2) == 0))


@triton.jit
def _pull(
    x, y, g, g_col, u, u_col, states, dx, lengths, pairs, T, H, N,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SQUARE: tl.constexpr, LATER: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, FT: tl.constexpr, VS: tl.constexpr, ET: tl.constexpr
):  # fmt: skip
    """dx [B,T,H,F]: the gradient of sum_x g1 . _attend(x)."""
    start, v0 = tl.program_id(1) * TILE, tl.arange(0, VS)
    head, end = _place(tl.program_id(0), T, H, lengths)
    n, low, high = _side(start, end, L, TILE, LATER)
    t, f = start + tl.arange(0, TILE)[:, None], tl.arange(0, FT)
    xs = _tokens(x, head, t, f[None, :], end, H, F, OP)
    g_last = _last(g_col, head, t, end, H, ACC)
    acc = tl.zeros([TILE, FT], ACC)
    for begin in range(low, high, TILE):
        s = begin + tl.arange(0, TILE)
        a = dot(xs, _tokens(y, head, s[None, :], f[:, None], end, H, F, OP), OP, PRECISION)
        dw = g_last * _last(u_col, head, s[None, :], end, H, ACC)
        for c in range(0, V, VS):
            gs, us = _tokens(g, head, t, c + v0[None, :], end, H, V, OP), _tokens(u, head, s[None, :], c + v0[:, None], end, H, V, OP)
            dw += dot(gs, us, OP, PRECISION)
        seen = s[None, :] >= t if LATER else s[None, :] <= t
        da = tl.where(seen, dw * (1 + a), 0.0)
        acc += dot(da, _tokens(y, head, s[:, None], f[None, :], end, H, F, OP), OP, PRECISION)
    if states is not None:
        state = states + (tl.program_id(0).to(tl.int64) * N + n) * E * (V + 1)
        for begin in range(0, E, ET):
            e = begin + tl.arange(0, ET)
            left, right = tl.load(pairs + e, e < E, -1), tl.load(pairs + E + e, e < E, -1)
            first = dot(xs, left[None, :] == f[:, None] + 1, OP, PRECISION) + (left == 0)[None, :]
            second = dot(xs, right[None, :] == f[:, None] + 1, OP, PRECISION) + (right == 0)[None, :]
            df = g_last * tl.load(state + e * (V + 1) + V, e < E, 0.0)[None, :]
            for c in range(0, V, VS):
                v = c + v0
                across = tl.load(state + e[None, :] * (V + 1) + v[:, None], (e[None, :] < E) & (v[:, None] < V), 0.0)  # [V, E]
                df += dot(_tokens(g, head, t, v[None, :], end, H, V, OP), across, OP, PRECISION)
            df *= tl.where((left == right) & (left > 0), SQUARE, 1.0)[None, :]
            acc += dot(df * second, left[:, None] == f[None, :] + 1, OP, PRECISION)
            acc += dot(df * first, right[:, None] == f[None, :] + 1, OP, PRECISION)
    row = head + t.to(tl.int64) * H
    tl.store(dx + row * F + f[None, :], tl.where(t < end, acc, 0.0).to(dx.dtype.element_ty), (t < T) & (f[None, :] < F))


@triton.jit
def _collect(
    y, u, col, states, lengths, pairs, T, H, N,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SQUARE: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, FT: tl.constexpr, VT: tl.constexpr, ET: tl.constexpr
):  # fmt: skip
    """states [X,N,E,V+1]: what every segment adds."""
    n, e = tl.program_id(1) % N, tl.program_id(1) // N * ET + tl.arange(0, ET)
    v, f = tl.program_id(2) * VT + tl.arange(0, VT)[None, :], tl.arange(0, FT)
    head, end = _place(tl.program_id(0), T, H, lengths)
    left, right = tl.load(pairs + e, e < E, -1)[:, None], tl.load(pairs + E + e, e < E, -1)[:, None]
    acc, sums = tl.zeros([ET, VT], ACC), tl.zeros([ET], ACC)
    for begin in range(n * L, tl.minimum(n * L + L, end), TILE):
        s = begin + tl.arange(0, TILE)
        ys = _tokens(y, head, s[None, :], f[:, None], end, H, F, OP)  # [F, C]
        first = dot(left == f[None, :] + 1, ys, OP, PRECISION) + (left == 0)
        second = dot(right == f[None, :] + 1, ys, OP, PRECISION) + (right == 0)
        features = first * second * tl.where((left == right) & (left > 0), SQUARE, 1.0)
        acc += dot(features, _tokens(u, head, s[:, None], v, end, H, V, OP), OP, PRECISION)
        sums += tl.sum(features * _last(col, head, s[None, :], end, H, ACC), 1)
    state = states + (tl.program_id(0).to(tl.int64) * N + n) * E * (V + 1)
    tl.store(state + e[:, None] * (V + 1) + v, acc, (e[:, None] < E) & (v < V))
    if tl.program_id(2) == 0:
        tl.store(state + e * (V + 1) + V, sums, e < E)


@triton.jit
def _scan(states, before, after, N, SIZE, LATER: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """In place: what each of N segments adds -> the state that it finds. before, after [X,E,V+1]: the state at the two ends."""
    head, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], ACC)
    if before is not None:
        state += tl.load(before + head * SIZE + at, at < SIZE, 0.0).to(ACC)
    for i in range(N):
        n = N - 1 - i if LATER else i
        place = states + (head * N + n) * SIZE + at
        added = tl.load(place, at < SIZE, 0.0)
        tl.store(place, state, at < SIZE)
        state += added
    tl.store(after + head * SIZE + at, state, at < SIZE)


def plan(q: Tensor, v: Tensor, lengths: Maybe) -> dict[str, Any]:
    """What the kernels of a call have in common, by the names they use."""
    (B, T, H, F), V, exact = q.shape, v.shape[-1], v.dtype == torch.float32
    a: dict[str, Any] = {"T": T, "H": H, "F": F, "V": V, "E": 1 + F + F * (F + 1) // 2, "L": segment(F), "N": triton.cdiv(T, segment(F)), "X": B * H}
    a |= {"lengths": lengths, "pairs": torch.triu_indices(F + 1, F + 1, dtype=torch.int32, device=q.device)}
    a |= {"OP": operand(v.dtype), "ACC": accumulator(v.dtype), "PRECISION": precision()}
    # Exact products of float32 go through registers, not through the matrix units, and spill with larger tiles.
    a |= {"TILE": TILE // 4, "ET": 16} if exact else {"TILE": TILE, "ET": 32}
    # Values are divided among programs, but _pull sums over all of them.
    return a | {"FT": tile(F), "VT": min(tile(V), 64 if exact else 128), "VS": min(tile(V), 32 if exact else 128 if V <= 128 else 64)}


def carry(a: dict[str, Any], y: Tensor, u: Tensor, col: Maybe, before: Maybe, square: float, later: bool) -> tuple[Maybe, Tensor]:
    """-> the state that each segment finds [X,N,E,V+1], or None if there is none, and the state at the end [B,H,E,V+1]."""
    after, ET, size = _state(y, u), 2 * a["ET"], a["E"] * (a["V"] + 1)
    states = after.new_empty(a["X"], a["N"], *after.shape[2:])
    grid = a["X"], a["N"] * triton.cdiv(a["E"], ET), triton.cdiv(a["V"], a["VT"])
    launch(_collect, grid, **a | {"y": y, "u": u, "col": col, "states": states, "SQUARE": square, "ET": ET})
    launch(_scan, (a["X"], triton.cdiv(size, BLOCK)), states=states, before=before, after=after, N=a["N"], SIZE=size, LATER=later, ACC=a["ACC"], BLOCK=BLOCK)
    return None if a["N"] == 1 and before is None else states, after


def forward(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, state, lengths = _flat(q, k, v, state, lengths)
    a = plan(q, v, lengths)
    top, bottom, _ = _outputs(q, v)
    states, last = carry(a, k, v, None, state, 1.0, False)
    grid = a["X"], triton.cdiv(a["T"], a["TILE"]), triton.cdiv(a["V"], a["VT"])
    launch(_attend, grid, **a, x=q, y=k, u=v, states=states, out=top, total=bottom, SQUARE=0.5, LATER=False)
    return top, bottom, last


def backward(
    dtop: Tensor, dbottom: Tensor, dstate: Maybe, q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v and of the initial state (empty where there is none)."""
    do, dbottom, dstate, q, k, v, state, lengths = _flat(dtop.to(v.dtype), dbottom, dstate, q, k, v, state, lengths)
    a = plan(q, v, lengths)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    tiles = triton.cdiv(a["T"], a["TILE"])

    states, _ = carry(a, k, v, None, state, 1.0, False)
    launch(_pull, (a["X"], tiles), **a, x=q, y=k, g=do, g_col=dbottom, u=v, u_col=None, states=states, dx=dq, SQUARE=0.5, LATER=False)

    states, first = carry(a, q, do, dbottom, dstate, 0.5, True)
    launch(_pull, (a["X"], tiles), **a, x=k, y=q, g=v, g_col=None, u=do, u_col=dbottom, states=states, dx=dk, SQUARE=1.0, LATER=True)
    launch(_attend, (a["X"], tiles, triton.cdiv(a["V"], a["VT"])), **a, x=k, y=q, u=do, states=states, out=dv, total=None, SQUARE=1.0, LATER=True)
    return dq, dk, dv, first.new_empty(0) if state is None else first.to(state.dtype)


def _flat(*xs: Maybe) -> list[Any]:
    return [None if x is None else x.contiguous() for x in xs]


def _state(q: Tensor, v: Tensor) -> Tensor:
    (B, _, H, F), V = q.shape, v.shape[-1]
    return v.new_empty(B, H, 1 + F + F * (F + 1) // 2, V + 1, dtype=torch.promote_types(v.dtype, torch.float32))


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = _state(q, v)
    return state.new_empty(v.shape), state.new_empty(v.shape[:3]), state


operator = torch.library.custom_op("memarch::taylor_attention_triton", forward, mutates_args=())
operator_backward = torch.library.custom_op("memarch::taylor_attention_triton_backward", backward, mutates_args=())


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(q, v)


@operator_backward.register_fake
def _(dtop: Tensor, dbottom: Tensor, dstate: Maybe, q: Tensor, k: Tensor, v: Tensor, state: Maybe, lengths: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dinitial = dtop.new_empty(0) if state is None else state.new_empty(state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:2]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dtop: Maybe, dbottom: Maybe, dstate: Maybe) -> tuple[Maybe, ...]:
    dtop, dbottom = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((dtop, dbottom), ctx.like, strict=True))
    q, k, v, state, lengths = ctx.saved_tensors  # asked for once: recomputation gives them out only once
    dq, dk, dv, dinitial = operator_backward(dtop, dbottom, dstate, q, k, v, state, lengths)
    return dq, dk, dv, None if state is None else dinitial, None


operator.register_autograd(_gradients, setup_context=_remember)


def chunk(q: torch.Size) -> int:
    """What torch_impl calls a chunk, a square, for counting products as it does."""
    return min(q[1], segment(q[3]))


formulas: dict[str, Any] = FLOPS
flops.file(
    {
        "taylor_attention_triton": lambda *xs, **_: formulas["taylor_attention"](*xs, chunk(xs[0])),
        "taylor_attention_triton_backward": lambda *xs, **_: formulas["taylor_attention_backward"](*xs, chunk(xs[3])),
    }
)


def checks() -> Iterator[Check]:
    half, full = torch.bfloat16, torch.float32
    widths = (half, 8, 64), (half, 16, 64), (half, 16, 128), (half, 24, 112), (half, 64, 256), (full, 16, 64), (full, 24, 112), (full, 16, 128)
    for dtype, F, V in widths:
        q, v = (torch.empty(1, 2 * segment(F), 1, n, dtype=dtype, device="meta") for n in (F, V))
        top, bottom, state = _outputs(q, v)
        with noted() as found:
            for T, S, lengths in ((2 * segment(F), state, bottom[0, 0].long()), (1, None, None)):
                forward(q[:, :T], q[:, :T], v[:, :T], S, lengths)
                backward(top[:, :T], bottom[:, :T], S, q[:, :T], q[:, :T], v[:, :T], S, lengths)
        yield from {repr(check): check._replace(wgmma=dtype == half and check.kernel is not _scan) for check in found}.values()
