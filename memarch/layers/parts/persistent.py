"""Learned tokens at the start of every stream (Titans' persistent memory, after Sukhbaatar et al. 2019)."""

import torch
from torch import Tensor, nn

from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State
from memarch.layers.parts.linear import normal_


class Persistent(SequenceMixer):
    """Feeds `many` learned tokens once, into the state that a stream begins with; what they would answer is dropped."""

    def __init__(self, dim: int, many: int):
        super().__init__()
        self.persistent = nn.Parameter(torch.empty(many, dim))

    def init_(self, depth: int, generator: torch.Generator) -> None:
        normal_(self.persistent, 1.0, generator)  # the size of the normalised inputs they stand before

    def before(self, batch: int) -> State:
        """The state before these tokens."""
        raise NotImplementedError

    def run(self, x: Tensor, state: State, lengths: Tensor | None) -> Mixed:
        """What `forward` does, these tokens and others alike."""
        raise NotImplementedError

    def start(self, batch: int) -> State:
        state = self.before(batch)
        return self.run(self.persistent.expand(batch, -1, -1), state, None).state if len(self.persistent) else state

    def forward(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        return self.run(x, self.start(x.shape[0]) if state is None else state, lengths)
