"""The chunk form of the neural memory for a GPU: chunk.py in Triton (triton_dual_kernels.py), for memories of one layer and of two.

W and S go through the chunks one after the other, in one program for every head, and with them only what they wait for: the writes, and back, what the
writes get. All that meets them as they are, queries and recomputation, is done for many chunks at once:

    scan   x, u and W, S of every chunk      read       queries through a layer, to y, to o
    back, the last group of chunks first:
    learn  x, u once more, with phi'', e     read       once more, to the gradient `asked` of what each layer answers
    read_back   what queries ask of q, G, c, x and u          scan_back   dW, dS before every chunk, and what its keys and values get
    keys_back, dots, constant_back           what is left of k, of the last rows of G and E, of c, and of bases that are the same for all chunks

The matrices and vectors of scalars come from torch (gates.py), for a group of chunks at once, and their gradients go back through it.
A pull mixes W with M', which is another matrix than W only where a chunk began in an earlier call: that chunk is a group of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.autocast import exact
from memarch.kernels.chunks import cut, put
from memarch.kernels.launch import Check, accumulator, launch, noted, operand, precision, tile
from memarch.kernels.neural_memory import dual
from memarch.kernels.neural_memory import triton_dual_kernels as kernels
from memarch.kernels.neural_memory.chunk import Layers, Local, Masks, local, local_back
from memarch.kernels.neural_memory.grid import Grid

WIDEST = 128  # tokens of a chunk, key and value width: of these a tile holds all
BLOCK = 64  # other widths are worked on in pieces of this
PLAIN = 32  # the same for float32, whose factors fill twice the registers
PROGRAMS = 1024  # as many chunks, times heads, are worked on at once: enough for any device, few enough for its memory

Maybe = Tensor | None


def why_not(weights: Sequence[tuple[int, int]], chunk: int) -> str | None:
    """Why another implementation has to run. weights: (in, out) of every layer."""
    if len(weights) > 2:
        return f"memories of one layer or two, this one has {len(weights)}"
    if max(chunk, weights[0][0], weights[-1][1]) > WIDEST:
        return f"chunks, keys (with a bias: and it) and values of up to {WIDEST}, these are {chunk}, {weights[0][0]} and {weights[-1][1]}"
    return None


def run(*inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """As `dual.run`."""
    inputs = tuple(list(x) if isinstance(x, tuple) else x for x in inputs)
    tensors = [y for x in inputs for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    call = operator if save or torch.compiler.is_compiling() else forward  # the first call of an operator imports dynamo: not for inference
    return call(*inputs, save)[:2]


class Call(NamedTuple):
    """What forward and backward share."""

    grid: Grid
    masks: Masks
    band: Tensor
    tokens: list[Any]  # on the grid: q, k, v, the gates, which of them are real
    init: Layers
    pull: Maybe
    like: Tensor  # [X, 0], in the type of sums
    kind: torch.dtype  # of factors
    fixed: dict[str, Any]  # what is the same for all chunks, by the names that kernels use
    stands: Tensor  # [X]: before which chunk W is the point that goes on


def prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, weights: Sequence[Tensor], init: list[Tensor], gain: Maybe,
    bias: Maybe, pull: Maybe, place: Maybe, lengths: Maybe, activation: str, post: str, chunk: int, window: int, clip: float | None,
) -> Call:  # fmt: skip
    """Of the weights only the shapes matter. Exact products of float32 are three of tf32: one by one, outside of matrix units, they spill registers."""
    (B, T, H, V), kind = v.shape, torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    g, masks, band, tokens = dual.layout(q, k, v, log_decay, log_momentum, step, place, lengths, chunk, window)
    like, starts = masks[0].new_empty(B * H, 0), dual.flat(init, v)
    gain, bias = (None if x is None else x.to(like.dtype).flatten(0, 1) for x in (gain, bias))
    (K, width), I = weights[0].shape[-2:], weights[-1].shape[-2]
    exactly = "tf32x3" if kind == torch.float32 and precision() == "ieee" else precision()
    fixed = {"C": g.C, "K": K, "F": width, "I": I, "V": V, "BC": tile(g.C), "BV": tile(V), "ACT": activation, "POST": post, "CLIP": clip}
    block = min(PLAIN if kind == torch.float32 else BLOCK, tile(max(g.C, K, I, V)))
    fixed |= {"HOW": (operand(kind), accumulator(kind), exactly, block, block), "gain": gain, "bias": bias}
    fixed |= dict.fromkeys(("cs", "c0", "cp", "E", "m", "do", "rise", "dgain", "dbias", "bend", "z"))
    ends = torch.full((1, 1), T, device=v.device) if g.ends is None else g.ends
    return Call(g, masks, band, tokens, starts, None if pull is None else pull.to(like.dtype), like, kind, fixed, (ends // chunk).expand(B, H).reshape(-1))


def parts(call: Call, given: Layers) -> list[slice]:
    """The groups of chunks; the first chunk by itself if its point is given."""
    n, first = max(1, PROGRAMS // len(call.like)), [slice(0, 1)] if given else []
    return first + [slice(i, min(i + n, call.grid.N)) for i in range(len(first), call.grid.N, n)]


def layered(name: str, xs: Layers) -> dict[str, Maybe]:
    """By the names of kernels for all layers."""
    return {f"{name}1": xs[0] if len(xs) == 2 else None, name: xs[-1] if xs else None}


def group(call: Call, part: slice, w: Layers, s: Layers, given: Layers, back: bool) -> tuple[Local, dict[str, Any]]:
    """A group of chunks: what torch computes of it, and all that kernels ask for, with room for what `learn` and `scan` find.
    given: the point, where it is not W."""
    g, n, deep = call.grid, part.stop - part.start, len(w) == 2
    *tokens, step, real = call.tokens
    gates = (step, None, None, *tokens[3:], step, real)
    c = local(g, part, call.like, tokens[2].shape[2], call.masks, call.band, call.pull, bool(call.init), *gates)
    a = call.fixed | {"n": n, "G": c.G} | {name: x.squeeze(-1) for name, x in zip(bases(call, s), c.c, strict=True)}
    if call.pull is not None and not given:
        a |= {"cw": a["cw"] + a["cp"], "cp": None}
    if s:
        a |= {"E": c.gates.E[:, -1].contiguous(), "m": c.gates.m[:, -1].contiguous()}
    q, k, v = (cut(x, g.N, part, call.kind) for x in tokens[:3])
    q, k = (F.pad(x, (0, a["K"] - x.shape[-1]), value=1.0) for x in (q, k))
    a |= {"q": q, "k": k, "v": v, "y": q, "x": k, "u": room(call, a, "V"), "u1": None, "slope": None, "e": None}
    a |= layered("w", w) | layered("s", s) | layered("p", given or w)
    a |= layered("start", call.init) | layered("pulled", given if call.pull is not None else [])
    a["d"] = a["u"] if a["CLIP"] is None else room(call, a, "V")
    if deep:
        a |= {"y": room(call, a, "I"), "x": room(call, a, "I"), "u1": room(call, a, "F"), "slope": room(call, a, "F")}
        a["e"] = None if a["CLIP"] is None and not back else room(call, a, "F")
    return c, a


def bases(call: Call, s: Layers) -> list[str]:
    return ["cw", *["cs"] * bool(s), *["c0"] * bool(call.init), *["cp"] * (call.pull is not None)]


def room(call: Call, a: dict[str, Any], width: str) -> Tensor:
    return call.like.new_empty(a["n"] * len(call.like), a["C"], a[width], dtype=call.kind)


def layer(a: dict[str, Any], number: str) -> dict[str, Any]:
    """One layer, by the names of kernels for any."""
    one = {name: a[name + number] for name in ("w", "s", "start", "pulled", "u")}
    if number:
        return a | one | {"x": a["k"], "y": a["q"], "I": a["K"], "O": a["F"]}
    return a | one | {"O": a["V"]}


def queries(call: Call, a: dict[str, Any]) -> Tensor:
    """-> the answers; where there is `do`, its gradient before the answer's residual and norm."""
    grid = len(call.like), a["n"]
    if a["w1"] is not None:
        hidden = {"POST": None, "NEXT": a["I"], "BO": a["HOW"][3], "out": a["y"], "slope": a["rise"], "do": None}
        launch(kernels.read, grid, warps=8, **layer(a, "1") | hidden)
    if a["do"] is not None and a["POST"] in ("none", "res"):
        return a["do"]
    out = room(call, a, "V")
    launch(kernels.read, grid, warps=8, **layer(a, "") | {"NEXT": a["V"], "BO": a["BV"], "out": out, "slope": None})
    return out


@exact
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, weights: list[Tensor], momentum: list[Tensor],
    point: list[Tensor], init: list[Tensor], gain: Maybe, bias: Maybe, pull: Maybe, place: Maybe, lengths: Maybe, activation: str, post: str,
    chunk: int, window: int, clip: float | None, save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """As `dual.chunked`. Without `save` the states of one group of chunks are there at a time."""
    call = prepared(
        q, k, v, log_decay, log_momentum, step, weights, init, gain, bias, pull, place, lengths, activation, post, chunk, window, clip
    )  # fmt: skip
    g, (w, s, given), L = call.grid, (dual.flat(x, v) for x in (weights, momentum, point)), len(weights)
    o, state, p, X = v.new_empty(v.shape[0], g.N * g.C, *v.shape[2:]), [*w, *s], given or w, len(call.like)
    saved = [x.new_empty(g.N + 1, *x.shape) for x in state] if save else []
    for part in parts(call, given):
        n = part.stop - part.start
        slots = [x[part.start : part.stop + 1] for x in saved] or [x.new_empty(n + 1, *x.shape) for x in state]
        for slot, x in zip(slots, state, strict=True):
            slot[0] = x
        _, a = group(call, part, slots[:L], slots[L:], given if part.start == 0 else [], False)
        launch(kernels.scan, (X,), warps=8, stages=1 if call.kind == torch.float32 else 2, **a)  # with more, float32 spills registers
        put(o, g.N, part, queries(call, a))
        state, at = [x[n] for x in slots], call.stands - part.start
        here, rows = ((at > 0) & (at <= n))[:, None, None], torch.arange(X, device=v.device)
        p = [torch.where(here, slot[at.clamp(0, n), rows], x) for slot, x in zip(slots, p, strict=False)]
    new = [x.clone().unflatten(0, (-1, v.shape[2])) for x in (*state, *p)]
    return g.off(o, g.real), new, [x[:-1] for x in saved]


@exact
def backward(
    do: Tensor, dstate: list[Tensor], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, states: list[Tensor],
    point: list[Tensor], init: list[Tensor], gain: Maybe, bias: Maybe, pull: Maybe, place: Maybe, lengths: Maybe, activation: str, post: str,
    chunk: int, window: int, clip: float | None,
) -> list[Tensor]:  # fmt: skip
    """As `dual.chunked_backward`."""
    L = len(dstate) // (2 if log_momentum is None else 3)
    call = prepared(
        q, k, v, log_decay, log_momentum, step, dstate[:L], init, gain, bias, pull, place, lengths, activation, post, chunk, window, clip
    )  # fmt: skip
    g, given = call.grid, dual.flat(point, v)
    dw, ds, dp = (dual.flat(x, v) for x in (dstate[:L], dstate[L:-L], dstate[-L:]))
    dpoint = [y * (call.stands == 0)[:, None, None] for y in dp] if given else []
    dafter = [x + y * (call.stands == g.N)[:, None, None] for x, y in zip(dw, dp, strict=True)] + ds
    dinit: Layers = []
    douter: list[Maybe] = [None, None, None]
    do = g.on(do)
    do = do if g.real is None else do.masked_fill(~g.real[:, :, None, None], 0)
    dtokens = [None if x is None else torch.empty_like(x) for x in call.tokens[:6]]
    for part in reversed(parts(call, given)):
        n, own = part.stop - part.start, given if part.start == 0 else []
        c, a = group(call, part, [x[part] for x in states[:L]], [x[part] for x in states[L:]], own, True)
        slots = [x.new_empty(n + 1, *x.shape) for x in dafter]
        for slot, x in zip(slots, dafter, strict=True):
            slot[n] = x
        a |= {"do": cut(do, g.N, part, call.kind)} | layered("dw", slots[:L]) | layered("ds", slots[L:]) | layered("dlast", dp)
        learnt = [torch.empty_like(x[0]) for x in slots[:L]] if own else []
        a |= layered("dp", learnt) | {"stands": torch.full_like(call.stands, -1) if own else call.stands - part.start}
        d = group_back(call, a)
        dE = dm = None
        if d.E is not None and d.m is not None:
            dE, dm = torch.zeros_like(c.gates.E), torch.zeros_like(c.gates.m)
            dE[:, -1], dm[:, -1, 0] = d.E, d.m
        dc = [*d.c, d.c[0]] if call.pull is not None and not own else d.c
        dlog_decay, dlog_momentum, dP, dpull = local_back(c, bool(init), dc, d.G, dE, dm, call.masks)
        dstep = (dP * call.band).sum(-1, keepdim=True).neg_()
        for y, x in zip(dtokens, (*d.tokens, dlog_decay, dlog_momentum, dstep), strict=True):
            if y is not None:
                put(y, g.N, part, x[..., : y.shape[-1]])
        dafter = [slot[0] for slot in slots]
        dinit, dpoint = dual.added(dinit, d.init), dual.added(dual.added(dpoint, learnt), d.pulled)
        douter = [dual.plus(x, y) for x, y in zip(douter, (*d.outer, dpull), strict=True)]
    found = [None if x is None else g.off(x, g.given) for x in dtokens]
    found[3:] = [None if x is None else x.squeeze(-1) for x in found[3:]]
    found += [x.clone().unflatten(0, (-1, v.shape[2])) for x in (*dafter, *dpoint, *dinit)]
    found += [None if x is None else x.unflatten(0, (-1, v.shape[2])) for x in douter[:2]]
    found.append(None if douter[2] is None else F.pad(douter[2], (0, chunk - g.C)))
    return [x for x in found if x is not None]


class Back(NamedTuple):
    """The gradients of a group, but for those of W and S."""

    tokens: tuple[Tensor, Tensor, Tensor]  # q, k, v [n X, C, .]
    c: list[Tensor]  # [n X, C + 1, 1] by basis
    G: Tensor  # [n X, C + 1, C]
    E: Maybe  # [n X, C], of the last row
    m: Maybe  # [n X], of the last one
    outer: list[Maybe]  # gain, bias [X, V]
    init: Layers
    pulled: Layers


def group_back(call: Call, a: dict[str, Any]) -> Back:
    """Goes back through a group, from `do` and the last slots of dw and ds to the first."""
    X, n, C, new = len(call.like), a["n"], a["C"], call.like.new_empty
    grid, layers = (X, n), [""] if a["w1"] is None else ["1", ""]
    L = len(layers)
    scalars = [name for name in ("cw", "cs", "c0", "cp") if a[name] is not None]

    # what the forward did
    a |= {name: room(call, a, "F") if L == 2 else None for name in ("bend", "rise", "raw", "de", "turned")}
    a |= {name: new(n * X, C, a["V"]) for name in ("z", "freed")}
    a |= {f"d{name}": None if a[name] is None else new(2, n * X, a["V"]) for name in ("gain", "bias")}  # from the answers, and from the errors
    launch(kernels.learn, grid, warps=8, **a)
    asked = queries(call, a)

    # from the answers to the queries and to what they met
    a |= {"dG": new(L, n * X, C + 1, C)} | {f"d{name}": new(L, n * X, C + 1) for name in ("cw", "cs", "c0", "cp")}
    a |= {name: new(n * X, C, C, dtype=call.kind) for name in ("near", "dnear")}
    a |= layered("asked", [room(call, a, "F"), asked][-L:]) | layered("du", [torch.empty_like(a["u" + i]) for i in layers])
    a |= layered("dx", [torch.empty_like(layer(a, i)["x"]) for i in layers]) | {f"d{name}": torch.empty_like(a[name]) for name in ("q", "k", "v")}
    for l, i in reversed(list(enumerate(layers))):
        mine = layer(a, i) | {name: a[name + i] for name in ("asked", "dx", "du")} | {name: a[name][l] for name in ("dG", *(f"d{c}" for c in scalars))}
        into = {"slope": a["rise"], "out": a["asked1"], "BEFORE": a["F"]} if l else {"slope": None, "out": a["dq"], "BEFORE": a["V"]}
        launch(kernels.read_back, grid, warps=8, **mine | into)

    # from W and S after every chunk to those before it, and to what was written
    a |= layered("wrong", [torch.empty_like(a["u" + i]) for i in layers])
    a |= {"dE": None if a["s"] is None else new(L, n * X, C), "lost": None if a["CLIP"] is None else new(n * X, C)}
    last = {name: None if a[name] is None else a[name][-1] for name in ("dG", "dE", "dgain", "dbias")}
    slices = *a["HOW"][:4], max(16, a["HOW"][4] // 2)  # with whole ones registers spill
    launch(kernels.scan_back, (X,), warps=8, stages=1 if call.kind == torch.float32 else 3, **a | last | {"HOW": slices})

    # what no other chunk waits for
    i = layers[0]
    mine = layer(a, i) | {name: a[name + i] for name in ("p", "dw", "ds", "dx", "wrong")}
    launch(kernels.keys_back, grid, warps=8, **mine | {name: None if a[name] is None else a[name][0] for name in ("dG", "dE")})
    for name, basis in zip(("cw", "cs", "c0", "cp"), ("w", "s", "start", "pulled"), strict=True):
        for l, i in enumerate(layers):
            if a[name] is not None:
                a["d" + name][l, :, -1] = dots(call, a["dw" + i], a[basis + i])
    m = None if a["s"] is None else torch.stack([dots(call, a["ds" + i], a["s" + i]) for i in layers]).sum(0)
    fixed = [[constant_back(call, a, i, c) for i in layers if a[c] is not None] for c in ("c0", "cp")]
    outer = [None if a[name] is None else a[name].unflatten(1, (n, X)).sum((0, 1)) for name in ("dgain", "dbias")]
    dc, dE = [a["d" + name].sum(0).unsqueeze(-1) for name in scalars], None if a["s"] is None else a["dE"].sum(0)
    return Back((a["dq"], a["dk"], a["dv"]), dc, a["dG"].sum(0), dE, m, outer, *fixed)


def dots(call: Call, slots: Tensor, basis: Tensor) -> Tensor:
    """Of what stands after every chunk, in `slots`, and a basis: [n X]"""
    n, X, *size = slots[1:].shape
    out = call.like.new_empty(n * X)
    launch(kernels.dots, (X, n), a=slots[1:], b=basis, out=out, SIZE=size[0] * size[1], FIXED=basis.ndim == 3, BLOCK=1024, HOW=call.fixed["HOW"])
    return out


def constant_back(call: Call, a: dict[str, Any], i: str, c: str) -> Tensor:
    """Of a basis that is the same for all chunks, with coefficients c, in layer i."""
    mine, X, block = layer(a, i), len(call.like), a["HOW"][3]
    out = call.like.new_empty(X, mine["I"], mine["O"])
    grid = (X, -(-mine["I"] // block), -(-mine["O"] // block))
    launch(kernels.constant_back, grid, **mine | {"asked": a["asked" + i], "dw": a["dw" + i][1:], "c": a[c], "out": out})
    return out


operator = torch.library.custom_op("memarch::neural_memory_dual_triton", forward, mutates_args=())
operator_backward = torch.library.custom_op("memarch::neural_memory_dual_triton_backward", backward, mutates_args=())


operator.register_fake(dual.fake)
operator_backward.register_fake(dual.fake_backward)
operator.register_autograd(dual.gradients(operator_backward), setup_context=dual.remember)
flops.file({name.replace("dual", "dual_triton"): count for name, count in dual.FLOPS.items()})  # the same products


def checks() -> Iterator[Check]:
    for dtype, C, widths, post, clip, to_start in (
        (torch.bfloat16, 64, [(64, 256), (256, 64)], "ln", 1.0, True),
        (torch.bfloat16, 64, [(128, 512), (512, 128)], "ln", 1.0, True),
        (torch.bfloat16, 64, [(64, 64)], "rms", None, False),
        (torch.float32, 64, [(64, 256), (256, 64)], "ln", 1.0, True),
    ):
        q, v = (torch.empty(1, 2 * C, 1, n, dtype=dtype, device="meta") for n in (widths[0][0], widths[-1][1]))
        w = [q.new_empty(1, 1, *size, dtype=torch.float32) for size in widths]
        gate, outer = q[..., 0], w[0].new_empty(1, 1, v.shape[-1])
        gain, bias = outer if post in ("rms", "ln") else None, outer if post == "ln" else None
        tokens, init, how = (q, q, v, gate, gate, gate), w if to_start else [], ("gelu", post, C, 1, clip)
        with noted() as found:
            _, new, states = forward(*tokens, w, w, [], init, gain, bias, None, None, None, *how, True)
            backward(v, new, *tokens, states, [], init, gain, bias, None, None, None, *how)
        wide = dtype != torch.float32
        yield from {repr(check): check._replace(wgmma=wide and check.kernel is not kernels.dots) for check in found}.values()
