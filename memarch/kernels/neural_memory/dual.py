"""The neural memory in chunks that take their gradients at their start: chunk.py for one chunk after the other, as an operator with its backward.

What the backward needs is computed again, chunk by chunk, from W and S at the chunks' starts. Every row has its own grid of chunks (grid.py):
`place` tokens of its first chunk have been, and stand there as tokens that are none.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   L layers   X = B H
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import chunks, cut, groups, put
from memarch.kernels.delta_rule.torch_impl import triangles
from memarch.kernels.neural_memory.chunk import Layers, Masks, leaves, local, local_back, through, through_back
from memarch.kernels.neural_memory.grid import Grid, grid, size
from memarch.kernels.neural_memory.inner import Net

Maybe = Tensor | None


def run(*inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The arguments of `chunked` but for `save`."""
    inputs = tuple(list(x) if isinstance(x, tuple) else x for x in inputs)
    tensors = [y for x in inputs for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    call = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
    return call(*inputs, save)[:2]


@exact
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    step: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    point: list[Tensor],
    init: list[Tensor],
    gain: Tensor | None,
    bias: Tensor | None,
    pull: Tensor | None,
    place: Tensor | None,
    lengths: Tensor | None,
    activation: str,
    post: str,
    chunk: int,
    window: int,
    clip: float | None,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """weights, momentum, point, init: by layer [B,H,in,out], empty where there is none; gain, bias [B,H,V].
    Without `point` and `place` a chunk begins. With `place` the first window - 1 tokens are those before, only learned once more.

    -> o, the new weights, momentum and point in one list, and for the backward W and S before every chunk [N,X,in,out] (empty unless `save`)"""
    H, (w, s, p, init) = v.shape[2], (flat(x, v) for x in (weights, momentum, point, init))
    g, masks, band, tokens = layout(q, k, v, log_decay, log_momentum, step, place, lengths, chunk, window)
    net, pull = shared(w[0], activation, post, gain, bias, pull, clip)
    states = [x.new_empty(g.N, *x.shape) for x in (*w, *s)] if save else []
    o, p, X = v.new_empty(v.shape[0], g.N * g.C, *v.shape[2:]), p or w, len(w[0])
    for part in groups(g.N, g.C, X):
        c = local(g, part, w[0], H, masks, band, pull, bool(init), *tokens)
        out = torch.empty_like(c.v)
        for i, at in chunks(part, X):
            p = handed(g, i, H, w, p)
            for into, x in zip(states, (*w, *s) if save else (), strict=True):
                into[i] = x
            bases = mixed(w, s, init, p, pull)
            out[at], run = through(c, at, bases, p, net)
            w, s = leaves(c, at, bases, s, run)
        put(o, g.N, part, out)
    p = handed(g, g.N, H, w, p)
    return g.off(o, g.real), [x.unflatten(0, (-1, H)) for x in (*w, *s, *(x.clone() for x in p))], states


@torch.library.custom_op("memarch::neural_memory_dual_backward", mutates_args=())
@exact
def chunked_backward(
    do: Tensor,
    dstate: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    step: Tensor,
    states: list[Tensor],
    point: list[Tensor],
    init: list[Tensor],
    gain: Tensor | None,
    bias: Tensor | None,
    pull: Tensor | None,
    place: Tensor | None,
    lengths: Tensor | None,
    activation: str,
    post: str,
    chunk: int,
    window: int,
    clip: float | None,
) -> list[Tensor]:
    """-> the gradients of q, k, v, the gates, weights, momentum, point, init, gain, bias and pull, of those that there are."""
    H, L = v.shape[2], len(dstate) // (2 if log_momentum is None else 3)
    dw, ds, dp = (flat(x, v) for x in (dstate[:L], dstate[L:-L], dstate[-L:]))
    like, init, given = dw[0], flat(init, v), flat(point, v)
    g, masks, band, tokens = layout(q, k, v, log_decay, log_momentum, step, place, lengths, chunk, window)
    net, wide_pull = shared(like, activation, post, gain, bias, pull, clip)
    do = g.on(do)
    do = do if g.real is None else do.masked_fill(~g.real[:, :, None, None], 0)
    dtokens, X = [None if x is None else torch.empty_like(x) for x in tokens[:6]], len(like)
    dinit: Layers = []
    douter: list[Maybe] = [None, None, None]
    dw, dp = handed_back(g, g.N, H, dw, dp)
    for part in reversed(list(groups(g.N, g.C, X))):
        c, dO = local(g, part, like, H, masks, band, wide_pull, bool(init), *tokens), cut(do, g.N, part, like.dtype)
        into = [*(torch.empty_like(x) for x in (c.q, c.k, c.v, *c.c, c.G))]
        dE, dm = (None, None) if c.gates.m is None else (torch.zeros_like(c.gates.E), torch.zeros_like(c.gates.m))
        for i, at in reversed(list(chunks(part, X))):
            w, s = [x[i] for x in states[:L]], [x[i] for x in states[L:]]
            p = w if i or not given else given
            bases = mixed(w, s, init, p, pull)
            d = through_back(c, at, bases, p, s, through(c, at, bases, p, net, 1)[1], net, dO[at], dw, ds)
            for whole, x in zip(into, (*d.tokens, *d.c, d.G), strict=True):
                whole[at] = x
            if dE is not None and dm is not None:
                dE[at, -1], dm[at, -1, 0] = d.E, d.m
            dbases = d.bases
            dw, ds = dbases.pop(0), dbases.pop(0) if s else []
            dinit = added(dinit, dbases.pop(0)) if init else []
            dp = added(added(dp, d.point), dbases.pop(0) if dbases else [])
            dw, dp = handed_back(g, i, H, dw, dp)
            douter[:2] = [plus(x, y) for x, y in zip(douter, (d.gain, d.bias), strict=False)]
        dlog_decay, dlog_momentum, dP, dpull = local_back(c, bool(init), into[3:-1], into[-1], dE, dm, masks)
        dstep = (dP * band).sum(-1, keepdim=True).neg_()
        for y, x in zip(dtokens, (*into[:3], dlog_decay, dlog_momentum, dstep), strict=True):
            if y is not None:
                put(y, g.N, part, x)
        douter[2] = plus(douter[2], dpull)
    if not given:
        dw, dp = added(dw, dp), []
    found = [None if x is None else g.off(x, g.given) for x in dtokens]
    found[3:] = [None if x is None else x.squeeze(-1) for x in found[3:]]
    found += [x.unflatten(0, (-1, H)) for x in (*dw, *ds, *dp, *dinit)] + [None if x is None else x.unflatten(0, (-1, H)) for x in douter[:2]]
    found.append(None if douter[2] is None else F.pad(douter[2], (0, chunk - g.C)))
    return [x for x in found if x is not None]


def layout(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, place: Maybe, lengths: Maybe, chunk: int, window: int
) -> tuple[Grid, Masks, Tensor, list[Any]]:  # fmt: skip
    """-> the grid, the masks of gates.py, the band of the window [C, C], and on the grid the tokens and, where it matters, which are real"""
    g = grid(v, chunk, place, lengths, 0 if place is None else window - 1)
    masks = triangles(g.C, v.new_empty(0, dtype=torch.promote_types(v.dtype, torch.float32)))
    real = None if g.real is None or log_momentum is None else g.real[:, :, None, None].to(masks[0].dtype).expand(v.shape[0], -1, v.shape[2], 1)
    return g, masks, masks[0].triu(1 - window), [*(g.on(x) for x in (q, k, v, log_decay, log_momentum, step)), real]


def shared(like: Tensor, activation: str, post: str, gain: Maybe, bias: Maybe, pull: Maybe, clip: float | None) -> tuple[Net, Maybe]:
    gain, bias = (None if x is None else x.to(like.dtype).flatten(0, 1)[:, None] for x in (gain, bias))
    return Net(activation, post, gain, bias, clip), None if pull is None else pull.to(like.dtype)


def flat(xs: Sequence[Tensor], v: Tensor) -> Layers:
    """[B, H, in, out] -> [X, in, out]"""
    return [x.to(torch.promote_types(v.dtype, torch.float32)).flatten(0, 1) for x in xs]


def mixed(w: Layers, s: Layers, init: Layers, point: Layers, pull: Maybe) -> list[Layers]:
    return [x for x in (w, s, init, [] if pull is None else point) if x]


def handed(g: Grid, i: int, H: int, w: Layers, p: Layers) -> Layers:
    """Where chunk i takes its gradients: at the memory of its start."""
    done = i > 0 and g.done(i, H)
    if isinstance(done, bool):
        return w if done else p
    return [torch.where(done, x, y) for x, y in zip(w, p, strict=True)]


def handed_back(g: Grid, i: int, H: int, dw: Layers, dp: Layers) -> tuple[Layers, Layers]:
    """No dp is a dp of zeros."""
    done = i > 0 and g.done(i, H)
    if isinstance(done, bool):
        return (added(dw, dp), []) if done else (dw, dp)
    return added(dw, [y * done for y in dp]), [y * ~done for y in dp]


def plus(x: Maybe, y: Maybe) -> Maybe:
    return x if y is None else y if x is None else x + y


def added(xs: Layers, ys: Layers) -> Layers:
    return [x + y for x, y in zip(xs, ys, strict=True)] if xs and ys else xs or ys


operator = torch.library.custom_op("memarch::neural_memory_dual", chunked, mutates_args=())


@operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, weights: list[Tensor], momentum: list[Tensor],
    point: list[Tensor], init: list[Tensor], gain: Maybe, bias: Maybe, pull: Maybe, place: Maybe, lengths: Maybe, activation: str, post: str,
    chunk: int, window: int, clip: float | None, save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    N, dtype = size(v.shape[1], chunk, place is not None)[0], torch.promote_types(v.dtype, torch.float32)
    new = [x.new_empty(x.shape, dtype=dtype) for x in (*weights, *momentum, *weights)]
    states = [x.new_empty(N, x.shape[0] * x.shape[1], *x.shape[2:]) for x in new[: len(weights) + len(momentum)]]
    return v.new_empty(v.shape), new, states if save else []


@chunked_backward.register_fake
def _(
    do: Tensor, dstate: list[Tensor], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, states: list[Tensor],
    point: list[Tensor], init: list[Tensor], gain: Maybe, bias: Maybe, pull: Maybe, *_: Any,
) -> list[Tensor]:  # fmt: skip
    L = len(dstate) // (2 if log_momentum is None else 3)
    w, s = dstate[:L], dstate[L:-L]
    tokens = (x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, step) if x is not None)
    outer = (w[0].new_empty(x.shape) for x in (gain, bias, pull) if x is not None)
    return [*tokens, *(x.new_empty(x.shape) for x in (*w, *s, *(w if point else ()), *(w if init else ()))), *outer]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tokens, lists, outer, options = inputs[:6], inputs[6:10], inputs[10:15], inputs[15:]
    assert options[-1], "the operator was told that no gradient is wanted"
    _, _, point, init = lists
    ctx.save_for_backward(*tokens, *output[2], *point, *init, *outer)
    ctx.counts, ctx.options = (6, len(output[2]), len(point), len(init), 5), options[:-1]
    ctx.dtypes = [[x.dtype for x in xs] for xs in lists]
    ctx.like = [(x.shape, x.dtype, x.device) for x in (output[0], *output[1])]
    ctx.set_materialize_grads(False)  # the zeros for `states` are not asked for


def _gradients(ctx: Any, do: Maybe, dstate: list[Maybe], _: Any) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tokens, states, point, init, outer = ([next(saved) for _ in range(n)] for n in ctx.counts)
    do, *dnew = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((do, *dstate), ctx.like, strict=True))
    found = iter(chunked_backward(do, dnew, *tokens, states, point, init, *outer, *ctx.options))
    dtokens = [None if x is None else next(found) for x in tokens]
    dlists = [[next(found).to(t) for t in dtypes] for dtypes in ctx.dtypes]
    douter = [None if x is None else next(found).to(x.dtype) for x in outer[:3]]
    return *dtokens, *dlists, *douter, *[None] * (2 + len(ctx.options) + 1)


operator.register_autograd(_gradients, setup_context=_remember)


def _flops(q: torch.Size, momentum: Any, weights: list[torch.Size], init: Any, pull: Any, place: Any, chunk: int, back: bool) -> int:
    """Products of a chunk like [C,in][in,out] of every layer, like those of every layer but the first, like [C,C][C,in] or [C,C][C,out], like [C,C][C,C]."""
    (B, T, H, _), has = q, momentum is not None
    N, C = size(T, chunk, place is not None)
    bases = 1 + has + bool(init) + (pull is not None)
    layer, deeper, pairs, scalars = (5 + 3 * bases + 2 * has, 3, 3, 8 if has else 4) if back else (2 + bases + has, 1, 1, 1 + has)
    sizes = [(w[-2], w[-1]) for w in weights]
    memory = layer * sum(i * o for i, o in sizes) + deeper * sum(i * o for i, o in sizes[1:])
    return 2 * B * H * N * C * (memory + pairs * C * sum(i + o for i, o in sizes) + scalars * C * C)


def _flops_forward(*x: Any, **_: Any) -> int:
    q, momentum, weights, init, pull, place, chunk = (x[i] for i in (0, 4, 6, 9, 12, 13, 17))
    return _flops(q, momentum, weights, init, pull, place, chunk, False)


def _flops_backward(*x: Any, **_: Any) -> int:
    dstate, q, momentum, init, pull, place, chunk = (x[i] for i in (1, 2, 6, 10, 13, 14, 18))
    return _flops(q, momentum, dstate[: len(dstate) // (2 if momentum is None else 3)], init, pull, place, chunk, True)


FLOPS = {"neural_memory_dual": _flops_forward, "neural_memory_dual_backward": _flops_backward}
