"""Tokens sorted into buckets: every memory gets the tokens that chose it, in their order, as rows with lengths.

A pair is (token, choice), numbered row by row, token by token, choice by choice: b T k + t k + c. Its slot is its place in the rows of all buckets.

    B rows   T tokens   k choices of a token   M buckets
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

WASTE = 0.9  # buckets at least this full share a batch of rows; the rest run in another


class Group(NamedTuple):
    """Buckets that run together: their rows are bucket by bucket, and in each batch row by batch row."""

    which: Any  # the buckets: a slice, or a list of numbers
    many: int  # how many they are
    width: int  # tokens of the longest of their rows
    lengths: Tensor  # [count B] real tokens of each row


class Buckets(NamedTuple):
    groups: list[Group]
    slots: Tensor  # [B T k] the slot of a pair, or -1 for a pair without a bucket
    pairs: Tensor  # [slots] the pair in a slot, or -1 where a row is padding


def sort(ids: Tensor, M: int) -> Buckets:
    """ids [B, T, k]: the buckets each token goes to, M for none.

    How many tokens a bucket has is asked of the device once. A compiled graph cannot ask: there every row is as long as the input, which is
    right, and M / k times the work."""
    B, T, k = ids.shape
    key = ids.flatten(1)  # [B, T k]
    order = key.argsort(dim=1, stable=True)  # stable: the tokens of a bucket stay in their order
    counts = (key[..., None] == torch.arange(M, device=ids.device)).sum(1)  # [B, M]
    first = counts.cumsum(1) - counts
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(T * k, device=ids.device).expand(B, -1))  # the inverse of order

    unknown = torch.compiler.is_compiling() or ids.is_meta  # nothing can be asked: every bucket may be as long as the input
    which = [(slice(0, M), M, T)] if unknown else _grouped(counts.amax(0).tolist())
    row = torch.arange(B, device=ids.device)
    groups, pairs, base, begin = [], [], torch.zeros(M + 1, B, dtype=torch.int64, device=ids.device), 0
    for some, count, width in which:
        length = counts[:, some].mT  # [count, B]
        place = torch.arange(width, device=ids.device)
        at = (first[:, some].mT[..., None] + place).clamp(max=T * k - 1)  # [count, B, width] in order
        pair = order[row[:, None], at] + row[:, None] * (T * k)
        pairs.append(pair.masked_fill(place >= length[..., None], -1).flatten())
        base[:-1][some] = begin + torch.arange(count * B, device=ids.device).view(count, B) * width
        groups.append(Group(some, count, width, length.flatten()))
        begin += count * B * width
    bucket = key.clamp(max=M - 1)
    slots = base[bucket, row[:, None]] + rank - first.gather(1, bucket)
    return Buckets(groups, slots.masked_fill(key == M, -1).flatten(), torch.cat(pairs))


def _grouped(longest: list[int]) -> list[tuple[Any, int, int]]:
    """Buckets of about the same length together; empty ones not at all, unless all are."""
    groups: list[list[int]] = []
    for m in sorted(range(len(longest)), key=lambda m: -longest[m]):
        if groups and longest[m] >= WASTE * longest[groups[-1][0]]:
            groups[-1].append(m)
        elif longest[m]:
            groups.append([m])
    found = []
    for group in groups or [[0]]:
        width, ids = max(1, longest[group[0]]), sorted(group)
        run = ids[-1] - ids[0] == len(ids) - 1
        found.append((slice(ids[0], ids[-1] + 1) if run else ids, len(ids), width))
    return found


class Move(torch.autograd.Function):
    """x [n, D] -> y [m, D] with y[i] = x[there[i] // repeat], 0 where there[i] is -1. `back` undoes it: x[j] went to the places
    back[repeat j], .., back[repeat j + repeat - 1], so the gradient is read, too, and not scattered: deterministic, and fast on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, repeat: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.repeat = repeat
        return _read(x, there, repeat)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        dx = _read(dy, back, 1)
        return dx if ctx.repeat == 1 else dx.unflatten(0, (-1, ctx.repeat)).sum(1), None, None, None


def _read(x: Tensor, at: Tensor, repeat: int) -> Tensor:
    at = at if repeat == 1 else at.div(repeat, rounding_mode="floor")
    return x.index_select(0, at.clamp(min=0)).masked_fill_((at < 0)[:, None], 0)
