"""A memory that learns by gradient steps while it reads (kernels/neural_memory), with gates that keep it bounded.

    log a = logsigmoid(g_a)    log eta = logsigmoid(g_e)    step = cap (1 - eta) (1 + a) / 2 sigmoid(g_s)    g = W x + b

What keeps it bounded, beside keys of unit length:

    (1 - eta)          a write pushes for 1 / (1 - eta) tokens, and the stable step is that much smaller
    (1 + a) / 2        the error is that of the memory before it forgets: one repeated key swings for ever at step 1 + a, which is 1 where all is forgotten
    cap                gradients at a chunk's start count an error once for every token of the chunk that repeats its key
    clip               a longer gradient is shortened, so that no push is longer than cap clip, whatever comes in
    log a <= -1e-5     what was pushed is forgotten in the end: no layer's |M| grows beyond |M_0| + 1e5 cap clip
    log eta <= -1e-3   a push lasts about a thousand tokens

A matrix in its exact form cannot be clipped. There momentum that jumps up and down would pump the memory as one pumps a swing, from any error to
overflow; so where momentum rises, what has been pushed slows down as the writes do: log eta_t + min(0, log (1 - eta_t) - log (1 - eta_{t-1})) / 2 takes
the place of log eta_t, which is log eta_t where momentum is constant.

    B rows   T tokens   H heads   K width of keys and values   C chunk
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.kernels.neural_memory import Memory, State, neural_memory, push, read, start
from memarch.layers.parts.history import newest
from memarch.layers.parts.linear import Linear, normal_, uniform

LOWEST, DECAY, MOMENTUM = -20.0, -1e-5, -1e-3  # limits of the logarithms of the gates
HALF_LIFE = (16.0, 2048.0)  # tokens; log-uniform over heads at init


class Kind(NamedTuple):
    """One memory of the family, every default settled."""

    heads: int
    width: int
    depth: int
    expand: int
    activation: str
    post: str
    chunk: int | None  # None: gradients at M_{t-1}
    window: int
    momentum: bool
    decay: bool
    decay_to: str
    cap: float
    clip: float | None
    shift: bool
    ttt: bool

    @property
    def brake(self) -> bool:
        return self.momentum and self.clip is None

    def shapes(self) -> list[tuple[int, int, int]]:
        widths = [self.width, *[self.expand * self.width] * (self.depth - 1), self.width]
        return [(self.heads, a + self.ttt, b) for a, b in pairwise(widths)]

    def gates(self) -> int:
        return self.heads * (1 + self.momentum + self.decay)

    def num_params(self, dim: int) -> int:
        outer = {"rms": 1, "ln": 2}.get(self.post, 0) * self.heads * self.width
        return self.gates() * (dim + 1) + sum(map(math.prod, self.shapes())) + outer + (self.chunk or 0) * self.ttt


class NeuralState(NamedTuple):
    memory: State
    key: Any  # [B, 1, H, K]: the last token's, for the next one's value; () without shift
    rest: Any  # [B, 1, H]: the last token's log(1 - eta); () where the momentum needs no brake


class NeuralMemory(nn.Module):
    def __init__(self, dim: int, kind: Kind):
        super().__init__()
        self.kind = kind
        self.form: Any = {"grad_point": "chunk" if kind.chunk else "exact", "chunk": kind.chunk or 1, "window": kind.window}
        self.gates = Linear(dim, kind.gates())  # the raw decays, momenta and steps
        self.gate_bias = nn.Parameter(torch.empty(kind.gates()))
        self.first = nn.ParameterList(torch.empty(shape) for shape in kind.shapes())  # what a stream begins with
        self.gain = nn.Parameter(torch.empty(kind.heads, kind.width)) if kind.post in ("rms", "ln") else None
        self.bias = nn.Parameter(torch.empty(kind.heads, kind.width)) if kind.post == "ln" else None
        self.pull = nn.Parameter(torch.empty(kind.chunk or 0)) if kind.ttt else None

    def init_(self, generator: torch.Generator) -> None:
        kind = self.kind
        self.gates.init_(generator)
        self.gate_bias.zero_()
        if kind.decay:
            half_life = uniform((kind.heads,), math.log(HALF_LIFE[0]), math.log(HALF_LIFE[1]), generator).exp()
            self.gate_bias[: kind.heads] = -torch.expm1(math.log(2) / half_life).log()  # whose sigmoid is 1/2 after so many tokens
        for W in self.first:
            normal_(W, (W.shape[1] - kind.ttt) ** -0.5, generator)
            if kind.ttt:
                W[:, -1] = 0
        if kind.depth == 1 and self.gain is None:  # zeros are a dead point of an MLP, and cannot be normalised
            self.first[0].zero_()
        if self.gain is not None:
            self.gain.fill_(kind.width**-0.5)  # what is added to a unit key is of unit length
        for x in (self.bias, self.pull):
            if x is not None:
                x.zero_()

    def memory(self) -> Memory:
        kind, pull = self.kind, None
        if self.pull is not None:  # the mean of the chunk's steps so far, and what is learned beside
            i = torch.arange(1, len(self.pull) + 1, device=self.pull.device, dtype=torch.promote_types(self.pull.dtype, torch.float32))
            pull = (1 / i + self.pull).clamp(min=0)
        return Memory(tuple(self.first), kind.activation, kind.post, self.gain, self.bias, kind.decay_to, pull)

    def start(self, batch: int) -> NeuralState:
        one = self.gates.weight.new_zeros(batch, 1, self.kind.heads, self.kind.width)
        state = start(one, one, memory=self.memory(), momentum=self.kind.momentum, **self.form)
        return NeuralState(state, one if self.kind.shift else (), state.weights[0].new_zeros(one.shape[:3]) if self.kind.brake else ())

    def steer(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """-> log decay, log momentum, step [B, T, H], fp32 at least"""
        kind, wide = self.kind, torch.promote_types(x.dtype, torch.float32)
        raw = iter((self.gates(x).to(wide) + self.gate_bias.to(wide)).unflatten(-1, (-1, kind.heads)).unbind(-2))
        decay = F.logsigmoid(next(raw)).clamp(LOWEST, DECAY) if kind.decay else None
        momentum = F.logsigmoid(next(raw)).clamp(LOWEST, MOMENTUM) if kind.momentum else None
        step = kind.cap * next(raw).sigmoid()
        step = step if momentum is None else -torch.expm1(momentum) * step
        return (torch.zeros_like(step), momentum, step) if decay is None else (decay, momentum, (1 + decay.exp()) / 2 * step)

    def late(self, k: Tensor, state: NeuralState | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> the keys, each a token later, and the last one"""
        keys = torch.cat([torch.zeros_like(k[:, :1]) if state is None else state.key.to(k.dtype), k], 1)
        return keys[:, :-1], newest(keys, 1, lengths, k.shape[1]).to(self.gates.weight.dtype)

    def braked(self, momentum: Tensor, state: NeuralState | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> log momentum, and the last log (1 - eta)"""
        rest = torch.log(-torch.expm1(momentum))  # [B, T, H]
        rests = torch.cat([torch.zeros_like(rest[:, :1]) if state is None else state.rest, rest], 1)
        return momentum + (rest - rests[:, :-1]).clamp(max=0) / 2, newest(rests, 1, lengths, rest.shape[1])

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: NeuralState | None, lengths: Tensor | None
    ) -> tuple[Tensor, NeuralState, dict[str, Tensor]]:
        """x [B, T, D], q, k, v [B, T, H, K], q and k of unit length -> o [B, T, H, K], the state, gauges"""
        kind, memory = self.kind, self.memory()
        decay, momentum, step = self.steer(x)
        last: Any = ()
        rest: Any = ()
        if kind.shift:
            k, last = self.late(k, state, lengths)
            step = step * (k != 0).any(-1)  # nothing stands before the first token
        if kind.brake and momentum is not None:
            momentum, rest = self.braked(momentum, state, lengths)
        o, new = neural_memory(
            q, k, v, decay, momentum, step, None if state is None else state.memory,
            memory=memory, clip=kind.clip, lengths=lengths, **self.form,
        )  # fmt: skip
        new = new._replace(recent=tuple(y.to(self.gates.weight.dtype) for y in new.recent))
        return o, NeuralState(new, last, rest), self.gauges(new, k, v, decay, step, lengths) if self.training else {}

    @torch.no_grad()
    def gauges(self, state: State, k: Tensor, v: Tensor, decay: Tensor, step: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """Of the last token: the size of the memory, what it still gets wrong after the write (TTT: before its mean) and how long the gradient of that is,
        before the clip; how fast it forgets and learns."""
        k, v, decay, step = (newest(y, 1, lengths, y.shape[1]) for y in (k, v, decay, step))
        norm = sum(w.square().sum((-2, -1)) for w in state.weights) ** 0.5  # [B, H]
        miss = torch.linalg.vector_norm(self.recall(k, state.weights) - v, dim=-1)
        pushed = push(k, v, state.weights, self.memory())
        return {"norm": norm.mean(), "miss": miss.mean(), "push": pushed.mean(), "decay": decay.exp().mean(), "step": step.mean()}

    def recall(self, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """M(q) of a memory at rest: q [B, T, H, K], weights [B, H, in, out] by layer -> [B, T, H, K]"""
        return read(q, weights, self.memory()).to(q.dtype)
