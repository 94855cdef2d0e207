"""The kernels of triton_dual.py: chunk.py with a program for every chunk of every head, or for every head where the chunks must go in turn.

Every matrix lies in one piece, those of chunk t and head x of a group at t X + x. W and S, and their gradients, have a slot more: they stand before
chunk t at t X + x, after it at (t + 1) X + x. Of a product no more than a tile is held: what goes into the next one goes through memory, and where it
is of the same kernel, over a barrier.

    k -> z_1 -> x -> z      keys: x is what the last layer is fed, k itself where there is but one layer
    q ->        y -> o      queries, likewise
    w1, s1, u1, ..          of the first of two layers, None where there is but one; without a number, of the last
    asked, wrong            gradients of what the layers answer, to queries and to keys

    X = B H   C tokens in a chunk   K width of keys   F of z_1   I of x: F, or F + 1 with a bias   V of values
    BC, BV tiles that hold all of C and V
    HOW: type of factors, type of sums, precision of products, tile of all other widths, slice of what a product sums over
"""

import triton
import triton.language as tl

from memarch.kernels.launch import dot, load, store
from memarch.kernels.neural_memory import inner

EPS = tl.constexpr(inner.EPS)
TINY = tl.constexpr(inner.TINY)


@triton.jit
def _times(a, b, i, j, I, D, J, AT: tl.constexpr, BT: tl.constexpr, HOW: tl.constexpr, weight=None):
    """The tile [i, j] of A B for A [I, D] and B [D, J]: what lies there, or (AT, BT) the transposed of it. The rows of B by `weight` [D]."""
    out = tl.zeros([i.shape[0], j.shape[0]], HOW[1])
    for first in range(0, D, HOW[4]):
        d = first + tl.arange(0, HOW[4])
        A = load(a, i, d, 1, I, I, D, HOW[0]) if AT else load(a, i, d, D, 1, I, D, HOW[0])
        B = load(b, d, j, 1, D, D, J, HOW[0]) if BT else load(b, d, j, J, 1, D, J, HOW[0])
        if weight is not None:
            B = B.to(HOW[1]) * _row(weight, d, D)[:, None]
        out += dot(A, B, HOW[0], HOW[2])
    return out


@triton.jit
def _row(x, i, I):
    return tl.load(x + i, i < I, 0.0)


@triton.jit
def _squares(x, i, I, D: tl.constexpr, HOW: tl.constexpr):
    """The squared lengths of the rows."""
    out = tl.zeros([i.shape[0]], HOW[1])
    for first in range(0, D, HOW[3]):
        X = load(x, i, first + tl.arange(0, HOW[3]), D, 1, I, D, HOW[1])
        out += tl.sum(X * X, 1)
    return out


@triton.jit
def _curve(z, ACT: tl.constexpr):
    """phi, phi' and phi''"""
    if ACT == "gelu":
        below = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        bell = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return z * below, below + z * bell, bell * (2 - z * z)
    else:
        s = 1 / (1 + tl.exp(-z))
        return z * s, s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))


@triton.jit
def _normal(z, o, V: tl.constexpr, POST: tl.constexpr):
    """zh and r of inner.py"""
    if POST == "ln":
        z = tl.where((o < V)[None, :], z - (tl.sum(z, 1) / V)[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(z * z, 1) / V + EPS)
    return z * r[:, None], r[:, None]


@triton.jit
def _J(a, zh, r, o, V: tl.constexpr, POST: tl.constexpr):
    a -= zh * (tl.sum(a * zh, 1) / V)[:, None]
    if POST == "ln":
        a = tl.where((o < V)[None, :], a - (tl.sum(a, 1) / V)[:, None], 0.0)
    return a * r


@triton.jit
def _scaled(a, gain, o, V: tl.constexpr):
    if gain is not None:
        a *= _row(gain, o, V)[None, :]
    return a


@triton.jit
def _answer(z, k, gain, bias, i, o, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, POST: tl.constexpr, HOW: tl.constexpr):
    if POST == "none":
        return z
    else:
        if POST != "res":
            z = _scaled(_normal(z, o, V, POST)[0], gain, o, V)
        if bias is not None:
            z += _row(bias, o, V)[None, :]
        return z + load(k, i, o, K, 1, C, V, HOW[1])


@triton.jit
def _clipped(d, size, CLIP: tl.constexpr):
    """d of a gradient whose squared length is `size`."""
    return d / tl.maximum(tl.sqrt(size) / CLIP, 1.0)[:, None]


@triton.jit
def _own(x, head, SIZE: tl.constexpr):
    """Where that of a head lies, if there is one."""
    if x is not None:
        x += head * SIZE
    return x


@triton.jit
def _learn(
    at, k, v, gain, bias, p1, p, x, slope, bend, e, u1, u, d, z,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, I: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    ACT: tl.constexpr, POST: tl.constexpr, CLIP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """What a chunk writes: x, u and u1, with d, which is u before the clip; for the backward also z, phi'' (bend) and e."""
    i, o = tl.arange(0, BC), tl.arange(0, BV)
    k, v, x, u, d, p = k + at * C * K, v + at * C * V, x + at * C * I, u + at * C * V, d + at * C * V, p + at * I * V
    if p1 is not None:
        p1, slope, u1 = p1 + at * K * F, slope + at * C * F, u1 + at * C * F
        for first in range(0, I, HOW[3]):
            j = first + tl.arange(0, HOW[3])
            X, rise, turn = _curve(_times(k, p1, i, j, C, K, F, False, False, HOW), ACT)
            store(x, i, j, I, 1, C, I, tl.where((j < F)[None, :], X, 1.0))
            store(slope, i, j, F, 1, C, F, rise)
            if bend is not None:
                store(bend + at * C * F, i, j, F, 1, C, F, turn)
        tl.debug_barrier()
    Z = _times(x, p, i, o, C, I, V, False, False, HOW)
    D = _answer(Z, k, gain, bias, i, o, C, K, V, POST, HOW) - load(v, i, o, V, 1, C, V, HOW[1])
    if POST == "rms" or POST == "ln":
        zh, r = _normal(Z, o, V, POST)
        D = _J(_scaled(D, gain, o, V), zh, r, o, V, POST)
    store(d, i, o, V, 1, C, V, D)
    if z is not None:
        store(z + at * C * V, i, o, V, 1, C, V, Z)
    if CLIP is not None:
        store(u, i, o, V, 1, C, V, _clipped(D, _squares(x, i, C, I, HOW) * tl.sum(D * D, 1), CLIP))
    tl.debug_barrier()
    if p1 is not None:
        size = tl.zeros([BC], HOW[1])
        for first in range(0, F, HOW[3]):
            j = first + tl.arange(0, HOW[3])
            E = _times(d, p, i, j, C, V, F, False, True, HOW)
            D1 = E * load(slope, i, j, F, 1, C, F, HOW[1])
            if e is not None:
                store(e + at * C * F, i, j, F, 1, C, F, E)
            if CLIP is None:
                store(u1, i, j, F, 1, C, F, D1)
            else:
                size += tl.sum(D1 * D1, 1)
        tl.debug_barrier()
        if CLIP is not None:
            size *= _squares(k, i, C, K, HOW)
            for first in range(0, F, HOW[3]):
                j = first + tl.arange(0, HOW[3])
                D1 = load(e + at * C * F, i, j, F, 1, C, F, HOW[1]) * load(slope, i, j, F, 1, C, F, HOW[1])
                store(u1, i, j, F, 1, C, F, _clipped(D1, size, CLIP))
            tl.debug_barrier()


@triton.jit
def learn(
    k, v, gain, bias, p1, p, x, slope, bend, e, u1, u, d, z,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, I: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    ACT: tl.constexpr, POST: tl.constexpr, CLIP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """All chunks at once, where the weights before each are known."""
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tl.num_programs(0) + head
    gain, bias = _own(gain, head, V), _own(bias, head, V)
    _learn(at, k, v, gain, bias, p1, p, x, slope, bend, e, u1, u, d, z, C, K, F, I, V, BC, BV, ACT, POST, CLIP, HOW)


@triton.jit
def _keep(
    at, after, w, s, start, pulled, cw, cs, c0, cp, G, E, m, x, u,
    C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """W and S of one layer after a chunk."""
    for first in range(0, I, HOW[3]):
        i = first + tl.arange(0, HOW[3])
        for second in range(0, O, HOW[3]):
            j = second + tl.arange(0, HOW[3])
            W = tl.load(cw + at * (C + 1) + C) * load(w + at * I * O, i, j, O, 1, I, O, HOW[1])
            W += _times(x + at * C * I, u + at * C * O, i, j, I, C, O, True, False, HOW, G + (at * (C + 1) + C) * C)
            if start is not None:
                W += tl.load(c0 + at * (C + 1) + C) * load(start, i, j, O, 1, I, O, HOW[1])
            if pulled is not None:
                W += tl.load(cp + at * (C + 1) + C) * load(pulled, i, j, O, 1, I, O, HOW[1])
            if s is not None:
                S = load(s + at * I * O, i, j, O, 1, I, O, HOW[1])
                W += tl.load(cs + at * (C + 1) + C) * S
                S = tl.load(m + at) * S + _times(x + at * C * I, u + at * C * O, i, j, I, C, O, True, False, HOW, E + at * C)
                store(s + after * I * O, i, j, O, 1, I, O, S)
            store(w + after * I * O, i, j, O, 1, I, O, W)


@triton.jit
def scan(
    k, v, gain, bias, p1, p, x, slope, e, u1, u, d, w1, w, s1, s, start1, start, pulled1, pulled, cw, cs, c0, cp, G, E, m, n,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, I: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    ACT: tl.constexpr, POST: tl.constexpr, CLIP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One chunk after the other: what it writes, and W and S after it. E: the last rows only, [n X, C]."""
    head, X = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    gain, bias = _own(gain, head, V), _own(bias, head, V)
    start1, start, pulled1, pulled = _own(start1, head, K * F), _own(start, head, I * V), _own(pulled1, head, K * F), _own(pulled, head, I * V)
    for t in tl.range(n, disable_licm=True):
        at = t * X + head
        _learn(at, k, v, gain, bias, p1, p, x, slope, None, e, u1, u, d, None, C, K, F, I, V, BC, BV, ACT, POST, CLIP, HOW)
        if w1 is not None:
            _keep(at, at + X, w1, s1, start1, pulled1, cw, cs, c0, cp, G, E, m, k, u1, C, K, F, HOW)
        _keep(at, at + X, w, s, start, pulled, cw, cs, c0, cp, G, E, m, x, u, C, I, V, HOW)
        tl.debug_barrier()


@triton.jit
def _mixed(c, B, y, i, j, C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, HOW: tl.constexpr):
    """What the queries meet of W, S or another basis."""
    return _row(c, i, C)[:, None] * _times(y, B, i, j, C, I, O, False, False, HOW)


@triton.jit
def read(
    y, x, u, G, cw, cs, c0, cp, w, s, start, pulled, q, gain, bias, do, out, slope, dgain, dbias,
    C: tl.constexpr, K: tl.constexpr, I: tl.constexpr, O: tl.constexpr, NEXT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    ACT: tl.constexpr, POST: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The queries through one layer. POST None: out [C, NEXT] is what the layer behind it is fed, and for the backward slope. Else the answers; for
    the backward, which has do, `asked` in their stead, and what gain and bias get by chunks."""
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tl.num_programs(0) + head
    gain, bias, start, pulled = _own(gain, head, O), _own(bias, head, O), _own(start, head, I * O), _own(pulled, head, I * O)
    i, rows = tl.arange(0, BC), at * (C + 1)
    y, x, u, w, out = y + at * C * I, x + at * C * I, u + at * C * O, w + at * I * O, out + at * C * NEXT
    A = _times(y, x, i, i, C, I, C, False, True, HOW) * load(G + rows * C, i, i, C, 1, C, C, HOW[1])
    for first in range(0, NEXT, BO):
        j = first + tl.arange(0, BO)
        Z = dot(A, load(u, i, j, O, 1, C, O, HOW[0]), HOW[0], HOW[2])
        Z += _mixed(cw + rows, w, y, i, j, C, I, O, HOW)
        if s is not None:
            Z += _mixed(cs + rows, s + at * I * O, y, i, j, C, I, O, HOW)
        if start is not None:
            Z += _mixed(c0 + rows, start, y, i, j, C, I, O, HOW)
        if pulled is not None:
            Z += _mixed(cp + rows, pulled, y, i, j, C, I, O, HOW)
        if POST is None:
            Y, rise, _ = _curve(Z, ACT)
            store(out, i, j, NEXT, 1, C, NEXT, tl.where((j < O)[None, :], Y, 1.0))
            if slope is not None:
                store(slope + at * C * O, i, j, O, 1, C, O, rise)
        elif do is None:
            store(out, i, j, O, 1, C, O, _answer(Z, q + at * C * K, gain, bias, i, j, C, K, O, POST, HOW))
        else:
            dO = load(do + at * C * O, i, j, O, 1, C, O, HOW[1])
            dZ = dO
            if POST == "rms" or POST == "ln":
                zh, r = _normal(Z, j, O, POST)
                dZ = _J(_scaled(dO, gain, j, O), zh, r, j, O, POST)
                if gain is not None:
                    tl.store(dgain + at * O + j, tl.sum(dO * zh, 0), j < O)
                if bias is not None:
                    tl.store(dbias + at * O + j, tl.sum(dO, 0), j < O)
            store(out, i, j, O, 1, C, O, dZ)


@triton.jit
def _mixed_back(dY, dc, c, B, asked, Y, i, j, C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, HOW: tl.constexpr):
    """dY and dc with the part of one basis."""
    back = _times(asked, B, i, j, C, O, I, False, True, HOW)
    return dY + _row(c, i, C)[:, None] * back, dc + tl.sum(Y * back, 1)


@triton.jit
def read_back(
    y, x, u, G, cw, cs, c0, cp, w, s, start, pulled, asked, do, slope, near, dnear, out, dx, du, dG, dcw, dcs, dc0, dcp,
    C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, BEFORE: tl.constexpr, BC: tl.constexpr, POST: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Back through one layer, from `asked`. out: `asked` of the layer before, whose answers are BEFORE wide, with its slope; or else dq.
    dx, du: what this asks of the keys' side. near, dnear: room for y x^T o G and its gradient o G."""
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tl.num_programs(0) + head
    start, pulled = _own(start, head, I * O), _own(pulled, head, I * O)
    i, rows = tl.arange(0, BC), at * (C + 1)
    y, x, u, asked, near, dnear = y + at * C * I, x + at * C * I, u + at * C * O, asked + at * C * O, near + at * C * C, dnear + at * C * C
    A, dA = _times(y, x, i, i, C, I, C, False, True, HOW), _times(asked, u, i, i, C, O, C, False, True, HOW)
    g = load(G + rows * C, i, i, C, 1, C, C, HOW[1])
    store(dG + rows * C, i, i, C, 1, C, C, A * dA)
    store(near, i, i, C, 1, C, C, A * g)
    store(dnear, i, i, C, 1, C, C, dA * g)
    tl.debug_barrier()
    for first in range(0, O, HOW[3]):
        j = first + tl.arange(0, HOW[3])
        store(du + at * C * O, i, j, O, 1, C, O, _times(near, asked, i, j, C, C, O, True, False, HOW))
    none = tl.zeros([BC], HOW[1])
    dw, ds, d0, dp = none, none, none, none
    for first in range(0, I, HOW[3]):
        j = first + tl.arange(0, HOW[3])
        Y = load(y, i, j, I, 1, C, I, HOW[1])
        store(dx + at * C * I, i, j, I, 1, C, I, _times(dnear, y, i, j, C, C, I, True, False, HOW))
        dY, dw = _mixed_back(_times(dnear, x, i, j, C, C, I, False, False, HOW), dw, cw + rows, w + at * I * O, asked, Y, i, j, C, I, O, HOW)
        if s is not None:
            dY, ds = _mixed_back(dY, ds, cs + rows, s + at * I * O, asked, Y, i, j, C, I, O, HOW)
        if start is not None:
            dY, d0 = _mixed_back(dY, d0, c0 + rows, start, asked, Y, i, j, C, I, O, HOW)
        if pulled is not None:
            dY, dp = _mixed_back(dY, dp, cp + rows, pulled, asked, Y, i, j, C, I, O, HOW)
        if slope is not None:
            store(out + at * C * BEFORE, i, j, BEFORE, 1, C, BEFORE, dY * load(slope + at * C * BEFORE, i, j, BEFORE, 1, C, BEFORE, HOW[1]))
        else:
            if POST != "none":
                dY += load(do + at * C * BEFORE, i, j, BEFORE, 1, C, BEFORE, HOW[1])
            store(out + at * C * I, i, j, I, 1, C, I, dY)
    tl.store(dcw + rows + i, dw, i < C)
    if s is not None:
        tl.store(dcs + rows + i, ds, i < C)
    if start is not None:
        tl.store(dc0 + rows + i, d0, i < C)
    if pulled is not None:
        tl.store(dcp + rows + i, dp, i < C)


@triton.jit
def _lost(told, xx, dd, CLIP: tl.constexpr):
    """Backwards through the clip, for squared lengths xx of x and dd of d, and told = du.d: by how much to scale du, and how much of d and of x to
    take off the gradients of d and x, as what is clipped does not depend on either's length."""
    excess = tl.sqrt(xx * dd) / CLIP
    scale = 1 / tl.maximum(excess, 1.0)
    lost = tl.where(excess > 1, scale * told, 0.0)
    return scale[:, None], (lost / tl.maximum(dd, TINY))[:, None], lost / tl.maximum(xx, TINY)


@triton.jit
def _bent(dD, at, slope, bend, e, de, turned, i, j, C: tl.constexpr, F: tl.constexpr, HOW: tl.constexpr):
    """Backwards through d = e phi', to e and to what phi' is of."""
    store(de + at * C * F, i, j, F, 1, C, F, dD * load(slope + at * C * F, i, j, F, 1, C, F, HOW[1]))
    E = load(e + at * C * F, i, j, F, 1, C, F, HOW[1])
    store(turned + at * C * F, i, j, F, 1, C, F, dD * E * load(bend + at * C * F, i, j, F, 1, C, F, HOW[1]))


@triton.jit
def _error_back(
    at, freed, z, k, v, gain, bias, wrong, dv, dgain, dbias,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, POST: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """How the error came about: from its gradient, in `freed`, to those of z and v; a few rows at a time, as it takes so many tiles."""
    freed, z, v, wrong, dv = freed + at * C * V, z + at * C * V, v + at * C * V, wrong + at * C * V, dv + at * C * V
    o = tl.arange(0, BV)
    gained, biased = tl.zeros([BV], HOW[1]), tl.zeros([BV], HOW[1])
    for first in range(0, C, 16):
        i = first + tl.arange(0, 16)
        dD, Z = load(freed, i, o, V, 1, C, V, HOW[1]), load(z, i, o, V, 1, C, V, HOW[1])
        zh, r = _normal(Z, o, V, POST)
        miss = _answer(Z, k + at * C * K, gain, bias, i, o, C, K, V, POST, HOW) - load(v, i, o, V, 1, C, V, HOW[1])
        e, de = _scaled(miss, gain, o, V), _J(dD, zh, r, o, V, POST)
        dmiss = _scaled(de, gain, o, V)
        gained += tl.sum(de * miss + dmiss * zh, 0)
        biased += tl.sum(dmiss, 0)
        crossed = r * (dD * (tl.sum(e * zh, 1) / V)[:, None] + e * (tl.sum(dD * zh, 1) / V)[:, None])
        dZ = _J(_scaled(dmiss, gain, o, V) - crossed, zh, r, o, V, POST) - r * zh * (tl.sum(de * e, 1) / V)[:, None]
        store(wrong, i, o, V, 1, C, V, dZ)
        store(dv, i, o, V, 1, C, V, -dmiss)
    if gain is not None:
        tl.store(dgain + at * V + o, gained, o < V)
    if bias is not None:
        tl.store(dbias + at * V + o, biased, o < V)


@triton.jit
def _keep_back(
    at, after, dw, ds, dlast, dp, cw, cs, m, y, asked, x, wrong, de, d, standing,
    C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, F: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The gradients of W and S of one layer before a chunk. What it learnt from: W, or with dp a point of its own."""
    y, asked, x, wrong, rows = y + at * C * I, asked + at * C * O, x + at * C * I, wrong + at * C * O, at * (C + 1)
    for first in tl.range(0, I, HOW[3], disable_licm=True):
        i = first + tl.arange(0, HOW[3])
        for second in tl.range(0, O, HOW[3], disable_licm=True):
            j = second + tl.arange(0, HOW[3])
            dP = _times(x, wrong, i, j, I, C, O, True, False, HOW)
            if de is not None:
                dP += _times(de + at * C * F, d + at * C * O, i, j, F, C, O, True, False, HOW)
            dW = load(dlast, i, j, O, 1, tl.where(standing, I, 0), O, HOW[1])
            if dp is None:
                dW += dP
            else:
                store(dp + at * I * O, i, j, O, 1, I, O, dP)
            dW += _times(y, asked, i, j, I, C, O, True, False, HOW, cw + rows)
            dW += tl.load(cw + rows + C) * load(dw + after * I * O, i, j, O, 1, I, O, HOW[1])
            store(dw + at * I * O, i, j, O, 1, I, O, dW)
    if ds is not None:  # by itself, or registers spill
        for first in tl.range(0, I, HOW[3], disable_licm=True):
            i = first + tl.arange(0, HOW[3])
            for second in tl.range(0, O, HOW[3], disable_licm=True):
                j = second + tl.arange(0, HOW[3])
                dS = _times(y, asked, i, j, I, C, O, True, False, HOW, cs + rows)
                dS += tl.load(m + at) * load(ds + after * I * O, i, j, O, 1, I, O, HOW[1])
                dS += tl.load(cs + rows + C) * load(dw + after * I * O, i, j, O, 1, I, O, HOW[1])
                store(ds + at * I * O, i, j, O, 1, I, O, dS)


@triton.jit
def scan_back(
    k, v, gain, bias, p1, p, x, slope, bend, e, u, d, z, q, y, asked1, asked, G, E, m, cw, cs,
    du1, du, dx, dw1, dw, ds1, ds, dlast1, dlast, stands, dp1, dp, raw, de, turned, freed, wrong1, wrong, dv, lost, dgain, dbias, dG, dE, n,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, I: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    POST: tl.constexpr, CLIP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One chunk before the other: what its writes and keys, and W and S before it, get. The slots of dw and ds hold what is after the last chunk.
    stands: before which chunk W also is the point that goes on, which gets dlast.

    freed    the gradient of d before the clip, then with what came by the errors below    raw      the same of the first layer, clipped
    de       of e    turned   of z_1 by way of phi'    wrong1, wrong   of z_1 and z in all    lost   how much of k the first layer's clip takes off dk"""
    head, X = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    gain, bias, dlast1, dlast = _own(gain, head, V), _own(bias, head, V), _own(dlast1, head, K * F), _own(dlast, head, I * V)
    i, o = tl.arange(0, BC), tl.arange(0, BV)
    for back in tl.range(n, disable_licm=True):
        t = n - 1 - back
        at, after = t * X + head, (t + 1) * X + head
        values, hidden, weights = at * C * V, at * C * F, after * I * V
        last = (at * (C + 1) + C) * C
        dD = load(du + values, i, o, V, 1, C, V, HOW[1]) + _mixed(G + last, dw + weights, x + at * C * I, i, o, C, I, V, HOW)
        if ds is not None:
            dD += _mixed(E + at * C, ds + weights, x + at * C * I, i, o, C, I, V, HOW)
        taken = tl.zeros([BC], HOW[1])
        if CLIP is not None:
            D = load(d + values, i, o, V, 1, C, V, HOW[1])
            scale, off, taken = _lost(tl.sum(dD * D, 1), _squares(x + at * C * I, i, C, I, HOW), tl.sum(D * D, 1), CLIP)
            dD = scale * dD - off * D
            if p1 is None:
                tl.store(lost + at * C + i, taken, i < C)
        if p1 is not None:
            store(freed + values, i, o, V, 1, C, V, dD)
            told, dd = tl.zeros([BC], HOW[1]), tl.zeros([BC], HOW[1])
            for first in tl.range(0, F, HOW[3], disable_licm=True):
                j = first + tl.arange(0, HOW[3])
                dD1 = load(du1 + hidden, i, j, F, 1, C, F, HOW[1])
                dD1 += _mixed(G + last, dw1 + after * K * F, k + at * C * K, i, j, C, K, F, HOW)
                if ds1 is not None:
                    dD1 += _mixed(E + at * C, ds1 + after * K * F, k + at * C * K, i, j, C, K, F, HOW)
                if CLIP is None:
                    _bent(dD1, at, slope, bend, e, de, turned, i, j, C, F, HOW)
                else:
                    D1 = load(e + hidden, i, j, F, 1, C, F, HOW[1]) * load(slope + hidden, i, j, F, 1, C, F, HOW[1])
                    told += tl.sum(dD1 * D1, 1)
                    dd += tl.sum(D1 * D1, 1)
                    store(raw + hidden, i, j, F, 1, C, F, dD1)
            tl.debug_barrier()
            if CLIP is not None:
                scale, off, taken1 = _lost(told, _squares(k + at * C * K, i, C, K, HOW), dd, CLIP)
                tl.store(lost + at * C + i, taken1, i < C)
                for first in tl.range(0, F, HOW[3], disable_licm=True):
                    j = first + tl.arange(0, HOW[3])
                    D1 = load(e + hidden, i, j, F, 1, C, F, HOW[1]) * load(slope + hidden, i, j, F, 1, C, F, HOW[1])
                    dD1 = scale * load(raw + hidden, i, j, F, 1, C, F, HOW[1]) - off * D1
                    _bent(dD1, at, slope, bend, e, de, turned, i, j, C, F, HOW)
                tl.debug_barrier()
            dD = load(freed + values, i, o, V, 1, C, V, HOW[1]) + _times(de + hidden, p + at * I * V, i, o, C, F, V, False, False, HOW)
        if POST == "rms" or POST == "ln":
            store(freed + values, i, o, V, 1, C, V, dD)
            tl.debug_barrier()
            _error_back(at, freed, z, k, v, gain, bias, wrong, dv, dgain, dbias, C, K, V, BV, POST, HOW)
        else:
            store(wrong + values, i, o, V, 1, C, V, dD)
            store(dv + values, i, o, V, 1, C, V, -dD)
        tl.debug_barrier()
        if p1 is not None:
            by_w, by_s = tl.zeros([BC], HOW[1]), tl.zeros([BC], HOW[1])
            for first in tl.range(0, I, HOW[3], disable_licm=True):
                j = first + tl.arange(0, HOW[3])
                X_ = load(x + at * C * I, i, j, I, 1, C, I, HOW[1])
                dX = load(dx + at * C * I, i, j, I, 1, C, I, HOW[1]) - taken[:, None] * X_
                dX += _times(wrong + values, p + at * I * V, i, j, C, V, I, False, True, HOW)
                dX, by_w = _mixed_back(dX, by_w, G + last, dw + weights, u + values, X_, i, j, C, I, V, HOW)
                if ds is not None:
                    dX, by_s = _mixed_back(dX, by_s, E + at * C, ds + weights, u + values, X_, i, j, C, I, V, HOW)
                dX = dX * load(slope + hidden, i, j, F, 1, C, F, HOW[1]) + load(turned + hidden, i, j, F, 1, C, F, HOW[1])
                store(wrong1 + hidden, i, j, F, 1, C, F, dX)
            tl.store(dG + last + i, by_w, i < C)
            if ds is not None:
                tl.store(dE + at * C + i, by_s, i < C)
            tl.debug_barrier()
        here = tl.load(stands + head) == t
        if p1 is not None:
            _keep_back(at, after, dw1, ds1, dlast1, dp1, cw, cs, m, q, asked1, k, wrong1, None, None, here, C, K, F, F, HOW)
        _keep_back(at, after, dw, ds, dlast, dp, cw, cs, m, y, asked, x, wrong, de, d, here, C, I, V, F, HOW)
        tl.debug_barrier()


@triton.jit
def keys_back(
    k, u, wrong, p, dw, ds, G, E, dx, dv, lost, dk, dG, dE,
    C: tl.constexpr, K: tl.constexpr, O: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, POST: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """What of the first layer no chunk before has to wait for: dk, and what G's and E's last rows get."""
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0).to(tl.int64)
    after, last = at + tl.num_programs(0), (at * (C + 1) + C) * C
    i, by_w, by_s = tl.arange(0, BC), tl.zeros([BC], HOW[1]), tl.zeros([BC], HOW[1])
    for first in range(0, K, HOW[3]):
        j = first + tl.arange(0, HOW[3])
        K_, dK = load(k + at * C * K, i, j, K, 1, C, K, HOW[1]), load(dx + at * C * K, i, j, K, 1, C, K, HOW[1])
        dK += _times(wrong + at * C * O, p + at * K * O, i, j, C, O, K, False, True, HOW)
        dK, by_w = _mixed_back(dK, by_w, G + last, dw + after * K * O, u + at * C * O, K_, i, j, C, K, O, HOW)
        if ds is not None:
            dK, by_s = _mixed_back(dK, by_s, E + at * C, ds + after * K * O, u + at * C * O, K_, i, j, C, K, O, HOW)
        if lost is not None:
            dK -= _row(lost + at * C, i, C)[:, None] * K_
        if POST != "none":
            dK -= load(dv + at * C * V, i, j, V, 1, C, V, HOW[1])
        store(dk + at * C * K, i, j, K, 1, C, K, dK)
    tl.store(dG + last + i, by_w, i < C)
    if ds is not None:
        tl.store(dE + at * C + i, by_s, i < C)


@triton.jit
def dots(a, b, out, SIZE: tl.constexpr, FIXED: tl.constexpr, BLOCK: tl.constexpr, HOW: tl.constexpr):
    """a.b of two matrices of SIZE numbers for every chunk and head; FIXED: b has one for every head."""
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tl.num_programs(0) + head
    total = tl.zeros([BLOCK], HOW[1])
    for first in range(0, SIZE, BLOCK):
        j = first + tl.arange(0, BLOCK)
        total += _row(a + at * SIZE, j, SIZE) * _row(b + (head if FIXED else at) * SIZE, j, SIZE)
    tl.store(out + at, tl.sum(total, 0))


@triton.jit
def constant_back(y, asked, dw, c, out, n, C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, HOW: tl.constexpr):
    """A tile of the gradient of a basis that is the same for all n chunks. dw: after every chunk."""
    head, X = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, j = tl.program_id(1) * HOW[3] + tl.arange(0, HOW[3]), tl.program_id(2) * HOW[3] + tl.arange(0, HOW[3])
    total = tl.zeros([i.shape[0], j.shape[0]], HOW[1])
    for t in range(n):
        at = t * X + head
        rows = c + at * (C + 1)
        total += tl.load(rows + C) * load(dw + at * I * O, i, j, O, 1, I, O, HOW[1])
        total += _times(y + at * C * I, asked + at * C * O, i, j, I, C, O, True, False, HOW, rows)
    store(out + head * I * O, i, j, O, 1, I, O, total)
