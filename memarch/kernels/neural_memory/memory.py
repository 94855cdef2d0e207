"""What a memory is, and the state in which its stream stands."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "silu")
POSTS = ("none", "res", "rms", "ln")
DECAYS = ("zero", "init")


class Memory(NamedTuple):
    """An MLP  x_1 = k,  z_l = x_l W_l,  x_{l+1} = phi(z_l),  answer = post(z_L, k).

    weights     where a stream starts: one [H, in, out] for every layer; () is one layer of zeros. A layer with one row more than its
                input is wide has a bias, in the last row.
    activation  phi: gelu (by the error function) or silu
    post        none: z    res: k + z    rms, ln: k + normalised z, with the outer gain and bias, which the memory does not write
    gain, bias  [H, V], or None for one and zero; a bias goes with ln
    decay_to    what a memory that is never written to becomes: zero, or init, its starting weights
    pull        [chunk] or None. By place in its chunk, how much of what the chunk has written so far is seen: M' + pull_i (M_i - M'), M' being
                the memory at the chunk's start. TTT's 1/i. The memory goes into the next chunk as the last token saw it."""

    weights: tuple[Tensor, ...] = ()
    activation: str = "gelu"
    post: str = "none"
    gain: Tensor | None = None
    bias: Tensor | None = None
    decay_to: str = "zero"
    pull: Tensor | None = None


class Form(NamedTuple):
    """Where gradients are taken, and what becomes of them."""

    chunk: int | None  # None: at M_{t-1}, the exact form
    window: int = 1
    clip: float | None = None
    aligned: bool = False  # every row begins with a chunk, or does not count in chunks: nothing to look up in `place`


class State(NamedTuple):
    """One tensor per layer in each of the first three, [B, H, in, out], in float32 at least; () for what the form does not need.

    point and place may be left out, both (), where every row stands at a chunk's start: that is known without looking then, and costs no partial chunks."""

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    point: tuple[Tensor, ...]  # the weights at the chunk's start, where its gradients are taken
    place: Any  # [B] int64: tokens of the chunk that have been
    recent: tuple[Tensor, ...]  # k, v [B, window - 1, H, .] of the last tokens, for the next ones to learn once more


def fresh(memory: Memory, k: Tensor, v: Tensor, momentum: bool, form: Form) -> State:
    """The state before the first token of a stream of k [B, T, H, K], v [B, T, H, V]."""
    B, _, H, V = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    first = memory.weights or (v.new_zeros(H, k.shape[-1], V),)
    return State(
        _rows(first, B, dtype),
        tuple(torch.zeros_like(w) for w in _rows(first, B, dtype)) if momentum else (),
        _rows(first, B, dtype) if form.chunk else (),
        torch.zeros(B, dtype=torch.int64, device=v.device) if form.chunk else (),
        tuple(x.new_zeros(B, form.window - 1, H, x.shape[-1]) for x in (k, v)) if form.window > 1 else (),
    )


def whole(state: State, v: Tensor, form: Form) -> State:
    """With point and place, where they were left out."""
    if form.chunk is None or state.point:
        return state
    return state._replace(point=state.weights, place=torch.zeros(v.shape[0], dtype=torch.int64, device=v.device))


def _rows(weights: tuple[Tensor, ...], B: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(w.to(dtype).expand(B, *w.shape).clone() for w in weights)


def shapes(memory: Memory, k: Tensor, v: Tensor, momentum: bool, form: Form) -> tuple[list[tuple[int, ...]], ...]:
    """Of the tensors of a state, by field."""
    (B, _, H, V), K = v.shape, k.shape[-1]
    layers: list[tuple[int, ...]] = [(B, H, *w.shape[1:]) for w in memory.weights] or [(B, H, K, V)]
    recent: list[tuple[int, ...]] = [(B, form.window - 1, H, width) for width in (K, V)] if form.window > 1 else []
    return layers, layers if momentum else [], layers if form.chunk else [], [(B,)] if form.chunk else [], recent


def is_linear(memory: Memory) -> bool:
    return len(memory.weights) <= 1 and memory.post in ("none", "res")
