"""Packed documents, once for every mixer: documents become rows of their own, run, and go back to where they came from.

No layer knows of packing, so none can leak across a border. Documents are run in groups of like length (each at most twice as long as its
shortest), so that padding at most doubles the work, however uneven they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memarch import state as states
from memarch.contracts import Mixed, SequenceMixer, State


class Documents(NamedTuple):
    row: Tensor  # [N] the row a document lies in
    begin: Tensor  # [N] its first position there
    size: Tensor  # [N] its real tokens
    fresh: Tensor  # [N] False: it continues the row's state


def documents(starts: Tensor, lengths: Tensor | None, stateful: bool) -> Documents:
    """Where documents lie. Position 0 always opens one: a fresh one without a state or where starts says so, else the row's continuation."""
    B, T = starts.shape
    place = torch.arange(T, device=starts.device)
    size = torch.full((B,), T, device=starts.device) if lengths is None else lengths
    opens = (starts | (place == 0)) & (place < size[:, None])
    row, begin = opens.nonzero(as_tuple=True)
    end = torch.where(row[1:] == row[:-1], begin[1:], size[row[:-1]])
    end = torch.cat([end, size[row[-1:]]])
    return Documents(row, begin, end - begin, starts[row, begin] | (not stateful))


def run_packed(mixer: SequenceMixer, x: Tensor, state: State | None, starts: Tensor, lengths: Tensor | None) -> Mixed:
    """mixer(x) with every document as a row. The state afterwards is that of each row's last document."""
    if starts.shape != x.shape[:2] or starts.dtype != torch.bool:
        raise ValueError(f"starts must be a bool tensor of shape {list(x.shape[:2])}, got {starts.dtype} of {list(starts.shape)}.")
    B, T, D = x.shape
    docs = documents(starts, lengths, state is not None)
    final = mixer.start(B) if state is None else state
    y, total = x.new_zeros(B * T, D), max(1, int(docs.size.sum()))
    gauges: dict[str, Tensor] = {}
    last = torch.cat([docs.row[1:] != docs.row[:-1], docs.row.new_ones(1, dtype=torch.bool)]) if len(docs.row) else docs.fresh
    octave = docs.size.double().log2().ceil()
    for group in octave.unique().tolist():
        index = (octave == group).nonzero().squeeze(1)
        row, begin, size = docs.row[index], docs.begin[index], docs.size[index]
        longest = int(size.max())
        place = torch.arange(longest, device=x.device)
        flat = row[:, None] * T + begin[:, None] + place  # [n, longest]
        real = place < size[:, None]
        given = states.select(docs.fresh[index], mixer.start(len(index)), states.take(final if state is None else state, row))
        out = mixer(x.reshape(B * T, D)[flat.clamp(max=B * T - 1)], given, lengths=size)
        y = y.index_put((flat[real],), out.y[real].to(y.dtype))
        for name, value in out.aux.items():  # scalars are means over tokens
            gauges[name] = gauges.get(name, value.new_zeros(())) + value * (int(size.sum()) / total)
        ends = last[index].nonzero().squeeze(1)
        if len(ends):
            final = states.put(final, row[ends], states.take(out.state, ends))
    return Mixed(y.view(B, T, D), final, gauges)
