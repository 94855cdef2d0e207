"""Text: bits per byte and perplexity, each document streamed from its first token to its last with the state carried.

No window slides and nothing is read twice: what a token costs is what a model that reads along pays for it. The part "position" says whether
the model gains from a longer past. The first token of a document is not scored, because nothing before it could tell.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from memarch.config import require
from memarch.data import Shards, Text
from memarch.data.draw import Array
from memarch.data.packed import Stream
from memarch.evaluation.stream import score
from memarch.evaluation.table import Advance, Row, Table, estimate, octave

TOKENS = 2**16  # of one batch, unless a batch size is asked for


class Piece(NamedTuple):
    """Consecutive tokens of one document: `size` are read and as many, one further on, are predicted."""

    document: int
    begin: int
    size: int


@dataclass(frozen=True, kw_only=True)
class TextTask:
    kind: Literal["text"] = "text"
    path: str | None = None  # a text file, a folder of them, or a folder of token shards; None: the text that every machine has
    split: Literal["train", "val", "test"] = "val"
    tokens: int | None = 2**18  # stop after so many; None: all
    context: int | None = None  # cut documents into pieces of so many tokens that know nothing of each other; None: whole documents

    metric: ClassVar[str] = "bits_per_token"
    grid: ClassVar[dict[str, str]] = {"context": "context"}
    parts: ClassVar[dict[str, tuple[str, ...]]] = {"position": ("position",)}

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens >= 1, f"tokens = {self.tokens}: must be at least 1, or null for all.")
        require(self.context is None or self.context >= 1, f"context = {self.context}: must be at least 1, or null for whole documents.")

    def source(self) -> Text | Shards:
        folder = self.path and Path(self.path).expanduser()
        require(not folder or folder.exists(), f"text: {self.path}: no such file or folder.")
        return Shards(path=str(folder)) if folder and (folder / "index.json").is_file() else Text(path=self.path)

    def stream(self) -> Stream:
        stream = self.source().stream(self.split)
        require(len(stream) > 1, f"text: the {self.split} split holds {len(stream)} tokens; nothing can be predicted. Give more text or another split.")
        return stream

    def pieces(self, stream: Stream) -> list[Piece]:
        left = len(stream) if self.tokens is None else self.tokens
        found = []
        for document, (begin, end) in enumerate(zip(stream.begins, [*stream.begins[1:], len(stream)], strict=True)):
            step = self.context or len(stream)
            for at in range(int(begin), int(end) - 1, step):
                size = min(step, int(end) - 1 - at, left)
                left -= size
                if size:
                    found.append(Piece(document, at, size))
        require(bool(found), f"text: every document of the {self.split} split is a single token; nothing can be predicted.")
        return found

    def work(self, model: Any) -> int:
        return sum(piece.size for piece in self.pieces(self.stream()))

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        source, stream = self.source(), self.stream()
        require(
            source.vocab_size <= model.config.vocab_size,
            f"text: the text has {source.vocab_size} different tokens and the model knows {model.config.vocab_size}. Was it trained with another tokenizer?",
        )
        found: list[tuple[Array, Array, Array]] = []
        for group in batches(self.pieces(stream), batch_size):
            found += self._score(model, stream, group, chunk)
            advance(sum(piece.size for piece in group))
        bits, place, unit = (np.concatenate(part) for part in zip(*found, strict=True))
        bytes_only = isinstance(source, Text) or source.index.tokenizer == "bytes"
        metric = "bits_per_byte" if bytes_only else self.metric
        mean, error, count = estimate(bits, unit)
        whole: Row = {"context": self.context or "whole", metric: mean, "error": error, "perplexity": 2**mean, "tokens": count}
        whole["documents"] = len(np.unique(unit))
        by_position = tuple(self._by_position(metric, bits, place, unit))
        return Table(self.kind, metric, ("context",), (whole,), {"position": by_position}, about={"text": source.fingerprint})

    def _score(self, model: Any, stream: Stream, group: list[Piece], chunk: int | None) -> list[tuple[Array, Array, Array]]:
        tokens = np.zeros((len(group), group[0].size + 1), dtype=np.int64)  # the first of a group is its longest
        for row, piece in zip(tokens, group, strict=True):
            row[: piece.size + 1] = stream.read(piece.begin, piece.size + 1)
        lengths = torch.tensor([piece.size for piece in group])
        targets = torch.from_numpy(tokens[:, 1:].copy())
        targets[torch.arange(targets.shape[1]) >= lengths[:, None]] = -100
        nats = score(model, torch.from_numpy(tokens[:, :-1].copy()), targets, lengths, chunk).nats.numpy()
        return [(nats[i, : p.size] / math.log(2), np.arange(1, p.size + 1), np.full(p.size, p.document)) for i, p in enumerate(group)]

    def _by_position(self, metric: str, bits: Array, place: Array, unit: Array) -> list[Row]:
        rows, bucket = [], octave(place)
        for low in np.unique(bucket).tolist():
            here = bucket == low
            mean, error, count = estimate(bits[here], unit[here])
            rows.append({"position": low, "below": 2 * low, metric: mean, "error": error, "tokens": count})
        return rows


def batches(pieces: list[Piece], batch_size: int | None) -> list[list[Piece]]:
    """Longest first, pieces of like size together: a batch is then hardly longer than what is in it."""
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: -p.size):
        most = 0 if not groups else batch_size or max(1, TOKENS // groups[-1][0].size)
        if groups and len(groups[-1]) < most:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups
