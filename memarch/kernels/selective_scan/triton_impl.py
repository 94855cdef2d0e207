"""The selective scan for a GPU: a program takes a tile of channels of one row through time, token by token, its states in registers.

A token costs a state one exponential, which takes Hopper as long as eight other instructions, and eleven of those (sixty in the backward). So while rows
and channels fill the device nothing is won by a scan over pairs, which goes through time in parallel at three times the arithmetic. (With few rows and
long sequences it would pay to cut time into segments that begin with zeros, and to add in a second pass what the states before them give.)

The forward keeps the states before every SPAN tokens. From these the backward makes those before every GROUP tokens, which it leaves in `room`, and
from these, group by group from the last one, all states of a group, in registers. The gradients are in torch_impl.py. Those of B and C, sums over
channels, are a part from every tile that torch adds up: the result is the same to the bit every time.

Every tile of states lies in memory with a channel's states side by side: a compiler that gives each thread four of these and then fills a warp with
states before channels makes sums over states without leaving the warp, and changes the layout nowhere on the way.

    R rows   T tokens   E channels, e in a tile   N states of a channel, n up to WIDTH, a power of two   ACC type of sums
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.launch import Check, accumulator, launch, load, noted, store
from memarch.kernels.selective_scan import operator
from memarch.kernels.selective_scan.operator import Gradients, Maybe

SPAN = 64  # tokens
LOG2E = tl.constexpr(operator.LOG2E)


def tiling(width: int, widest: int, warps: int) -> tuple[int, int]:
    """How many channels a tile has and how many warps work on it: 16 of its states for a thread, and at least 16 channels, a sector of memory."""
    tile = min(widest, max(16, 512 * warps // width))
    return tile, max(warps, width * tile // 512)


@triton.jit
def _tile(A, D, lengths, row, T, E, N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """-> e [TILE], n [WIDTH], the rates: A in units in which e^{dt A} is a power of 2, D or zeros, and how many tokens the row has."""
    e, n, skip, length = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH), tl.zeros([TILE], ACC), T
    if D is not None:
        skip += tl.load(D + e, e < E, 0.0).to(ACC)
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + row), T)
    return e, n, load(A, e, n, N, 1, E, N, ACC) * LOG2E, skip, length


@triton.jit
def _take(x, at, i, I, real, ACC: tl.constexpr):
    """Row `at` of [., I]; zeros if the token is not real, for these change nothing and answer 0."""
    return tl.load(x + at * I + i, real & (i < I), 0.0).to(ACC)


@triton.jit
def _step(h, rates, x, dt, B):
    return tl.exp2(dt[:, None] * rates) * h + (dt * x)[:, None] * B[None, :]


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _none():
    """No token's values yet. Where () itself is assigned, mypy expects no more to follow."""
    return ()


@triton.jit
def _forward(
    x, dt, A, B, C, D, z, state, lengths, y, last, states, T, E,
    N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e, n, rates, skip, length = _tile(A, D, lengths, row, T, E, N, TILE, WIDTH, ACC)
    h = tl.zeros([TILE, WIDTH], ACC)
    if state is not None:
        h += load(state + row * E * N, e, n, N, 1, E, N, ACC)
    for begin in range(0, T, GROUP):
        if states is not None and begin % SPAN == 0:
            store(states + (row * tl.cdiv(T, SPAN) + begin // SPAN) * E * N, e, n, N, 1, E, N, h)
        outs = _none()  # stored at the end: no load may overtake a store
        for i in tl.static_range(GROUP):
            at, real = row * T + begin + i, begin + i < length
            X = _take(x, at, e, E, real, ACC)
            h = _step(h, rates, X, _take(dt, at, e, E, real, ACC), _take(B, at, n, N, real, ACC))
            out = tl.sum(h * _take(C, at, n, N, real, ACC)[None, :], 1) + skip * X
            if z is not None:
                gate = _take(z, at, e, E, real, ACC)
                out *= gate * _sigmoid(gate)
            outs += (out,)
        for i in tl.static_range(GROUP):
            tl.store(y + (row * T + begin + i) * E + e, outs[i].to(y.dtype.element_ty), (begin + i < T) & (e < E))
    store(last + row * E * N, e, n, N, 1, E, N, h)


@triton.jit
def _backward(
    dy, dlast, x, dt, A, B, C, D, z, states, lengths, dx, ddt, dA, dB, dC, dD, dz, dstate, room, T, E,
    N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dA, dD: one for each row; dB, dC: one for each tile [tiles, R, T, N]; room: [R, tiles, SPAN / GROUP, TILE, WIDTH]."""
    row, tile, rows, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    e, n, rates, skip, length = _tile(A, D, lengths, row, T, E, N, TILE, WIDTH, ACC)
    own = tl.arange(0, TILE)
    room += (row * tiles + tile) * (SPAN // GROUP) * TILE * WIDTH
    dB += tile * rows * T * N
    dC += tile * rows * T * N
    dh, sum_A, sum_D = load(dlast + row * E * N, e, n, N, 1, E, N, ACC), tl.zeros([TILE, WIDTH], ACC), tl.zeros([TILE], ACC)
    chunks = tl.cdiv(T, SPAN)
    for from_last in range(chunks):
        chunk = chunks - 1 - from_last
        groups = tl.cdiv(tl.minimum(T - chunk * SPAN, SPAN), GROUP)
        h = load(states + (row * chunks + chunk) * E * N, e, n, N, 1, E, N, ACC)
        for group in range(groups):
            store(room + group * TILE * WIDTH, own, n, WIDTH, 1, TILE, WIDTH, h)
            for i in tl.static_range(GROUP):
                t = chunk * SPAN + group * GROUP + i
                at, real = row * T + t, t < length
                h = _step(h, rates, _take(x, at, e, E, real, ACC), _take(dt, at, e, E, real, ACC), _take(B, at, n, N, real, ACC))
        tl.debug_barrier()  # what one thread stored another may load
        for before in range(groups):
            group = groups - 1 - before
            xs, dts, Bs, Cs, dys, zs, decays = _none(), _none(), _none(), _none(), _none(), _none(), _none()  # loaded first: no load may overtake a store
            hs = _none()
            hs += (load(room + group * TILE * WIDTH, own, n, WIDTH, 1, TILE, WIDTH, ACC),)
            for i in tl.static_range(GROUP):
                t = chunk * SPAN + group * GROUP + i
                at, real = row * T + t, t < length
                xs += (_take(x, at, e, E, real, ACC),)
                dts += (_take(dt, at, e, E, real, ACC),)
                dys += (_take(dy, at, e, E, real, ACC),)
                Bs += (_take(B, at, n, N, real, ACC),)
                Cs += (_take(C, at, n, N, real, ACC),)
                if z is not None:
                    zs += (_take(z, at, e, E, real, ACC),)
                decays += (tl.exp2(dts[i][:, None] * rates),)
                hs += (decays[i] * hs[i] + (dts[i] * xs[i])[:, None] * Bs[i][None, :],)
            for i in tl.static_range(GROUP - 1, -1, -1):
                t = chunk * SPAN + group * GROUP + i
                at, stored, out = row * T + t, (t < T) & (e < E), dys[i]
                if z is not None:
                    open_ = _sigmoid(zs[i])
                    read = tl.sum(hs[i + 1] * Cs[i][None, :], 1) + skip * xs[i]
                    tl.store(dz + at * E + e, (out * read * open_ * (1 + zs[i] * (1 - open_))).to(dz.dtype.element_ty), stored)
                    out *= zs[i] * open_  # the gradient of y before the gate
                g = dh + out[:, None] * Cs[i][None, :]
                for_B, for_C = tl.reduce((g * (dts[i] * xs[i])[:, None], hs[i + 1] * out[:, None]), 0, _add)
                tl.store(dB + at * N + n, for_B, (t < T) & (n < N))
                tl.store(dC + at * N + n, for_C, (t < T) & (n < N))
                dh = g * decays[i]
                w, du = dh * hs[i], tl.sum(g * Bs[i][None, :], 1)
                step = tl.where(t < length, tl.sum(w * rates, 1) / LOG2E + du * xs[i], 0.0)
                tl.store(ddt + at * E + e, step.to(ddt.dtype.element_ty), stored)
                tl.store(dx + at * E + e, (du * dts[i] + skip * out).to(dx.dtype.element_ty), stored)
                sum_A += w * dts[i][:, None]
                sum_D += out * xs[i]
        tl.debug_barrier()  # before room is written again
    store(dA + row * E * N, e, n, N, 1, E, N, sum_A)
    store(dstate + row * E * N, e, n, N, 1, E, N, dh)
    if D is not None:
        tl.store(dD + row * E + e, sum_D, e < E)


def _given(widest: int, warps: int, **inputs: Maybe) -> tuple[dict[str, Any], tuple[int, int], int]:
    """What both kernels ask for, by the names they use; the grid and the warps of a program."""
    a: dict[str, Any] = {name: None if v is None else v.contiguous() for name, v in inputs.items()}
    (R, T, E), N = a["x"].shape, a["A"].shape[1]
    width = max(4, triton.next_power_of_2(N))
    tile, warps = tiling(width, widest, warps)
    a |= {"T": T, "E": E, "N": N, "TILE": tile, "WIDTH": width, "SPAN": SPAN, "ACC": accumulator(a["x"].dtype)}
    return a, (R, triton.cdiv(E, tile)), warps


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The memory of the states that are kept is [R, chunks, E, N], whatever their shape says."""
    (R, T, E), N = x.shape, A.shape[1]
    a, grid, warps = _given(32, 1, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, state=state, lengths=lengths)
    y, last = x.new_empty(R, T, E), x.new_empty(R, E, N, dtype=operator.wide(x))
    states = last.new_empty((R, triton.cdiv(T, SPAN), N, E) if save else 0)
    launch(_forward, grid, warps, **a, y=y, last=last, states=states if save else None, GROUP=4)
    return y, last, states


def scan_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, states: Tensor, lengths: Maybe
) -> Gradients:
    (R, T, E), N = x.shape, A.shape[1]
    a, grid, warps = _given(64, 4, dy=dy, dlast=dlast, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, states=states, lengths=lengths)
    a["GROUP"] = 2 if a["WIDTH"] < 256 else 1  # with more registers spill
    dx, ddt, dz = (None if v is None else v.new_empty(v.shape) for v in (x, dt, z))
    dA, dstate, dD = states.new_empty(R, E, N), states.new_empty(R, E, N), None if D is None else states.new_empty(R, E)
    dB, dC = (states.new_empty(grid[1], R, T, N) for _ in range(2))
    room = states.new_empty(*grid, SPAN // a["GROUP"], a["TILE"], a["WIDTH"])
    launch(_backward, grid, warps, **a, dx=dx, ddt=ddt, dA=dA, dB=dB, dC=dC, dD=dD, dz=dz, dstate=dstate, room=room)
    found = dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), None if dD is None else dD.sum(0), dz
    grads = [x.new_empty(0) if g is None or v is None else g.to(v.dtype) for g, v in zip(found, (x, dt, A, B, C, D, z), strict=True)]
    return *grads, dstate  # type: ignore[return-value]  # seven of them


selective_scan = operator.define("selective_scan_triton", scan, scan_backward, lambda *_: SPAN)
flops.file(operator.flops("selective_scan_triton"))


def checks() -> Iterator[Check]:
    """As a layer has it under autocast, steps and parameters in float32; and everything in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        for N, every in ((16, True), (16, False), (64, True), (256, True)):
            x, A, B = (torch.empty(n, dtype=dtype, device="meta") for n in ((1, 2 * SPAN, 1536), (1536, N), (1, 2 * SPAN, N)))
            dt, A = x.float(), A.float()
            D, z, state, lengths = (A[:, 0], x, A[None], B[:, 0, 0].long()) if every else (None, None, None, None)
            with noted() as found:
                y, last, states = scan(x, dt, A, B, B, D, z, state, lengths, every)
                if every:
                    scan_backward(y, last, x, dt, A, B, B, D, z, states, lengths)
            yield from found
