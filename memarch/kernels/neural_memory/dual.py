"""The neural memory in chunks that take their gradients at their start: chunk.py for one chunk after the other, as an operator with its backward.

What the backward needs is computed again, chunk by chunk, from W and S at the chunks' starts. Every row has its own grid of
chunks (grid.py): `place` tokens of its first chunk have been, and stand there as tokens that are none. The chunks go through torch, in groups, or, if
`native`, through C++ (cpp.py).

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens in a chunk   L layers   X = B H
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.chunks import cut, groups, put
from memarch.kernels.delta_rule.torch_impl import triangles
from memarch.kernels.neural_memory import chunk as torch_chunks
from memarch.kernels.neural_memory import cpp
from memarch.kernels.neural_memory.chunk import All, Found, Layers, Masks, added, handed, handed_back, local, local_back, plus
from memarch.kernels.neural_memory.grid import Grid, grid, size
from memarch.kernels.neural_memory.inner import Net

Maybe = Tensor | None


def run(*inputs: Any, native: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The arguments of `chunked` but for `save`."""
    inputs = tuple(list(x) if isinstance(x, tuple) else x for x in inputs)
    tensors = [y for x in inputs for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    call = operator if save or torch.compiler.is_compiling() else chunked  # the first call of an operator imports dynamo: not for inference
    return call(*inputs, native, save)[:2]


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
    native: bool,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """weights, momentum, point, init: by layer [B,H,in,out], empty where there is none; gain, bias [B,H,V].
    Without `point` and `place` a chunk begins. With `place` the first window - 1 tokens are those before, only learned once more.

    -> o, the new weights, momentum and point in one list, and for the backward W and S before every chunk [N,X,in,out] (empty unless `save`)"""
    w, s, p, init = (flat(x, v) for x in (weights, momentum, point, init))
    c = everything(q, k, v, log_decay, log_momentum, step, pull, place, lengths, chunk, window)
    net, g = shared(w[0], activation, post, gain, bias, clip), c.grid
    kept = [x.new_empty(g.N, *x.shape) for x in (*w, *s)] if save else []
    o, w, s, p = (cpp.forward if native else forward)(c, w, s, p or w, init, net, kept)
    p = handed(turn(g, g.N, v.shape[2]), w, p)
    return g.off(o, g.real), [x.unflatten(0, (-1, v.shape[2])) for x in (*w, *s, *(x.clone() for x in p))], kept


def forward(c: All, w: Layers, s: Layers, point: Layers, init: Layers, net: Net, kept: Layers) -> tuple[Tensor, Layers, Layers, Layers]:
    """-> the answers on the grid, and W, S and M' after all chunks. kept: room for what the backward needs."""
    g, v, o = c.grid, c.tokens[2], torch.empty_like(c.tokens[2], memory_format=torch.contiguous_format)
    for part in groups(g.N, g.C, len(w[0])):
        group = local(g, part, w[0], v.shape[2], c.masks, c.band, c.pull, bool(init), *c.tokens)
        out, w, s, point = torch_chunks.forward(group, turns(g, part, v.shape[2]), w, s, point, init, net, [x[part] for x in kept])
        put(o, g.N, part, out)
    return o, w, s, point


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
    kept: list[Tensor],
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
    native: bool,
) -> list[Tensor]:
    """-> the gradients of q, k, v, the gates, weights, momentum, point, init, gain, bias and pull, of those that there are."""
    H, L = v.shape[2], len(dstate) // (2 if log_momentum is None else 3)
    dw, ds, dp = (flat(x, v) for x in (dstate[:L], dstate[L:-L], dstate[-L:]))
    init, given = flat(init, v), flat(point, v)
    c = everything(q, k, v, log_decay, log_momentum, step, pull, place, lengths, chunk, window)
    net, g = shared(dw[0], activation, post, gain, bias, clip), c.grid
    do = g.on(do)
    do = do if g.real is None else do.masked_fill(~g.real[:, :, None, None], 0)
    dw, dp = handed_back(turn(g, g.N, H), dw, dp)
    d = (cpp.backward if native else backward)(c, kept, given, init, net, do, dw, ds, dp)
    found = [None if x is None else g.off(x, g.given) for x in d.tokens]
    found[3:] = [None if x is None else x.squeeze(-1) for x in found[3:]]
    states = [*d.w, *d.s, *d.point] if given else [*added(d.w, d.point), *d.s]
    dgain, dbias, dpull = d.outer
    found += [None if x is None else x.unflatten(0, (-1, H)) for x in (*states, *d.init, dgain, dbias)]
    found.append(None if dpull is None else F.pad(dpull, (0, chunk - g.C)))
    return [x for x in found if x is not None]


def backward(c: All, kept: Layers, given: Layers, init: Layers, net: Net, dO: Tensor, dw: Layers, ds: Layers, dpoint: Layers) -> Found:
    """given: M' of the first chunk where that is not W. dw, ds, dpoint: of what the last one leaves; no dpoint is zeros."""
    g, like, H = c.grid, dw[0], dO.shape[2]
    dtokens = [None if x is None else torch.empty_like(x) for x in c.tokens[:6]]
    dinit: Layers = []
    douter: list[Maybe] = [None, None, None]
    for part in reversed(list(groups(g.N, g.C, len(like)))):
        group, dout = local(g, part, like, H, c.masks, c.band, c.pull, bool(init), *c.tokens), cut(dO, g.N, part, like.dtype)
        first = [] if part.start else given
        d = torch_chunks.backward(group, turns(g, part, H), [x[part] for x in kept], first, init, net, dout, dw, ds, dpoint)
        dw, ds, dpoint, dinit = d.w, d.s, d.point, added(dinit, d.init)
        dlog_decay, dlog_momentum, dP, dpull = local_back(group, bool(init), d.c, d.G, d.E, d.m, c.masks)
        dstep = (dP * c.band).sum(-1, keepdim=True).neg_()
        for y, x in zip(dtokens, (*d.tokens, dlog_decay, dlog_momentum, dstep), strict=True):
            if y is not None:
                put(y, g.N, part, x)
        douter = [plus(x, y) for x, y in zip(douter, (d.gain, d.bias, dpull), strict=True)]
    return Found(dtokens, dw, ds, dpoint, dinit, douter)


def everything(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, pull: Maybe, place: Maybe, lengths: Maybe, chunk: int, window: int
) -> All:  # fmt: skip
    g, masks, band, tokens = layout(q, k, v, log_decay, log_momentum, step, place, lengths, chunk, window)
    return All(g, masks, band, window, None if pull is None else pull.to(masks[0].dtype), tokens)


def layout(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, place: Maybe, lengths: Maybe, chunk: int, window: int
) -> tuple[Grid, Masks, Tensor, list[Any]]:  # fmt: skip
    """-> the grid, the masks of gates.py, the band of the window [C, C], and on the grid the tokens and, where it matters, which are real"""
    g = grid(v, chunk, place, lengths, 0 if place is None else window - 1)
    masks = triangles(g.C, v.new_empty(0, dtype=torch.promote_types(v.dtype, torch.float32)))
    real = None if g.real is None or log_momentum is None else g.real[:, :, None, None].to(masks[0].dtype).expand(v.shape[0], -1, v.shape[2], 1)
    return g, masks, masks[0].triu(1 - window), [*(g.on(x) for x in (q, k, v, log_decay, log_momentum, step)), real]


def turn(g: Grid, i: int, H: int) -> Any:
    """Whether chunk i begins anew, for all rows or [X, 1, 1]: chunk 0 goes on where the last call ended."""
    return i > 0 and g.done(i, H)


def turns(g: Grid, part: slice, H: int) -> list[Any]:
    return [turn(g, i, H) for i in range(part.start, part.stop)]


def shared(like: Tensor, activation: str, post: str, gain: Maybe, bias: Maybe, clip: float | None) -> Net:
    gain, bias = (None if x is None else x.to(like.dtype).flatten(0, 1)[:, None] for x in (gain, bias))
    return Net(activation, post, gain, bias, clip)


def flat(xs: Sequence[Tensor], v: Tensor) -> Layers:
    """[B, H, in, out] -> [X, in, out]"""
    return [x.to(torch.promote_types(v.dtype, torch.float32)).flatten(0, 1) for x in xs]


operator = torch.library.custom_op("memarch::neural_memory_dual", chunked, mutates_args=())


# Shared with the operator of triton_dual.py, which has the same arguments but for `native`.


@operator.register_fake
def fake(*x: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    v, weights, momentum, place, chunk, save = *(x[i] for i in (2, 6, 7, 13, 17)), x[-1]
    N, dtype = size(v.shape[1], chunk, place is not None)[0], torch.promote_types(v.dtype, torch.float32)
    new = [w.new_empty(w.shape, dtype=dtype) for w in (*weights, *momentum, *weights)]
    kept = [w.new_empty(N, w.shape[0] * w.shape[1], *w.shape[2:]) for w in new[: len(weights) + len(momentum)]]
    return v.new_empty(v.shape), new, kept if save else []


@chunked_backward.register_fake
def fake_backward(
    do: Tensor, dstate: list[Tensor], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, kept: list[Tensor],
    point: list[Tensor], init: list[Tensor], gain: Maybe, bias: Maybe, pull: Maybe, *_: Any,
) -> list[Tensor]:  # fmt: skip
    L = len(dstate) // (2 if log_momentum is None else 3)
    w, s = dstate[:L], dstate[L:-L]
    tokens = (x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, step) if x is not None)
    outer = (w[0].new_empty(x.shape) for x in (gain, bias, pull) if x is not None)
    return [*tokens, *(x.new_empty(x.shape) for x in (*w, *s, *(w if point else ()), *(w if init else ()))), *outer]


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tokens, lists, outer, options = inputs[:6], inputs[6:10], inputs[10:15], inputs[15:]
    assert options[-1], "the operator was told that no gradient is wanted"
    _, _, point, init = lists
    ctx.save_for_backward(*tokens, *output[2], *point, *init, *outer)
    ctx.counts, ctx.options = (6, len(output[2]), len(point), len(init), 5), options[:-1]
    ctx.dtypes = [[x.dtype for x in xs] for xs in lists]
    ctx.like = [(x.shape, x.dtype, x.device) for x in (output[0], *output[1])]
    ctx.set_materialize_grads(False)  # the zeros for `kept` are not asked for


def gradients(backward: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    def found_by(ctx: Any, do: Maybe, dstate: list[Maybe], _: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        tokens, kept, point, init, outer = ([next(saved) for _ in range(n)] for n in ctx.counts)
        do, *dnew = (torch.zeros(s, dtype=t, device=d) if x is None else x for x, (s, t, d) in zip((do, *dstate), ctx.like, strict=True))
        found = iter(backward(do, dnew, *tokens, kept, point, init, *outer, *ctx.options))
        dtokens = [None if x is None else next(found) for x in tokens]
        dlists = [[next(found).to(t) for t in dtypes] for dtypes in ctx.dtypes]
        douter = [None if x is None else next(found).to(x.dtype) for x in outer[:3]]
        return *dtokens, *dlists, *douter, *[None] * (2 + len(ctx.options) + 1)

    return found_by


operator.register_autograd(gradients(chunked_backward), setup_context=remember)


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
