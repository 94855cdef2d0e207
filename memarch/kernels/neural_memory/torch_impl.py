"""The neural memory without a GPU: a linear one exactly by a triangular solve (linear.py), every other in dual form (dual.py).

The gradient at M_{t-1} of a memory that is not linear has no form in chunks: it is the chunk form with chunks of one token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.neural_memory import dual, linear, reference
from memarch.kernels.neural_memory.inner import Net, answer, clipped, fed, gradient
from memarch.kernels.neural_memory.memory import Form, Memory, State, fresh, is_linear

Maybe = Tensor | None
FLOPS = linear.FLOPS | dual.FLOPS


class Engines(NamedTuple):
    """What runs over more than one token: `run` of linear.py and of dual.py, or others with their signatures."""

    linear: Callable[..., tuple[Tensor, Tensor]] = linear.run
    dual: Callable[..., tuple[Tensor, list[Tensor]]] = dual.run


TORCH = Engines()


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
    engines: Engines = TORCH,
) -> tuple[Tensor, State]:
    call = q, k, v, log_decay, log_momentum, step, state, memory, form, lengths
    if q.shape[1] == 1:
        return (_one_token if form.window == 1 and memory.pull is None else reference.neural_memory)(*call)
    if form.chunk is None and is_linear(memory):
        return _linear(*call, engines.linear)
    return _dual(*call, engines.dual)


@exact
def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
) -> tuple[Tensor, State]:
    """The recurrence itself: each of W, S and M' is read and written once."""
    dtype, real = torch.promote_types(v.dtype, torch.float32), None
    if lengths is not None:
        real = (lengths > 0)[:, None, None, None]
        q, k, v = (x.masked_fill(~real, 0) for x in (q, k, v))
        log_decay, step = (x.masked_fill(~real[..., 0], 0) for x in (log_decay, step))
        log_momentum = None if log_momentum is None else log_momentum.masked_fill(~real[..., 0], 0)
    begun = fresh(memory, k, v, log_momentum is not None, form) if state is None else state
    old, momentum, point = ([x.to(dtype) for x in xs] for xs in (begun.weights, begun.momentum, begun.point))
    gain, bias = (None if x is None else x.to(dtype)[:, None] for x in (memory.gain, memory.bias))
    net = Net(memory.activation, memory.post, gain, bias, form.clip)
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, 1, .]
    log_a, theta = (x.to(dtype).transpose(1, 2)[..., None] for x in (log_decay, step))  # [B, H, 1, 1]
    a, write = log_a.exp(), gradient(point or old, key, value, net)
    new = [(x.mT, -theta * clipped(x, d, form.clip)) for x, d in zip(write.x, write.d, strict=True)]
    if log_momentum is None:
        w = [torch.addcmul(a * x, *pair) for x, pair in zip(old, new, strict=True)]
    else:
        eta = log_momentum.to(dtype).exp().transpose(1, 2)[..., None]
        momentum = [torch.addcmul(eta * x, *pair) for x, pair in zip(momentum, new, strict=True)]
        w = [torch.addcmul(s, a, x) for s, x in zip(momentum, old, strict=True)]
    if memory.decay_to == "init":
        w = [torch.addcmul(x, 1 - a, first.to(dtype)) for x, first in zip(w, memory.weights, strict=True)]
    w = w if real is None else [torch.where(real, x, y) for x, y in zip(w, old, strict=True)]
    o = answer(w, query, net).transpose(1, 2)
    o = (o if real is None else o * real).to(v.dtype)
    if form.chunk is None:
        return o, State(tuple(w), tuple(momentum), (), (), ())
    place = begun.place + (1 if real is None else real.flatten())
    return o, State(tuple(w), tuple(momentum), tuple(_handed(place == form.chunk, w, point)), place % form.chunk, ())


def _handed(done: Tensor, w: list[Tensor], point: list[Tensor]) -> list[Tensor]:
    if done.device.type == "cpu" and not torch.compiler.is_compiling() and not done.any():  # to look costs a GPU a wait, and spares a CPU two reads of three
        return [x.clone() for x in point]
    return [torch.where(done[:, None, None, None], x, y) for x, y in zip(w, point, strict=True)]


@exact
def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, State]:
    """What of the answer never changes, the residual and the start that the memory decays to, is taken off the values and put back on the answers."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    init = memory.weights[0].to(dtype) if memory.decay_to == "init" and memory.weights else None
    plain = init is None and memory.post == "none"
    given = None if lengths is None or plain else (torch.arange(v.shape[1], device=v.device) < lengths[:, None])[:, :, None, None]
    if given is not None:
        q, k = (x.masked_fill(~given, 0) for x in (q, k))
    asked, keys = (ones(x, memory) for x in (q, k))

    def constant(x: Tensor, with_ones: Tensor) -> Tensor:
        y = torch.zeros_like(v, dtype=dtype) if init is None else torch.einsum("bthk,hkv->bthv", with_ones.to(dtype), init)
        return y + x if memory.post == "res" else y

    stacked = None
    if state is not None or memory.weights:
        state = fresh(memory, k, v, log_momentum is not None, form) if state is None else state
        stacked = torch.cat([state.weights[0] if init is None else state.weights[0] - init, *state.momentum], -2)
    o, stacked = run(asked, keys, v if plain else v - constant(k, keys), log_decay, log_momentum, step, stacked, lengths)
    if not plain:
        o = (o + constant(q, asked)).to(v.dtype)
        o = o if given is None else o * given
    rows = keys.shape[-1]
    w, s = stacked[..., :rows, :], stacked[..., rows:, :]
    return o, State((w.clone() if init is None else w + init,), () if log_momentum is None else (s.clone(),), (), (), ())


def ones(x: Tensor, memory: Memory) -> Tensor:
    """x with a column of ones, if the memory has a bias."""
    return fed(x, memory.weights[0]) if memory.weights else x


@exact
def _dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
    run: Callable[..., tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor, State]:
    (B, T), skip = v.shape[:2], 0
    begun = fresh(memory, k, v, log_momentum is not None, form) if state is None else state
    place, point, recent = (None, (), begun.recent) if form.aligned else (begun.place, begun.point, begun.recent)
    many = torch.full((B,), T, device=v.device) if lengths is None else lengths.clamp(max=T)
    if recent:
        recent, (K, V) = _newest(begun.recent, (k, v), many), (torch.cat([r, x], 1) for r, x in zip(begun.recent, (k, v), strict=True))
        if place is not None:  # what the chunk still has to learn once more stands before the tokens, and is nothing else
            skip = form.window - 1
            q, log_decay, step = (_behind(x, skip) for x in (q, log_decay, step))
            log_momentum = None if log_momentum is None else _behind(log_momentum, skip)
            k, v, place, lengths = K, V, place - skip, None if lengths is None else lengths + skip
    wide = torch.promote_types(v.dtype, torch.float32)  # before the rows part, so that their gradients are added up in it
    init = [w.to(wide).expand(B, *w.shape) for w in memory.weights] if memory.decay_to == "init" else []
    outer = (None if x is None else x.to(wide).expand(B, *x.shape) for x in (memory.gain, memory.bias))
    o, new = run(
        q, k, v, log_decay, log_momentum, step, begun.weights, begun.momentum, point, init, *outer, memory.pull, place, lengths,
        memory.activation, memory.post, form.chunk or 1, form.window, form.clip,
    )  # fmt: skip
    o = o[:, skip:].clone() if skip else o
    L = len(begun.weights)
    w, s, p = tuple(new[:L]), tuple(new[L:-L]), tuple(new[-L:])
    if form.chunk is None:
        return o, State(w, s, (), (), ())
    return o, State(w, s, p, (begun.place + many) % form.chunk, recent)


def _behind(x: Tensor, n: int) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]).expand(-1, n, *x.shape[2:]), x], 1)


def _newest(recent: tuple[Tensor, ...], now: tuple[Tensor, ...], many: Tensor) -> tuple[Tensor, ...]:
    """The last tokens of every row."""
    at = many[:, None] + torch.arange(recent[0].shape[1], device=many.device)
    rows = torch.arange(len(many), device=many.device)[:, None]
    return tuple(torch.cat([r, x.to(r.dtype)], 1)[rows, at] for r, x in zip(recent, now, strict=True))
