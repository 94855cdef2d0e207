"""Documents laid end to end and cut into rows: what text and token shards have in common.

    D documents   N tokens   T length of a row

Row r is tokens r*T .. r*T + T - 1 of the stream, and its targets are the tokens one further on, so rows share no target and lose none. A
target that is the first token of another document is not scored: nothing before it could tell.
"""

from collections.abc import Sequence

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch
from memarch.data.draw import Array, split_of
from memarch.data.order import permute


class Stream:
    """Token arrays one behind the other (in memory or mapped from disk) and where each document begins."""

    def __init__(self, pieces: Sequence[Array], begins: Array):
        self.pieces = tuple(pieces)
        self.begins = begins  # [D] int64, ascending; begins[0] is 0
        self.ends = np.cumsum([len(piece) for piece in pieces])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, begin: int, count: int) -> Array:
        """Tokens begin .. begin + count - 1, across the pieces' borders."""
        found, piece = [], int(np.searchsorted(self.ends, begin, side="right"))
        while count > 0:
            at = begin - (int(self.ends[piece]) - len(self.pieces[piece]))
            found.append(self.pieces[piece][at : at + count])
            begin, count, piece = begin + len(found[-1]), count - len(found[-1]), piece + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def cut(self, rows: Sequence[int] | Array, length: int, *, fresh: bool) -> Batch:
        """Rows as a batch. fresh: whatever stood before it, a row begins a document; else it continues what its first token does."""
        at = np.array(rows, dtype=np.int64) * length  # [B]
        window = np.empty((len(at), length + 1), dtype=np.int64)
        begins = np.zeros(window.shape, dtype=bool)
        low, high = np.searchsorted(self.begins, at), np.searchsorted(self.begins, at + length + 1)
        for b, begin in enumerate(at):
            window[b] = self.read(int(begin), length + 1)
            begins[b, self.begins[low[b] : high[b]] - begin] = True
        targets = np.where(begins[:, 1:], -100, window[:, 1:])
        begins[:, 0] |= fresh
        tokens, labels, starts = (torch.from_numpy(np.ascontiguousarray(x)) for x in (window[:, :-1], targets, begins[:, :-1]))
        return Batch(tokens, labels, starts)


class Packed:
    """The order of rows, over whatever stream the config opens.

    carry false: every epoch visits all rows once, in an order drawn from (seed, epoch); each row stands alone.
    carry true, for truncated backpropagation through time: row b of step s + 1 continues row b of step s. The stream is cut into as many
    lanes as a global batch has rows, each read from its beginning to its end and then again; the order is the stream's, whatever the seed.
    starts[b, 0] is then false, except where a document begins and at the first step of a lane, where nothing came before."""

    kind: str
    length: int
    carry: bool

    def stream(self, split: str) -> Stream:
        raise NotImplementedError

    def rows(self, seed: int) -> int:
        split = split_of(seed)
        tokens = len(self.stream(split))
        require(
            tokens > self.length,
            f"{self.kind}: the {split} split has {tokens} tokens and a row of length {self.length} takes {self.length + 1}: "
            "give more text, shorter rows, or hold out more documents.",
        )
        return (tokens - 1) // self.length

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        """Samples by number; beyond the last row they go on with the next epoch. With carry they are the stream's rows in reading order."""
        rows, index = self.rows(seed), np.array(indices, dtype=np.int64)
        stream = self.stream(split_of(seed))
        if self.carry:
            return stream.cut(index % rows, self.length, fresh=False)
        shuffled = np.empty_like(index)
        for epoch in np.unique(index // rows):
            now = index // rows == epoch
            shuffled[now] = permute(rows, seed, int(epoch), index[now] % rows)
        return stream.cut(shuffled, self.length, fresh=True)

    def step(self, seed: int, step: int, rows: range, size: int) -> Batch:
        if not self.carry:
            return self.batch(seed, range(step * size + rows.start, step * size + rows.stop))
        per_lane = self.rows(seed) // size
        require(
            per_lane > 0,
            f"{self.kind}: carry gives each of the {size} rows of a batch its own stretch of text, and the {split_of(seed)} split has only "
            f"{self.rows(seed)} rows of length {self.length}: take a smaller batch, shorter rows, or more text.",
        )
        place = step % per_lane
        return self.stream(split_of(seed)).cut([lane * per_lane + place for lane in rows], self.length, fresh=place == 0)
