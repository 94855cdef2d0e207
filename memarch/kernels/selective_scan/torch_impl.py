"""The selective scan in chunks of tokens, time first and channels last, with its backward written by hand.

What a chunk needs is made for all its tokens at once, a = e^{dt A} and dt x B as [t, R, N, E]. Then a token is one multiply-add in place, and
one product with C reads the chunk. No decay is ever divided by, no sum of exponents subtracted: both lose what a strong decay leaves small.
With u = dt x, g_t the gradient of h_t and tokens in reverse:

    g_t = C_t dy_t + a_{t+1} g_{t+1}          beyond the end a g is the gradient of the new state, before the start it is that of the old one
    dC_t = h_t dy_t      dB_t = g_t u_t       summed over the channels
    du_t = g_t . B_t     dx_t = du_t dt_t + D dy_t
    w_t = g_t a_t h_{t-1}                     the gradient of the exponent dt A
    ddt_t = du_t x_t + w_t . A                dA = w_t dt_t summed over the tokens

    R rows   T tokens   E channels   N states of a channel   t tokens in a chunk
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.selective_scan.operator import LOG2E, Gradients, Maybe, define, flops, wide

ROOM = 2**19  # numbers that e^{dt A} has for a chunk, 2 MiB in float32: more do not stay in the cache, fewer are a call each for too little
SHORTEST, LONGEST = 8, 64  # tokens of a chunk


class Room:
    """The memory that all chunks are worked out in, which so stays in the cache: a = e^{dt A} and g [t, R, N, E], h [1 + t, R, N, E]."""

    def __init__(self, like: Tensor, t: int, R: int):
        self.h, self.a, self.g = (like.new_empty(n, R, *like.shape) for n in (1 + t, t, t))
        h, a, g = (x.unbind() for x in (self.h, self.a, self.g))
        self.steps = list(zip(a, h[:-1], h[1:], strict=True))
        self.steps_back = list(zip(a[1:], g[1:], g[:-1], strict=True))


class Chunk(NamedTuple):
    x: Tensor  # [t, R, E]
    dt: Tensor
    u: Tensor  # dt x
    B: Tensor  # [t, R, N]
    C: Tensor
    a: Tensor  # e^{dt A} [t, R, N, E]
    h: Tensor  # [1 + t, R, N, E], beginning with the state before the chunk


def span(R: int, E: int, N: int) -> int:
    return min(max(ROOM // (R * E * N), SHORTEST), LONGEST)


def parts(T: int, t: int) -> list[tuple[int, slice]]:
    return [(i, slice(begin, min(begin + t, T))) for i, begin in enumerate(range(0, T, t))]


def take(x: Tensor, part: slice, dtype: torch.dtype, lengths: Maybe) -> Tensor:
    """[R, T, .] -> the tokens of a chunk [t, R, .] in the working dtype; zeros at t >= lengths[r]."""
    y = x[:, part].transpose(0, 1).to(dtype).contiguous()
    return y if lengths is None else y.masked_fill(beyond(part, lengths), 0)


def beyond(part: slice, lengths: Tensor) -> Tensor:
    return (torch.arange(part.start, part.stop, device=lengths.device)[:, None] >= lengths)[..., None]  # [t, R, 1]


def put(x: Tensor, part: slice, value: Tensor) -> None:
    x[:, part] = value.transpose(0, 1)


def chunk(x: Tensor, dt: Tensor, rates: Tensor, B: Tensor, C: Tensor, before: Tensor, part: slice, lengths: Maybe, room: Room) -> Chunk:
    x, dt, B, C = (take(v, part, rates.dtype, lengths) for v in (x, dt, B, C))
    t, u = len(x), dt * x
    a, h = torch.mul(dt[:, :, None], rates, out=room.a[:t]).exp2_(), room.h[: 1 + t]
    h[0] = before
    torch.mul(u[:, :, None], B[..., None], out=h[1:])
    for decay, last, now in room.steps[:t]:
        now.addcmul_(decay, last)
    return Chunk(x, dt, u, B, C, a, h)


def read(c: Chunk, D: Maybe) -> Tensor:
    """y before the gate [t, R, E]."""
    y = (c.C[:, :, None] @ c.h[1:]).squeeze(2)
    return y if D is None else y.addcmul_(D, c.x)


@exact
def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, state: Maybe, lengths: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the new state, and for the backward the states before every chunk (empty unless `save`)."""
    (R, T, E), N, dtype = x.shape, A.shape[1], wide(x)
    rates, D = A.to(dtype).mT.contiguous() * LOG2E, None if D is None else D.to(dtype)
    h = rates.new_zeros(R, N, E) if state is None else state.to(dtype).mT
    t = span(R, E, N)
    room, y, states = Room(rates, t, R), x.new_empty(R, T, E), h.new_empty((R, len(parts(T, t)), N, E) if save else 0)
    for i, part in parts(T, t):
        if save:
            states[:, i] = h
        c = chunk(x, dt, rates, B, C, h, part, lengths, room)
        h, out = c.h[-1], read(c, D)
        put(y, part, out if z is None else out.mul_(F.silu(take(z, part, dtype, lengths))))
    return y, h.mT.clone(memory_format=torch.contiguous_format), states


@exact
def scan_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, states: Tensor, lengths: Maybe
) -> Gradients:
    (R, T, E), N, dtype = x.shape, A.shape[1], states.dtype
    rates, skip = A.to(dtype).mT.contiguous() * LOG2E, None if D is None else D.to(dtype)
    dx, ddt, dB, dC, dz = (x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, dt, B, C, z))
    drates, dskip = torch.zeros_like(rates), rates.new_zeros(0 if D is None else D.shape)
    t, dh = span(R, E, N), dlast.mT
    room = Room(rates, t, R)
    for i, part in reversed(parts(T, t)):
        c = chunk(x, dt, rates, B, C, states[:, i], part, lengths, room)
        out = take(dy, part, dtype, lengths)  # the gradient of y before the gate
        if z is not None:
            gate = take(z, part, dtype, lengths)
            open_ = gate.sigmoid()
            silu = gate * open_
            put(dz, part, read(c, skip).mul_(out).mul_(silu.addcmul(open_, 1 - silu)))
            out = out * silu

        g = torch.mul(c.C[..., None], out[:, :, None], out=room.g[: len(out)])
        g[-1] += dh
        for decay, after, now in reversed(room.steps_back[: len(out) - 1]):
            now.addcmul_(decay, after)
        du = (c.B[:, :, None] @ g).squeeze(2)
        put(dB, part, (c.u[:, :, None] @ g.mT).squeeze(2))  # g @ u[..., None] is 10 x slower
        put(dC, part, (out[:, :, None] @ c.h[1:].mT).squeeze(2))
        g.mul_(c.a)
        dh = g[0].clone()
        w = g.mul_(c.h[:-1])
        step = torch.mul(w, rates, out=c.a).sum(2).div_(LOG2E).addcmul_(du, c.x)
        put(ddt, part, step if lengths is None else step.masked_fill_(beyond(part, lengths), 0))
        drates += w.mul_(c.dt[:, :, None]).flatten(0, 1).sum(0)
        put(dx, part, du.mul_(c.dt) if skip is None else du.mul_(c.dt).addcmul_(skip, out))
        if skip is not None:
            dskip += (out * c.x).sum((0, 1))
    dA, dD = drates.mT.to(A.dtype).contiguous(), dskip if D is None else dskip.to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dh.mT.clone(memory_format=torch.contiguous_format)


selective_scan = define("selective_scan", scan, scan_backward, span)
FLOPS = flops("selective_scan")
