"""The recurrent mixers' common shape: queries, keys and values in, a rule that writes and reads a memory, the read out.

A rule is one published recurrence. It owns no parameters: it gives some to the layer that uses it, its owner, under their published names, so that the
same rule serves a layer with one memory and a layer with many (`mom`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memarch.config import LayerConfig
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State
from memarch.layers.parts.heads import Heads, Readout
from memarch.layers.parts.linear import Linear


class Rule:
    """q, k [B, T, H, K], v [B, T, H, V] and `raw` more numbers a token, from a linear map called `gates` -> o [B, T, H, V] and the new memory."""

    gates: ClassVar[str] = "gates"

    def __init__(self, heads: int, key: int, value: int):
        self.heads, self.key, self.value = heads, key, value
        self.raw = 0  # how many numbers a token beside q, k, v

    def make(self, owner: Any) -> None:
        """Give the owner this rule's parameters, empty."""

    def num_params(self) -> int:
        return 0

    def init_(self, owner: Any, generator: torch.Generator) -> None:
        """Fill them."""

    def start(self, batch: int, like: Tensor) -> State:
        return self.zeros(batch, like, self.value)

    def zeros(self, batch: int, like: Tensor, width: int) -> Tensor:
        """[B, H, K, width], in float32 at least."""
        return like.new_zeros(batch, self.heads, self.key, width, dtype=torch.promote_types(like.dtype, torch.float32))

    def __call__(self, owner: Any, q: Tensor, k: Tensor, v: Tensor, raw: Tensor | None, memory: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        raise NotImplementedError


class RecurrentState(NamedTuple):
    memory: State
    tail: Tensor  # [B, taps - 1, H (2K + V)]


class Ends(NamedTuple):
    """What stands before and behind the rule."""

    taps: int = 0  # of the short convolution on q, k, v; 0 for none
    act: bool = True  # SiLU behind it
    gate: bool = True  # gate the read
    recall: bool = False  # the init for small recall runs


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(LayerConfig):
    def rule(self, dim: int) -> Rule:
        raise NotImplementedError

    def ends(self) -> Ends:
        raise NotImplementedError

    def num_params(self, dim: int) -> int:
        rule, ends = self.rule(dim), self.ends()
        into = Heads.num_params(dim, rule.heads, rule.key, rule.value, ends.taps)
        return into + rule.raw * dim + rule.num_params() + Readout.num_params(dim, rule.heads, rule.value, ends.gate)


class Recurrent(SequenceMixer):
    def __init__(self, dim: int, cfg: RecurrentConfig):
        super().__init__()
        rule, ends = self.rule, self.ends = cfg.rule(dim), cfg.ends()
        self.heads, self.key, self.value = rule.heads, rule.key, rule.value
        self.into = Heads(dim, rule.heads, rule.key, rule.value, ends.taps, ends.act)
        if rule.raw:
            setattr(self, rule.gates, Linear(dim, rule.raw))
        rule.make(self)
        self.read = Readout(dim, rule.heads, rule.value, ends.gate)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        self.into.init_(generator, self.ends.recall)
        if self.rule.raw:
            getattr(self, self.rule.gates).init_(generator)
        self.rule.init_(self, generator)
        self.read.init_(depth, generator)

    def start(self, batch: int) -> RecurrentState:
        return RecurrentState(self.rule.start(batch, self.read.out.weight), self.into.start(batch))

    def forward(self, x: Tensor, state: RecurrentState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        memory, tail = (None, None) if state is None else state
        q, k, v, tail = self.into(x, tail, lengths)  # [B, T, H, K or V]
        raw = getattr(self, self.rule.gates)(x) if self.rule.raw else None  # [B, T, raw]
        o, memory = self.rule(self, q, k, v, raw, memory, lengths)
        return Mixed(self.read(o, x), RecurrentState(memory, tail))
