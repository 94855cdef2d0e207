"""Text and tokens from a model: prompts of any lengths in one batch, each row giving what it gives alone.

A model reads all but the last token of a prompt, in chunks, and is then asked with one token at a time. So the state that comes back has read
all but the last token of each row, and going on is the same call:

    out = generate(model, prompts, max_new_tokens=100)
    out = generate(model, out.unread, state=out.state, seed=out.seeds, max_new_tokens=100)

together give what one call with 200 gives, in this process or, with `memarch.state.save`, in another.
"""

import codecs
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from memarch import state as states
from memarch.contracts import State
from memarch.models import LM, LMConfig


class Generated(NamedTuple):
    tokens: list[list[int]]  # the new tokens of each row, its stop token included
    state: State  # it has read all but the last token of each row
    seeds: list[int]  # where the random numbers of each row stand

    @property
    def unread(self) -> list[list[int]]:
        """What the state has not read: the prompts to go on with, alone or followed by new tokens."""
        return [row[-1:] for row in self.tokens]


class Sampler(NamedTuple):
    """How a token is chosen. Filters apply in this order; temperature 0 takes the most likely token."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (the most likely token) or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k counts the tokens to choose from, at least 1 (or None for all), got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0 and up to 1 (or None for all), got {self.top_p}.")

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """logits [B, V], u [B] uniform in [0, 1) -> tokens [B]: where u falls among the cumulated probabilities."""
        if self.temperature == 0:
            return logits.argmax(-1)
        z = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None:
            p, order = z.softmax(-1).sort(descending=True, stable=True)
            beyond = p.cumsum(-1) - p >= self.top_p  # the tokens before this one suffice
            z = z.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        total = z.softmax(-1).cumsum(-1)
        return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True).squeeze(1).clamp(max=z.shape[-1] - 1)


def generate(
    model: LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: Iterable[int] = (),
    on_token: Callable[[int, int], object] | None = None,
    state: State | None = None,
    chunk: int = 2048,
) -> Generated:
    """New tokens for every prompt, until a token of `stop` or `max_new_tokens`.

    seed: a number, or one a row, as an earlier call returned them. A row's random numbers follow from the seed, its own prompt and how often
    that prompt came before in the batch: the company it is in changes nothing. on_token(row, token) is called for every token as it is chosen.
    state: what the rows have read before their prompts, never changed. chunk: tokens of a prompt that are read at once, which bounds the memory."""
    run = _run(model, prompts, max_new_tokens, Sampler(temperature, top_k, top_p), seed, stop, state, chunk)
    while True:
        try:
            row, token = next(run)
        except StopIteration as end:
            return end.value
        if on_token is not None:
            on_token(row, token)


def generate_text(
    model: LM,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Iterable[int] = (),
    chunk: int = 2048,
) -> Iterator[str]:
    """The text that follows a prompt, from a model of bytes, in pieces as it comes. Every piece is valid: bytes wait until their character is whole."""
    if model.config.vocab_size != 256:
        raise ValueError(f"generate_text is for models of bytes (vocab_size 256); this one has {model.config.vocab_size}. Use generate with a tokenizer's ids.")
    run = _run(model, [encode_text(prompt)], max_new_tokens, Sampler(temperature, top_k, top_p), seed, stop, None, chunk)
    return _decoded(token for _, token in run)


def encode_text(text: str) -> list[int]:
    """UTF-8 bytes as tokens."""
    return list(text.encode())


def decode_text(tokens: Iterable[int]) -> str:
    """Tokens as UTF-8; what is not a character becomes U+FFFD."""
    return "".join(_decoded(tokens))


def _decoded(tokens: Iterable[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(bytes([token])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


# ------------------------------------------------------------------------------------------------ the loop

Run = Generator[tuple[int, int], None, Generated]  # yields (row, token), returns the whole


def _run(
    model: LM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    seed: int | Sequence[int],
    stop: Iterable[int],
    state: State | None,
    chunk: int,
) -> Run:
    """Refuse what cannot be before anything runs: a generator would refuse at its first token only."""
    sampler.check()
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    rows = _tokens(prompts, model.config)
    ends = frozenset(stop)
    if not ends <= set(range(model.config.vocab_size)):
        raise ValueError(f"stop holds token ids from 0 to {model.config.vocab_size - 1}, got {sorted(ends, key=str)}.")
    if state is not None and states.rows(state) not in (None, len(rows)):
        raise ValueError(f"the state has {states.rows(state)} rows and there are {len(rows)} prompts. memarch.state.take picks rows of a state.")
    return _steps(model, rows, max_new_tokens, sampler, _seeds(rows, seed), ends, state, chunk)


def _steps(model: LM, prompts: list[list[int]], limit: int, sampler: Sampler, seeds: list[int], stop: frozenset[int], state: State | None, chunk: int) -> Run:
    state = _read(model, [p[:-1] for p in prompts], state, chunk)
    tokens: list[list[int]] = [[] for _ in prompts]
    last = [p[-1] for p in prompts]
    rows = list(range(len(prompts)))  # those still going; `last` and `state` are theirs
    parked: list[tuple[list[int], State]] = []  # finished rows, which cost nothing more
    while rows:
        logits, state = _ask(model, last, state)
        for b in rows:
            seeds[b] = _next(seeds[b])
        u = torch.tensor([(seeds[b] >> 11) * 2.0**-53 for b in rows], dtype=torch.float64, device=logits.device)
        last = sampler.choose(logits, u).tolist()
        for b, token in zip(rows, last, strict=True):
            tokens[b].append(token)
            yield b, token
        over = [token in stop or len(tokens[b]) == limit for b, token in zip(rows, last, strict=True)]
        if any(over):
            parked.append(([b for b, ends in zip(rows, over, strict=True) if ends], _take(state, over)))
            state = _take(state, [not ends for ends in over])
            rows, last = ([x for x, ends in zip(xs, over, strict=True) if not ends] for xs in (rows, last))
    order = torch.tensor([b for some, _ in parked for b in some]).argsort()
    whole = states.concat([part for _, part in parked])
    return Generated(tokens, states.take(whole, order) if len(parked) > 1 else whole, seeds)


def _read(model: LM, prompts: list[list[int]], state: State | None, chunk: int) -> State | None:
    """Read prompts chunk by chunk; rows that are through are left out. None when there was nothing to read and no state."""
    for at in range(0, max(map(len, prompts)), chunk):
        here = [b for b, p in enumerate(prompts) if len(p) > at]
        pieces = [prompts[b][at : at + chunk] for b in here]
        longest = max(map(len, pieces))
        x = torch.tensor([p + [0] * (longest - len(p)) for p in pieces], device=model.device)
        lengths = None if min(map(len, pieces)) == longest else torch.tensor([len(p) for p in pieces], device=model.device)
        if len(here) == len(prompts):
            state = _prefill(model, x, state, lengths)
        else:
            whole = _start(model, len(prompts)) if state is None else state
            rows = torch.tensor(here, device=model.device)
            state = states.put(whole, rows, _prefill(model, x, states.take(whole, rows), lengths))
    return state


# no_grad, not inference_mode: a state made under inference_mode could never be trained on from.


@torch.no_grad()
def _prefill(model: LM, x: Tensor, state: State | None, lengths: Tensor | None) -> State:
    """Only what the state needs: the logits of a long prompt would be the largest thing in memory, and nobody reads them."""
    with _evaluating(model):
        return model.prefill(x, state, lengths=lengths).state


@torch.no_grad()
def _ask(model: LM, last: list[int], state: State | None) -> tuple[Tensor, State]:
    with _evaluating(model):
        out = model(torch.tensor(last, device=model.device)[:, None], state)
        return out.logits[:, -1], out.state


@torch.no_grad()
def _start(model: LM, batch: int) -> State:
    return model.start(batch)


def _take(state: State, mask: list[bool]) -> State:
    return states.take(state, torch.tensor(mask).nonzero().squeeze(1))


@contextmanager
def _evaluating(model: LM) -> Iterator[None]:
    """Eval mode, and every module as it was afterwards. Around each call, not the whole run: between tokens the model is the caller's."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------------ what comes in


def _tokens(prompts: Sequence[Sequence[int]], config: LMConfig) -> list[list[int]]:
    if config.embed != "tokens" or config.head != "tokens":
        raise ValueError(f"this model maps {config.embed} inputs to a {config.head} output; only a model from tokens to tokens generates.")
    if isinstance(prompts, str) or any(isinstance(p, int | str) for p in prompts):
        raise ValueError("prompts is a list of token lists: [[5, 7], [1, 2, 3]]. For one prompt write [tokens]; for text use generate_text or encode_text.")
    rows = [[index(token) for token in p] for p in prompts]
    if not rows:
        raise ValueError("there are no prompts; give at least one token list.")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; a model needs at least one token to go on from.")
        bad = next((token for token in row if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt {i}: token id {bad} is out of range: this model knows 0 to {config.vocab_size - 1} (vocab_size {config.vocab_size}).")
    return rows


def _seeds(prompts: list[list[int]], seed: int | Sequence[int]) -> list[int]:
    """One number a row, from which all its random numbers follow. Equal prompts are told apart by their order."""
    if not isinstance(seed, int):
        if len(seed) != len(prompts) or not all(0 <= s < 2**64 for s in seed):
            raise ValueError(f"seed is one number, or {len(prompts)} numbers from 0 to 2^64 - 1, one for each prompt, got {list(seed)}.")
        return list(seed)
    copies: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(_hash(f"{seed} {copies[prompt]} {prompt}".encode()))
        copies[prompt] += 1
    return seeds


def _next(seed: int) -> int:
    return _hash(seed.to_bytes(8, "little"))


def _hash(data: bytes) -> int:
    """A hash, not a generator: the same on every device, and a row's place in its stream is one number that can be saved."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
