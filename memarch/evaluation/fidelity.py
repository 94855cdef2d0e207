"""What is left of a token in the last layer, and of a layer in a later one: ETMF and ECLMF (MemMamba, arXiv 2510.03279), as published and corrected.

    ETMF_D    = mean_j cos(E[x_{j-D+o}], r_j)            r_j = sum_v p_j(v) E[v],   p_j = softmax(logits_j / temperature)
    ECLMF_l,G = 1 - |Y - X W| / (|X| + 1e-6)             X = h^l,  Y = h^{l+G},     W = (X'X + ridge)^-1 X'Y

The published offset is o = 0: a token and what the model says there. A causal model speaks of the next token there, so o = 1 compares what
belongs together. In both, what is compared lies D tokens apart.

Published, W is scored on the tokens it was fitted to, which flatters it unless they are many more than the width; held out, the text is cut in the
middle, and each half is scored with the W of the other. Published, the unit is |X|, which rewards a residual stream for not growing; |Y| as the
unit makes it the share of Y that W finds. No form has a lower bound.

States are not kept: |Y - XW|^2 = |Y|^2 - 2 <W, X'Y> + <W, X'X W> asks for X'X and X'Y only, and these are sums over tokens.

    B rows   T positions   n tokens   V vocabulary   L blocks   G gap   D width, or in ETMF_D the distance
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memarch import state as states
from memarch.config import require
from memarch.data import DataConfig, Text, split_seed
from memarch.data.draw import Array
from memarch.data.packed import Packed, Stream
from memarch.evaluation.perplexity import Piece, TextTask, batches
from memarch.evaluation.stream import CHUNK, LOGITS, quiet
from memarch.evaluation.table import Advance, Row, Table, estimate

OFFSETS = (0, 1)
FORMS = {  # of ECLMF: column -> what it is called
    "x_in_sample": "in-sample, over |X| (published)",
    "x_held_out": "held-out, over |X|",
    "y_in_sample": "in-sample, over |Y|",
    "y_held_out": "held-out, over |Y|",
}
ROWS = 64  # generated at once
EPS = 1e-6  # the paper's


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    kind: Literal["fidelity"] = "fidelity"
    data: DataConfig = field(default_factory=Text)
    split: Literal["train", "val", "test"] = "val"
    tokens: int = 2**15
    distances: tuple[int, ...] = (0, 8, 16, 32)  # 0 is the paper's ETMF, the others its ETMF_D
    gaps: tuple[int, ...] = (1, 2, 5, 10)  # the paper has 2, 5 and 10; 1 is what a model of two blocks has
    temperature: float = 1.0
    ridge: float = 1e-4

    metric: ClassVar[str] = "ETMF"
    grid: ClassVar[dict[str, str]] = {"distance": "distances"}
    parts: ClassVar[dict[str, tuple[str, ...]]] = {"ECLMF": ("apart",), "blocks": ("block", "apart")}

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"tokens = {self.tokens}: must be at least 1.")
        for name in ("temperature", "ridge"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: must be above 0.")
        for name, least in (("distances", 0), ("gaps", 1)):
            values = getattr(self, name)
            require(len(values) > 0 and min(values) >= least, f"{name} = {values}: each must be at least {least}, and there must be one.")

    def work(self, model: Any) -> int:
        return sum(piece.size for piece in self.pieces(self.stream()))

    def stream(self) -> Stream:
        """What a source of documents holds; or rows that it generates, in the order of training, each a document."""
        if isinstance(self.data, Packed):
            return self.data.stream(self.split)
        rows: list[Array] = []
        step, left = 0, self.tokens
        while left > 0:
            new = self.data.step(split_seed(0, self.split), step, range(ROWS), ROWS).tokens.numpy()
            rows, step, left = [*rows, *new], step + 1, left - len(new) * (new.shape[1] - 1)  # the last token of a row is only foreseen
        return Stream(rows, np.cumsum([0, *map(len, rows[:-1])]))

    def pieces(self, stream: Stream) -> list[Piece]:
        return TextTask(tokens=self.tokens).pieces(stream)

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        has, knows = self.data.vocab_size, model.config.vocab_size
        require(has <= knows, f"{self.data.kind}: the data has {has} different tokens and the model knows {knows}: give other data.")
        every = model.backbone.every
        require(every == 1, f"fidelity asks what the blocks make of every token; in this model they read one vector for {every} tokens.")
        stream, layers = self.stream(), len(model.core.blocks)
        pieces = self.pieces(stream)
        middle = (pieces[-1].begin + pieces[-1].size) // 2
        gaps = [gap for gap in self.gaps if gap < layers]
        moments = Moments(layers, model.config.dim, gaps, model.device)
        cosines = Cosines(model.embed.weight, self.distances, self.temperature)
        with quiet(model):
            for group in batches(pieces, batch_size):
                tokens, lengths = laid_out(stream, group)
                begins, documents = (torch.tensor([getattr(piece, name) for piece in group]) for name in ("begin", "document"))
                for seen in read(model, tokens[:, :-1], lengths, chunk):
                    cosines.add(seen, tokens, documents)
                    place = begins[: len(seen.real), None] + seen.begin + torch.arange(seen.real.shape[1])
                    moments.add(seen.states[:, seen.real], (place >= middle).to(model.device)[seen.real])
                advance(int(lengths.sum()))
        rows = tuple(cosines.rows())
        parts = moments.parts(gaps, self.ridge) if gaps else {}
        about = {"states": moments.count, **({"text": self.data.fingerprint} if isinstance(self.data, Packed) else {})}
        return Table(self.kind, self.metric, ("distance", "offset"), rows, parts, tuple(self._skipped(rows, layers)), about)

    def _skipped(self, rows: Sequence[Row], layers: int) -> Iterator[str]:
        there = {row["distance"] for row in rows}
        yield from (f"ETMF, distance {d}: no document that was read is so long" for d in self.distances if d not in there)
        if layers == 1:
            yield "ECLMF: the model has 1 block, and ECLMF leads from one to a later one"
        else:
            yield from (f"ECLMF, gap {gap}: the model has {layers} blocks" for gap in self.gaps if gap >= layers)


# ------------------------------------------------------------------------------------------------ reading


class Seen(NamedTuple):
    """One chunk of the rows that are still running."""

    begin: int  # of the chunk in its rows
    real: Tensor  # bool [B, T]
    logits: Tensor  # [B, T, V]
    states: Tensor  # [L, B, T, D] after each block


def laid_out(stream: Stream, group: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """tokens [B, T + 1] and lengths [B]; what stands behind the last token that is read is there too."""
    tokens = np.zeros((len(group), group[0].size + 1), dtype=np.int64)  # the first of a group is its longest
    for row, piece in zip(tokens, group, strict=True):
        row[: piece.size + 1] = stream.read(piece.begin, piece.size + 1)
    return torch.from_numpy(tokens), torch.tensor([piece.size for piece in group])


def read(model: Any, tokens: Tensor, lengths: Tensor, chunk: int | None = None) -> Iterator[Seen]:
    """tokens [B, T], lengths [B], longest first: the rows that have ended are the last ones, and are dropped from batch and state."""
    B, T = tokens.shape
    if chunk is None:
        widest = max(model.config.vocab_size, len(model.core.blocks) * model.config.dim)
        chunk = max(1, min(CHUNK, LOGITS // (B * widest)))
    state, rows = None, B
    for begin in range(0, T, chunk):
        running = int((lengths > begin).sum())
        if running < rows:
            rows, state = running, states.take(state, torch.arange(running))
        piece = tokens[:rows, begin : begin + chunk].to(model.device)
        left = (lengths[:rows] - begin).clamp(max=piece.shape[1]).to(model.device)
        output, after = watched(model, piece, state, left)
        state = output.state
        yield Seen(begin, torch.arange(piece.shape[1], device=model.device) < left[:, None], output.logits, after)


def watched(model: Any, tokens: Tensor, state: Any, lengths: Tensor) -> tuple[Any, Tensor]:
    """model(tokens, state, lengths=lengths), and the states of its tokens after each block [L, B, T, D].

    A state is taken where it is read next, by the next block or the last norm: branches have been added there. A wrapper calls the backbone
    several times: with pieces of segments, which have lengths because the call has, and with vectors of its own, which have none and are no tokens.
    Before that a model may run its backbone to learn what a state of it looks like."""
    calls: list[tuple[Tensor | None, list[Tensor]]] = []
    core = model.core
    hooks = [model.backbone.register_forward_pre_hook(lambda *_: calls.clear())]
    hooks += [core.register_forward_pre_hook(lambda _, args, kwargs: calls.append((kwargs.get("lengths"), [])), with_kwargs=True)]
    hooks += [reader.register_forward_pre_hook(lambda _, args: calls[-1][1].append(args[0])) for reader in (*core.blocks[1:], core.norm)]
    try:
        output = model(tokens, state, lengths=lengths)
    finally:
        for hook in hooks:
            hook.remove()
    place, done = torch.arange(tokens.shape[1], device=tokens.device), torch.zeros_like(lengths)
    found = calls[0][1][0].new_zeros(len(core.blocks), *tokens.shape, model.config.dim)
    for size, after in calls:
        if size is not None:
            here = (place >= done[:, None]) & (place < (done + size)[:, None])  # row by row, as many as are real
            found[:, here] = torch.stack(after)[:, place[: after[0].shape[1]] < size[:, None]]
            done = done + size
    assert torch.equal(done, lengths), "every token goes through the backbone once, and with lengths"
    return output, found


# ------------------------------------------------------------------------------------------------ ETMF


class Cosines:
    """cos(E[x_{j-D+o}], r_j) of every position, for every distance and offset."""

    def __init__(self, embedding: Tensor, distances: Sequence[int], temperature: float):
        self.embedding = embedding.detach().to(torch.promote_types(embedding.dtype, torch.float32))
        self.directions = F.normalize(self.embedding, dim=-1)
        self.temperature = temperature
        self.found: dict[tuple[int, int], list[tuple[Array, Array]]] = {(d, o): [] for d in distances for o in OFFSETS}

    def add(self, seen: Seen, tokens: Tensor, documents: Tensor) -> None:
        """tokens [B, T] from the rows' beginnings, one more than is read; documents [B]."""
        p = (seen.logits.to(self.embedding.dtype) / self.temperature).softmax(-1)
        r = F.normalize(p @ self.embedding, dim=-1)  # [B, T, D]
        real = seen.real.cpu()
        B, T = real.shape
        document = documents[:B, None].expand(B, T)
        for (distance, offset), found in self.found.items():
            at = seen.begin + torch.arange(T) - distance + offset
            there = real & (at >= 0)
            cosine = (r * self.directions[tokens[:B, at.clamp(min=0)].to(r.device)]).sum(-1).cpu()
            found.append((cosine[there].numpy(), document[there].numpy()))

    def rows(self) -> Iterator[Row]:
        for (distance, offset), found in self.found.items():
            values, units = (np.concatenate(part) for part in zip(*found, strict=True))
            if len(values):
                mean, error, count = estimate(values, units)
                yield {"distance": distance, "offset": offset, "ETMF": mean, "error": error, "positions": count}


# ------------------------------------------------------------------------------------------------ ECLMF


class Moments:
    """X'X of every block and X'Y of every pair of blocks, in fp64, apart for the two halves of the text."""

    def __init__(self, layers: int, dim: int, gaps: Sequence[int], device: torch.device):
        def zeros(n: int) -> Tensor:
            return torch.zeros(2, n, dim, dim, dtype=torch.float64, device=device)

        self.count = 0
        self.xx = zeros(layers)  # [2, L, D, D]
        self.xy = {gap: zeros(layers - gap) for gap in gaps}  # [2, L - G, D, D]

    def add(self, h: Tensor, half: Tensor) -> None:
        """h [L, n, D] after each block; half [n] bool: in the second half."""
        self.count += h.shape[1]
        for i, part in enumerate((h[:, ~half].double(), h[:, half].double())):
            self.xx[i] += part.mT @ part
            for gap, xy in self.xy.items():
                xy[i] += part[:-gap].mT @ part[gap:]

    def scores(self, gap: int, ridge: float) -> dict[str, Tensor]:
        """ECLMF from every block that has one `gap` further on: [L - G] for each unit and way of fitting."""
        xx, xy = self.xx[:, :-gap], self.xy[gap]
        yy = trace(self.xx[:, gap:])  # [2, L - G] |Y|^2
        first, second, whole = ((xx[0], xy[0], yy[0]), (xx[1], xy[1], yy[1]), (xx.sum(0), xy.sum(0), yy.sum(0)))
        left = {"in_sample": rest(whole, whole, ridge), "held_out": rest(first, second, ridge) + rest(second, first, ridge)}
        size = {"x": trace(whole[0]).sqrt() + EPS, "y": whole[2].sqrt() + EPS}
        return {f"{of}_{how}": 1 - value.clamp(min=0).sqrt() / unit for of, unit in size.items() for how, value in left.items()}

    def parts(self, gaps: Sequence[int], ridge: float) -> dict[str, tuple[Row, ...]]:
        """ECLMF: the mean over blocks, by gap. blocks: each by itself."""
        means, blocks = [], []
        for gap in gaps:
            scores = self.scores(gap, ridge)
            means.append({"apart": gap, **{name: value.mean().item() for name, value in scores.items()}})
            each = zip(*(value.tolist() for value in scores.values()), strict=True)
            blocks += [{"block": i, "apart": gap, **dict(zip(scores, values, strict=True))} for i, values in enumerate(each)]
        return {"ECLMF": tuple(means), "blocks": tuple(blocks)}


def trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def rest(fit: tuple[Tensor, Tensor, Tensor], on: tuple[Tensor, Tensor, Tensor], ridge: float) -> Tensor:
    """|Y - X W|^2 on some tokens, W fitted to these or others. Each is X'X, X'Y [L, D, D] and |Y|^2 [L]."""
    (a, b, _), (xx, xy, yy) = fit, on
    w = torch.linalg.solve(a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), b)
    return yy - 2 * (w * xy).sum((-2, -1)) + (w * (xx @ w)).sum((-2, -1))
