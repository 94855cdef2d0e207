"""Calls of C++ (cpu.cpp): all chunks, `forward` and `backward` as in dual.py, and one token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.neural_memory.chunk import All, Found, Layers, Maybe
from memarch.kernels.neural_memory.inner import Net
from memarch.kernels.neural_memory.memory import POSTS, Form, Memory, State

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def forward(c: All, w: Layers, s: Layers, point: Layers, init: Layers, net: Net, kept: Layers) -> tuple[Tensor, Layers, Layers, Layers]:
    L, v = len(w), c.tokens[2]
    out = torch.empty_like(v, dtype=w[0].dtype, memory_format=torch.contiguous_format)
    w, s, point = (owned(xs) for xs in (w, s, point))
    _call("neural_memory", c, w, net, [out], w, s, point, init, kept[:L], kept[L:])
    return out.to(v.dtype), w, s, point


def backward(
    c: All, kept: Layers, given: Layers, init: Layers, net: Net, dO: Tensor, dw: Layers, ds: Layers, dpoint: Layers
) -> Found:  # fmt: skip
    L, dtype = len(dw), dw[0].dtype
    tokens = [None if x is None else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in c.tokens[:6]]
    outer = [None if x is None else torch.zeros_like(x) for x in (net.gain, net.bias)]
    dpull = None if c.pull is None else dO.new_zeros(len(dw[0]), c.grid.C, dtype=dtype)
    dw, ds, dpoint, dinit = (owned(xs) for xs in (dw, ds, dpoint or [torch.zeros_like(x) for x in dw], [torch.zeros_like(x) for x in init]))
    lists = kept[:L], kept[L:], given, init, dw, ds, dpoint, dinit
    _call("neural_memory_back", c, dw, net, [dO.to(dtype), *tokens, *outer, dpull], *lists)
    tokens = [None if x is None or y is None else y.to(x.dtype) for x, y in zip(c.tokens[:6], tokens, strict=True)]
    return Found(tokens, dw, ds, dpoint, dinit, [*(None if x is None else x.squeeze(1) for x in outer), None if dpull is None else dpull.sum(0)])


def owned(xs: Layers) -> Layers:
    """What C++ may write to."""
    return [x.clone(memory_format=torch.contiguous_format) for x in xs]


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
    shape = [len(weights), 1, K, V, B * H, 1, *_kind(net), H, form.chunk or 0, 1]
    wide = [x if x is None or not x.is_floating_point() else x.to(dtype) for x in given]
    _run("neural_memory_token", dtype, shape, weights, wide, *begun[:3], init, *new)
    w, s, point = (tuple(xs) for xs in new)
    return o.to(v.dtype), State(w, s, point, () if place is None else place % form.chunk, ())


def _outer(net: Net, dtype: torch.dtype) -> tuple[Maybe, Maybe, Maybe]:
    return net.gain, net.bias, None if net.clip is None else torch.tensor([net.clip], dtype=dtype)


def _kind(net: Net) -> tuple[int, int]:
    return POSTS.index(net.post), net.activation == "gelu"


def _call(name: str, c: All, weights: Layers, net: Net, given: Sequence[Maybe], *lists: Layers) -> None:
    (B, _, H, K), V, g, dtype = c.tokens[0].shape, c.tokens[2].shape[-1], c.grid, weights[0].dtype
    ends = torch.full((B,), g.T) if g.ends is None else g.ends.flatten()
    tokens = [None if x is None else x.to(dtype) for x in c.tokens]
    shape = [len(weights), g.C, K, V, B * H, g.N, *_kind(net), H, g.chunk, c.window]
    _run(name, dtype, shape, weights, [*tokens, c.pull, ends, *_outer(net, dtype), *given], *lists)


def _run(name: str, dtype: torch.dtype, shape: list[int], weights: Sequence[Tensor], tensors: Sequence[Maybe], *lists: Sequence[Tensor]) -> None:
    """Shape and the sizes of all layers, the tensors and, by layer, the lists; as the structs of cpu.cpp read them."""
    sizes = [y for w in weights for y in w.shape[-2:]]
    every: list[Maybe] = [*tensors, *(y for xs in lists for y in (xs or (None,) * len(weights)))]
    held = [None if x is None else x.contiguous() for x in every]
    pointers = torch.tensor([0 if x is None else x.data_ptr() for x in held])
    call(f"{name}_{SUFFIX[dtype]}", torch.tensor([*shape, *sizes]), pointers)
