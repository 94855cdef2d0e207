"""What the laws are tested on: every example of every table, every tiny preset, and a seeded sample of stacks drawn from the tables.

Being in a table is being here. There is no list of exceptions."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memarch import LM, LMConfig, create_model, decode, encode, list_models
from memarch import state as states
from memarch.config import initialise
from memarch.contracts import EMPTY, Mixed, SequenceMixer, State
from memarch.layers import CHANNELS, MIXERS
from memarch.wrappers import WRAPPERS

DIM = 16
F64 = torch.float64


@dataclass(frozen=True)
class Subject:
    """A sequence mixer to be held to the laws, and how long an input must be to cross everything in it three times."""

    name: str
    make: Callable[[], SequenceMixer]
    dim: int
    span: int

    @property
    def tokens(self) -> int:
        return max(3 * self.span + 5, 16)

    def build(self) -> SequenceMixer:
        return noisy(self.make())

    def __str__(self) -> str:
        return self.name


class Chain(SequenceMixer):
    """Layers in a residual row, so that a layer that reads a note finds one that writes it below."""

    def __init__(self, *layers: SequenceMixer):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def start(self, batch: int) -> State:
        return tuple(layer.start(batch) for layer in self.layers)

    def init_(self, depth: int, generator: torch.Generator) -> None:
        for layer in self.layers:
            layer.init_(depth, generator)

    def grows(self) -> int | None:
        spans = [layer.grows() for layer in self.layers]
        return None if None in spans else max(spans)

    def forward(self, x: Tensor, state: State | None = None, *, below: Any = EMPTY, lengths: Tensor | None = None) -> Mixed:
        notes, new = {}, []
        for i, layer in enumerate(self.layers):
            h = layer(x, None if state is None else state[i], below=notes, lengths=lengths)
            x = x + h.y
            new.append(h.state)
            notes |= {name: (*notes.get(name, ()), note) for name, note in h.note.items()}
        return Mixed(x, tuple(new))


def noisy(module: Any) -> Any:
    """float64, with noise on every parameter: a gate that starts at zero would hide what is behind it."""
    module.to(F64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=F64)
    return module.train()


def made(config: Any) -> SequenceMixer:
    return config.build(DIM, seed=0)


def writers(note: str) -> Iterator[Any]:
    for table in MIXERS.values():
        for config in table.examples():
            if note in made(config).writes:
                yield config


def fits(*configs: Any) -> bool:
    """Whether a reader can read what this writer posts: a mismatch is the reader's own clear error."""
    try:
        Chain(*map(made, configs))(torch.zeros(1, 1, DIM))
    except ValueError:
        return False
    return True


def mixers() -> list[Subject]:
    found = []
    for kind, table in MIXERS.items():
        for i, config in enumerate(table.examples()):
            needs = made(config).reads
            if not needs:
                found.append(Subject(f"{kind}-{i}", lambda c=config: made(c), DIM, config.span()))
                continue
            below = [w for note in needs for w in writers(note) if fits(w, config)]
            assert below, f"{kind} example {i} reads {needs}, and no example in the tables writes that in a fitting size"
            for j, writer in enumerate(below):
                span = max(writer.span(), config.span())
                found.append(Subject(f"{kind}-{i}-over-{j}", lambda w=writer, c=config: Chain(made(w), made(c)), DIM, span))
    return found


INNER = {
    "recurrent": {"pattern": "G", "parts": {"G": {"mixer": {"kind": "gated_delta", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 8}}}},
    "growing": {"pattern": "AW", "parts": {"A": {"mixer": {"kind": "attention", "heads": 2}}, "W": {"mixer": {"kind": "attention", "heads": 2, "window": 3}}}},
}


def every(wrapper: Any) -> int:
    """Tokens for one token of what is inside."""
    return getattr(wrapper, "chunk", 1)


def wrapped() -> list[Subject]:
    found = []
    for kind, table in WRAPPERS.items():
        for i, wrapper in enumerate(table.examples()):
            for name, inner in INNER.items():
                data = {"vocab_size": 11, "dim": DIM, "layers": len(inner["pattern"]), **inner, "wrap": [encode(wrapper)]}
                # Windows of 3 inside are crossed too, in tokens of their own.
                span = max(wrapper.span(), 3 * every(wrapper))
                found.append(Subject(f"{kind}-{i}-around-{name}", lambda d=data: LM(decode(LMConfig, d)).backbone, DIM, span))
            size = {"chunk": 2} if hasattr(wrapper, "chunk") else {"segment": 7}
            outer = decode(type(wrapper), {**encode(wrapper), **size})
            nested = {**data, "wrap": [encode(wrapper), encode(outer)]}
            span = max(7, 3 * every(wrapper) * every(outer))
            found.append(Subject(f"{kind}-{i}-nested", lambda d=nested: LM(decode(LMConfig, d)).backbone, DIM, span))
    return found


def longest(config: LMConfig) -> int:
    layers = [config.block(i).mixer for i in range(config.layers)]
    inside = max([1, *(m.span() for m in layers if m is not None)])
    return max([inside * math.prod(map(every, config.wrap)), *(w.span() for w in config.wrap)])


def presets() -> list[Subject]:
    found = []
    for name in list_models("*-tiny"):
        config = create_model(name, device="meta").config
        found.append(Subject(name, lambda n=name: create_model(n).backbone, config.dim, longest(config)))
    return found


def stack(seed: int) -> LMConfig:
    """One random model: mixers x channels x wrapper x pool x branch, all from the tables."""
    rng = random.Random(seed)
    examples = [table.examples() for table in MIXERS.values()]  # a kind is drawn, then one of its examples
    plain = list(filter(None, ([c for c in kind if not made(c).reads] for kind in examples)))
    readers = list(filter(None, ([c for c in kind if made(c).reads] for kind in examples)))
    channels = [c for table in CHANNELS.values() for c in table.examples()]
    layers = rng.choice([2, 3, 4])
    mixers = [rng.choice(rng.choice(plain)) for _ in range(layers)]
    if rng.random() < 0.5:
        reader, at = rng.choice(rng.choice(readers)), rng.randrange(1, layers)
        below = [c for kind in plain for c in kind if set(made(c).writes) >= set(made(reader).reads) and fits(c, reader)]
        mixers[at - 1 : at + 1] = [rng.choice(below), reader]
    parts, blocks = {}, []
    for i, mixer in enumerate(mixers):
        ffn = rng.choice(channels) if rng.random() < 0.8 else None
        blocks.append({"mixer": mixer, "ffn": ffn})
        parts["ABCD"[i]] = {"mixer": encode(mixer), "ffn": encode(ffn) if ffn else None}
    readable = [i for i, b in enumerate(blocks) if b["ffn"]]
    branches, aside = [], None
    if readable and rng.random() < 0.5:
        reads = rng.choice(readable)
        adds, aside = rng.randrange(reads, layers), rng.choice(channels)
        branches = [{"reads": reads, "adds": adds, "layer": encode(aside)}]
    channel = [c for c in (*(b["ffn"] for b in blocks), aside) if c]
    pools = {name: {"rows": rows, "width": width} for c in channel for name, (rows, width) in c.borrows(DIM).items()}
    wrap = []
    if rng.random() < 0.4:
        wrap = [encode(rng.choice([c for table in WRAPPERS.values() for c in table.examples()]))]
    data = {
        "vocab_size": 23,
        "dim": DIM,
        "layers": layers,
        "pattern": "ABCD"[:layers],
        "parts": parts,
        "pools": pools,
        "branches": branches,
        "wrap": wrap,
        "tie": rng.random() < 0.5,
    }
    return decode(LMConfig, data)


STACKS = 40


def stacks() -> list[Subject]:
    found = []
    for seed in range(STACKS):
        config = stack(seed)
        found.append(Subject(f"stack-{seed}", lambda c=config: LM(c).backbone, DIM, longest(config)))
    return found


def everything() -> list[Subject]:
    return mixers() + wrapped() + presets() + stacks()


# ------------------------------------------------------------------------------------------------ inputs and comparisons


def tokens(subject: Subject, batch: int = 2, length: int | None = None, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length or subject.tokens, subject.dim, generator=generator, dtype=F64)


def cuts(length: int, seed: int) -> list[int]:
    """Lengths of seeded ragged pieces that sum to `length`."""
    rng, pieces = random.Random(seed), []
    while sum(pieces) < length:
        pieces.append(min(rng.choice([1, 1, 2, 3, 5, 8, 13, 40]), length - sum(pieces)))
    return pieces


def in_pieces(mixer: SequenceMixer, x: Tensor, pieces: list[int]) -> Mixed:
    state, ys = mixer.start(x.shape[0]), []
    for piece in x.split(pieces, 1):
        out = mixer(piece, state)
        state = out.state
        ys.append(out.y)
    return Mixed(torch.cat(ys, 1), state)


def close(a: Tensor, b: Tensor, what: str, tol: float = 1e-9) -> None:
    assert a.shape == b.shape, f"{what}: shapes {list(a.shape)} and {list(b.shape)}"
    if a.is_floating_point():
        worst = (a - b).abs().max().item() if a.numel() else 0.0
        assert worst <= tol * max(1.0, b.abs().max().item() if b.numel() else 0.0), f"{what}: differs by {worst:.2e}"
    else:
        assert torch.equal(a, b), f"{what}: {a.tolist()} and {b.tolist()}"


def same_state(a: State, b: State, what: str, tol: float = 1e-9) -> None:
    left, right = dict(states.leaves(a)), dict(states.leaves(b))
    assert left.keys() == right.keys(), what
    for name in left:
        close(*states.level(left[name], right[name]), f"{what}: state {name}", tol)


def initialised(module: Any, seed: int = 0) -> Any:
    initialise(module, 1, seed)
    return module
