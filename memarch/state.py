"""States as values: tree maps over dim 0, the row.

A state is nested NamedTuples (or tuples) of tensors, every leaf [B, ...]. Some leaves grow with the stream (full attention keeps every
key). Such a history is newest last and what is real follows from positions, so zeros on the left are invisible: rows of different
age are brought to one length by padding there.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memarch.config import digest
from memarch.contracts import SequenceMixer, State

FORMAT = 1


def tree(f: Callable[..., Any], *states: State) -> Any:
    """Apply f to every leaf (or to every tuple of corresponding leaves)."""
    first = states[0]
    if isinstance(first, Tensor):
        return f(*states)
    if any(type(s) is not type(first) or len(s) != len(first) for s in states):
        raise ValueError(f"states of different make: {' and '.join(describe(s) for s in states)}. They come from different models.")
    items = [tree(f, *parts) for parts in zip(*states, strict=True)]
    return type(first)(*items) if hasattr(first, "_fields") else tuple(items)


def leaves(state: State) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its dotted name."""
    if isinstance(state, Tensor):
        yield "", state
        return
    names = getattr(state, "_fields", None) or [str(i) for i in range(len(state))]
    for name, part in zip(names, state, strict=True):
        for path, leaf in leaves(part):
            yield f"{name}.{path}" if path else name, leaf


def describe(state: State) -> str:
    return "a tensor" if isinstance(state, Tensor) else f"{type(state).__name__}({len(state)})"


def detach(state: State) -> State:
    return tree(Tensor.detach, state)


def to(state: State, *args: Any, **kwargs: Any) -> State:
    """Move every leaf. A dtype is for floating leaves only: positions stay integers."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return tree(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), state)


def rows(state: State) -> int | None:
    """The batch size, or None for a state with no tensor in it."""
    return next((leaf.shape[0] for _, leaf in leaves(state)), None)


def nbytes(state: State) -> int:
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(state))


def take(state: State, index: Tensor) -> State:
    """Rows by index, in that order, repeats allowed."""
    return tree(lambda x: x.index_select(0, index.to(x.device)), state)


def level(*parts: Tensor) -> tuple[Tensor, ...]:
    """Bring growing histories to one length, with zeros on the left."""
    if parts[0].ndim < 2:
        return parts
    longest = max([p.shape[1] for p in parts])
    return tuple([p if p.shape[1] == longest else torch.cat([p.new_zeros(p.shape[0], longest - p.shape[1], *p.shape[2:]), p], 1) for p in parts])


def concat(states: Sequence[State]) -> State:
    return tree(lambda *parts: torch.cat(level(*parts)), *states)


def put(state: State, index: Tensor, new: State) -> State:
    """`state` with the rows at `index` replaced by the rows of `new`."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        x, y = level(x, y)
        return x.index_copy(0, index.to(x.device), y.to(x.dtype))

    return tree(one, state, new)


def select(mask: Tensor, yes: State, no: State) -> State:
    """Row b of `yes` where mask[b], else of `no`. No host sync, so it stays inside one compiled graph."""

    def one(a: Tensor, b: Tensor) -> Tensor:
        a, b = level(a, b)
        return torch.where(mask.to(a.device).view(-1, *[1] * (a.ndim - 1)), a, b)

    return tree(one, yes, no)


def reset(state: State, mask: Tensor, fresh: State) -> State:
    """Begin anew in the rows where mask[b]; `fresh` is what the model's `start` gives."""
    return select(mask, fresh, state)


# ------------------------------------------------------------------------------------------------ checking, saving


def growing(mixer: SequenceMixer, dim: int) -> tuple[bool, ...]:
    """For every leaf of a mixer's state: does its dim 1 grow with the stream? Found out by feeding one token, and as many as an answer takes."""
    with torch.no_grad():
        before = mixer.start(1)
        weight = next(mixer.parameters())
        found = [grew(before, mixer(weight.new_zeros(1, n, dim), before).state) for n in sorted({1, mixer.every})]
        return tuple(any(flags) for flags in zip(*found, strict=True))


def grew(before: State, after: State) -> tuple[bool, ...]:
    """Which leaves did a call make longer?"""
    return tuple(a.shape != b.shape for (_, a), (_, b) in zip(leaves(before), leaves(after), strict=True))


def trim(state: State, grows: tuple[bool, ...], rows: int) -> State:
    """Keep the newest `rows` of every growing leaf: what lies further left is not real."""
    flags = iter(grows)
    return tree(lambda x: x[:, -rows:].clone() if next(flags) and x.shape[1] > rows else x, state)


def fits(state: State, like: State, batch: int) -> bool:
    """Is it what `like`, a `start(1)`, is for `batch` rows? A state that has grown is not."""
    if isinstance(like, Tensor):
        return isinstance(state, Tensor) and state.dtype == like.dtype and state.shape == (batch, *like.shape[1:])
    return type(state) is type(like) and len(state) == len(like) and all(fits(*parts, batch) for parts in zip(state, like, strict=True))


def check(state: State, like: State, grows: tuple[bool, ...], batch: int) -> None:
    """Refuse the state of another model, batch or dtype. `like` is `start(1)`; dim 1 of a growing leaf may differ."""
    if fits(state, like, batch):  # as every state of constant size that is right, and asked at every token: no names are made for it
        return
    given, wanted = dict(leaves(state)), dict(leaves(like))
    if given.keys() != wanted.keys():
        odd = sorted(given.keys() ^ wanted.keys())[0]
        raise ValueError(f"this state comes from another model: leaf {odd!r} is in one and not in the other. Start with model.start({batch}).")
    for (name, leaf), wide in zip(given.items(), grows, strict=True):
        want = wanted[name]
        same = leaf.ndim == want.ndim and leaf.shape[1 + wide :] == want.shape[1 + wide :]
        if not same:
            raise ValueError(
                f"this state comes from another model: {name} is {list(leaf.shape[1:])} a row, here {list(want.shape[1:])}. Start with model.start({batch})."
            )
        if leaf.shape[0] != batch:
            raise ValueError(f"the state has {leaf.shape[0]} rows and the input has {batch}. memarch.state.take picks rows of a state.")
        if leaf.dtype != want.dtype:
            raise ValueError(f"state leaf {name} is {leaf.dtype}, this model keeps {want.dtype}. memarch.state.to(state, dtype) converts.")


def save(state: State, path: str | Path, model: Any) -> None:
    """Write a state, with the digest of the config it belongs to. The same state gives the same bytes: one metadata key, because several
    are written in no fixed order."""
    from safetensors.torch import save_file

    about = json.dumps({"format": FORMAT, "config": digest(model.config)})
    save_file({name: leaf.detach().contiguous() for name, leaf in leaves(state)}, str(path), metadata={"memarch": about})


def load(path: str | Path, model: Any, device: torch.device | str = "cpu") -> State:
    """A state written by `save`, for a model of the same config."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no state at {path}. memarch.state.save(state, path, model) writes one.")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("memarch", "{}"))
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 a clone: what comes is a view of the file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). It is truncated or of another kind.") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not a state that memarch.state.save wrote (format {about.get('format')!r}, wanted {FORMAT}).")
    if about["config"] != digest(model.config):
        raise ValueError(f"{path} belongs to a model with another config (digest {about['config']}, this model {digest(model.config)}).")
    like = model.start(1)
    names = [name for name, _ in leaves(like)]
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was written by another version, or damaged.")
    order = iter(names)
    return tree(lambda _: found[next(order)], like)
