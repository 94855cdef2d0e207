"""Segments as one mechanism: a stream is cut every `size` tokens, on each row's own grid, and something happens at the cut.

Rows may stand at different places of their segments. Tokens are laid on each row's grid, piece by piece; how many pieces there are depends
on T and the segment only, so one compiled graph serves every state. A cut inside a segment is exact, because an unfinished segment is
the inner state plus the place, and the next segment is opened the moment one closes.

    B rows   T tokens   D width   L segment
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memarch import state as states
from memarch.contracts import EMPTY, Mixed, Notes, SequenceMixer, State


class SegmentState(NamedTuple):
    inner: State  # the wrapped mixer, inside the open segment
    memory: State  # what goes from segment to segment
    place: Tensor  # [B] int64: tokens of the open segment so far, 0 <= place < L


class SegmentWrapper(SequenceMixer):
    """`open` makes the inner state a segment begins with; `close` makes the memory that a finished one leaves. `turn` does both, for a mixer
    whose next segment begins with more than what is kept beside it."""

    def __init__(self, inner: SequenceMixer, size: int, extra: int):
        super().__init__()
        self.inner, self.size, self.every = inner, size, inner.every
        self.bound = size + extra  # tokens the inner mixer ever sees from its start to its end

    def memory(self, batch: int) -> State:
        """The memory before the first segment."""
        raise NotImplementedError

    def open(self, memory: State, batch: int) -> State:
        raise NotImplementedError

    def close(self, inner: State, memory: State) -> State:
        raise NotImplementedError

    def turn(self, inner: State, memory: State, batch: int) -> tuple[State, State]:
        memory = self.close(inner, memory)
        return self.open(memory, batch), memory

    def start(self, batch: int) -> SegmentState:
        memory = self.memory(batch)
        inner = self.open(memory, batch)
        place = torch.zeros(batch, dtype=torch.int64, device=next(self.parameters()).device)
        return SegmentState(inner, memory, place)

    def forward(self, x: Tensor, state: SegmentState | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        B, T, D = x.shape
        aligned = state is None and lengths is None  # every row cuts at the same tokens: no gathering, no selecting
        inner, memory, place = state or self.start(B)
        left = torch.full((B,), T, device=x.device) if lengths is None else lengths
        done = torch.zeros_like(place)  # [B] tokens of this call already fed
        y, pieces, total = x.new_zeros(B, T, D), [], max(1, T)
        aux: dict[str, Tensor] = {}
        # A row that stands at place p needs ceil((p + T) / L) pieces, and p < L.
        count = -(-T // self.size) if state is None else (self.size - 1 + T + self.size - 1) // self.size
        parts = x.split(self.size, 1) if aligned else ()  # at once: the gradient of one slice after the other is of the whole length each time
        for i in range(count):
            if aligned:
                piece = parts[i]
                h = self.inner(piece, inner, below=EMPTY)
                pieces.append(h.y)
                share: Any = piece.shape[1] / total
                finished: Tensor | None = None
                place = torch.full_like(place, piece.shape[1] % self.size)
            else:
                take = torch.minimum(self.size - place, left - done).clamp(min=0)  # [B]
                offset = torch.arange(min(self.size, T), device=x.device)
                index = done[:, None] + offset  # [B, l]
                h = self.inner(x.gather(1, index.clamp(max=T - 1)[..., None].expand(-1, -1, D)), inner, below=EMPTY, lengths=take)
                real = (offset < take[:, None])[..., None]  # pads add nothing
                y = y.scatter_add(1, index.clamp(max=T - 1)[..., None].expand(-1, -1, D), torch.where(real, h.y, 0).to(y.dtype))
                share = take.sum() / left.sum().clamp(min=1)  # some pieces hold no token of any row
                done, place = done + take, place + take
                finished = place == self.size
                place = torch.where(finished, 0, place)
            grew = states.grew(inner, h.state)
            inner = h.state
            for name, value in h.aux.items():
                aux[name] = aux.get(name, 0.0) + value * share
            if aligned and (i + 1) * self.size > T:
                break  # the last segment is unfinished
            inner, memory = self._turn(inner, memory, finished)
            inner = states.trim(inner, grew, self.bound)
        return Mixed(torch.cat(pieces, 1) if aligned else y, SegmentState(inner, memory, place), aux)

    def _turn(self, inner: State, memory: State, finished: Tensor | None) -> tuple[State, State]:
        """Close the finished rows (None: all) and open their next segment."""
        if finished is None:
            return self.turn(inner, memory, states.rows(inner) or 0)
        if torch.compiler.is_compiling() or finished.is_meta:  # one graph for every state: do it for all rows and select
            opened, closed = self.turn(inner, memory, len(finished))
            return states.select(finished, opened, inner), states.select(finished, closed, memory)
        index = finished.nonzero().squeeze(1)
        if not len(index):
            return inner, memory
        opened, closed = self.turn(states.take(inner, index), states.take(memory, index), len(index))
        return states.put(inner, index, opened), states.put(memory, index, closed)

    def grows(self) -> int | None:
        return self.inner.grows() if self.inner.grows() is not None else self.size
