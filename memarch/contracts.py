"""The one contract every part of memarch keeps.

A sequence mixer is called `mixer(x, state)` and answers `(y, state, aux, note)`. Feeding a sequence in pieces gives what feeding it whole
gives: outputs, final state and gradients. Decoding is the same call with one token, so nothing here knows about modes, caches or layer
numbers. docs/design/contract.md says the same in prose, with the laws that tests hold every part to.

    B rows   T tokens   D width
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Any  # nested NamedTuples / tuples of tensors whose dim 0 is the row; () for nothing, never None
Notes = Mapping[str, tuple[Any, ...]]
EMPTY: Mapping[str, Any] = {}


class Mixed(NamedTuple):
    y: Tensor  # [B, T, D]; rows past lengths[b] are undefined
    state: State  # the caller keeps it
    aux: Mapping[str, Tensor] = EMPTY  # scalars; "loss/..." is already weighted and simply added, all else is a detached gauge
    note: Mapping[str, Any] = EMPTY  # name -> NamedTuple: what layers above may read


class Fed(NamedTuple):
    y: Tensor  # [B, T, D]
    aux: Mapping[str, Tensor] = EMPTY


class LMOutput(NamedTuple):
    logits: Tensor  # [B, T, vocab]; from a model wrapper they may be log-probabilities
    state: State
    aux: Mapping[str, Tensor] = EMPTY


class LossOutput(NamedTuple):
    """Sums, not means: adding the outputs of two pieces gives the output of the whole."""

    loss: Tensor  # sum of the cross entropy over the targets, in nats (or of the squared error)
    correct: Tensor  # how many targets the arg max hits
    count: Tensor  # type: ignore[assignment]  # how many targets are not -100; a tuple's own count is of no use here
    state: State
    aux: Mapping[str, Tensor] = EMPTY


class SequenceMixer(nn.Module):
    """Moves information along time. Attention, every recurrence, wrappers and the backbone are of this kind."""

    reads: tuple[str, ...] = ()  # notes of layers below without which this mixer cannot work
    writes: tuple[str, ...] = ()  # notes it posts
    every: int = 1  # tokens it takes for a new answer; until then the last one is repeated

    def start(self, batch: int) -> State:
        """A fresh state for `batch` rows; it may depend on parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        """x [B, T, D], T >= 1. `state=None` means `start(B)`. lengths [B] counts the real tokens of each row (right padding, 0 allowed):
        pads change neither the state nor a real output. The given state is never changed."""
        raise NotImplementedError

    def last(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        """`forward` with the y of each row's last real token alone, [B, 1, D]: all that a prompt is read for. Who can do with less work overrides it."""
        h = self(x, state, below=below, lengths=lengths)
        return h._replace(y=last(h.y, lengths))

    def init_(self, depth: int, generator: torch.Generator) -> None:
        """Fill every parameter and buffer this module owns. `depth` is the number of blocks of the model around it."""
        raise NotImplementedError

    def grows(self) -> int | None:
        """Tokens after which the state stops growing: 0 for constant, a window, or None when it grows with every token."""
        return 0


class ChannelMixer(nn.Module):
    """Works on every position alone: changing one position changes only that position."""

    def forward(self, x: Tensor) -> Fed:
        raise NotImplementedError

    def init_(self, depth: int, generator: torch.Generator) -> None:
        raise NotImplementedError


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row's last real token, [B, 1, ...]; of a row without one, any."""
    return x[:, -1:].clone() if lengths is None else x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)][:, None]


def under(prefix: str, aux: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names seen from one level up: `loss/balance` becomes `loss/blocks.3.ffn.balance`, a gauge `usage` becomes `blocks.3.ffn.usage`."""
    if not aux:
        return {}
    return {f"loss/{prefix}.{name[5:]}" if name.startswith("loss/") else f"{prefix}.{name}": value for name, value in aux.items()}
