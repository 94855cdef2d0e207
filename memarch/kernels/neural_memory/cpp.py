"""Calls of C++ (cpu.cpp): a group of chunks, `forward` and `backward` as in chunk.py, and one token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.neural_memory.chunk import Grads, Layers, Local, Maybe
from memarch.kernels.neural_memory.inner import Net
from memarch.kernels.neural_memory.memory import POSTS, Form, Memory, State

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def forward(
    c: Local, done: list[Any], w: Layers, s: Layers, point: Layers, init: Layers, net: Net, kept: Layers
) -> tuple[Tensor, Layers, Layers, Layers]:  # fmt: skip
    L, out = len(w), torch.empty_like(c.v)
    w, s, point = (owned(xs) for xs in (w, s, point))
    _call("neural_memory", c, done, w, net, [out], w, s, point, init, kept[:L], kept[L:])
    return out, w, s, point


def backward(
    c: Local, done: list[Any], kept: Layers, given: Layers, init: Layers, net: Net, dO: Tensor, dw: Layers, ds: Layers, dpoint: Layers
) -> Grads:  # fmt: skip
    L = len(dw)
    tokens, dc, dG = [torch.empty_like(x) for x in (c.q, c.k, c.v)], c.G.new_empty(len(c.q), len(c.c), c.G.shape[1]), torch.empty_like(c.G)
    dE, dm = (None, None) if c.gates.m is None else (torch.zeros_like(c.gates.E), torch.zeros_like(c.gates.m))
    last: list[Any] = [None, None] if dE is None or dm is None else [torch.empty_like(x) for x in _last(dE, dm)]
    outer = [None if x is None else torch.zeros_like(x) for x in (net.gain, net.bias)]
    dw, ds, dpoint, dinit = (owned(xs) for xs in (dw, ds, dpoint or [torch.zeros_like(x) for x in dw], [torch.zeros_like(x) for x in init]))
    lists = kept[:L], kept[L:], given, init, dw, ds, dpoint, dinit
    _call("neural_memory_back", c, done, dw, net, [dO, *tokens, dc, dG, *last, *outer], *lists)
    if dE is not None and dm is not None:
        dE[:, -1], dm[:, -1, 0] = last
    return Grads(tokens, list(dc[..., None].unbind(1)), dG, dE, dm, dw, ds, dpoint, dinit, *(None if x is None else x.squeeze(1) for x in outer))


def owned(xs: Layers) -> Layers:
    """What C++ may write to."""
    return [x.clone(memory_format=torch.contiguous_format) for x in xs]


def _last(E: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return E[:, -1].contiguous(), m[:, -1, 0].contiguous()


def one_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_momentum: Maybe, step: Tensor, begun: State, memory: Memory, form: Form, lengths: Maybe
) -> tuple[Tensor, State]:  # fmt: skip
    (B, _, H, V), K, weights = v.shape, k.shape[-1], begun.weights
    dtype = torch.promote_types(v.dtype, torch.float32)
    o, new = v.new_empty(v.shape, dtype=dtype), [[torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in begun[:3]]
    place = begun.place + (1 if lengths is None else lengths > 0) if form.chunk else None
    net = Net(memory.activation, memory.post, memory.gain, memory.bias, form.clip)
    given = q, k, v, log_decay, log_momentum, step, lengths, place, *_outer(net, dtype), o
    init = [x.to(dtype) for x in memory.weights] if memory.decay_to == "init" else []
    shape = [len(weights), 1, K, V, B * H, H, *_kind(net), form.chunk or 0]
    wide = [x if x is None or not x.is_floating_point() else x.to(dtype) for x in given]
    _run("neural_memory_token", dtype, shape, weights, wide, *begun[:3], init, *new)
    w, s, point = (tuple(xs) for xs in new)
    return o.to(v.dtype), State(w, s, point, () if place is None else place % form.chunk, ())


def _outer(net: Net, dtype: torch.dtype) -> tuple[Maybe, Maybe, Maybe]:
    return net.gain, net.bias, None if net.clip is None else torch.tensor([net.clip], dtype=dtype)


def _kind(net: Net) -> tuple[int, int]:
    return POSTS.index(net.post), net.activation == "gelu"


def _call(name: str, c: Local, done: list[Any], weights: Layers, net: Net, given: Sequence[Maybe], *lists: Layers) -> None:
    (_, C, K), V, X = c.q.shape, c.v.shape[-1], len(weights[0])
    E, m = (None, None) if c.gates.m is None else _last(c.gates.E, c.gates.m)
    begun = torch.stack([torch.as_tensor(x).expand(X, 1, 1).flatten() for x in done]).long()
    tensors = c.q, c.k, c.v, torch.cat(c.c, -1).mT, c.G, E, m, begun, *_outer(net, c.v.dtype), *given
    _run(name, c.v.dtype, [len(weights), C, K, V, X, len(done), *_kind(net), c.pull is not None], weights, tensors, *lists)


def _run(name: str, dtype: torch.dtype, shape: list[int], weights: Sequence[Tensor], tensors: Sequence[Maybe], *lists: Sequence[Tensor]) -> None:
    """Shape and the sizes of all layers, the tensors and, by layer, the lists; as the structs of cpu.cpp read them."""
    sizes = [y for w in weights for y in w.shape[-2:]]
    every: list[Maybe] = [*tensors, *(y for xs in lists for y in (xs or (None,) * len(weights)))]
    held = [None if x is None else x.contiguous() for x in every]
    pointers = torch.tensor([0 if x is None else x.data_ptr() for x in held])
    call(f"{name}_{SUFFIX[dtype]}", torch.tensor([*shape, *sizes]), pointers)
