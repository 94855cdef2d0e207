"""The k best of each axis, then of the pairs that can still win.

topk takes any of equal scores. On a CPU a row of scores with such a tie among its best is searched again, for ties are rare; elsewhere, where
looking would mean waiting, every row is searched that way: as whole numbers that cannot be equal, the score's bits, made to grow with the
score, above the bits of the id, made to fall with it. One topk of these gives scores, ids and the order of ties.

    n sub-keys an axis   k pairs kept   Q searches   P pairs that can win
"""

from functools import cache

import torch
from torch import Tensor

from memarch.kernels.product_key_topk.operator import define, refuse_nan

WIDEST = 2**16  # sub-keys: ids of pairs then have 32 bits, as scores have
LOW = 2**32 - 1
CHUNK = 2**18  # scores searched at a time: their keys stay in a CPU's cache
FEW = 2**11  # scores that are sorted sooner than the calls are made which save sorting them: one token


def pack(scores: Tensor, ids: Tensor) -> Tensor:
    """Keys in int64: a greater score is greater, and among equal scores a smaller id is."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (LOW - ids)


def unpack(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).to(dtype), LOW - (keys & LOW)


def best(scores: Tensor, ids: Tensor, k: int, bits: int = 32) -> tuple[Tensor, Tensor]:
    """scores [Q, m], ids [m] or [Q, m] of so many bits -> the k best scores and their ids, best first, ties to the lowest id."""
    ids = ids.expand_as(scores)
    if scores.numel() <= FEW:
        return by_sorting(scores, ids, k)
    if scores.device.type != "cpu":
        return best_of_ties(scores, ids, k, bits)
    values, at = scores.topk(k)
    found = ids.gather(1, at)
    next_best = scores.scatter(1, at, -torch.inf).amax(1, keepdim=True)
    tied = (torch.cat([values[:, 1:], next_best], 1) == values).any(1)
    if tied.any():
        values[tied], found[tied] = best_of_ties(scores[tied], ids[tied], k, bits)
    return values, found


def best_of_ties(scores: Tensor, ids: Tensor, k: int, bits: int = 32) -> tuple[Tensor, Tensor]:
    if scores.dtype != torch.float64 and bits <= 32:
        return unpack(pack(scores, ids).topk(k).values, scores.dtype)
    return by_sorting(scores, ids, k)


def by_sorting(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids, by_id = ids.sort(-1)
    values, order = scores.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids.gather(-1, order[:, :k])


def at_once(device: torch.device) -> int:
    """Scores searched at a time: on a GPU as many as it takes to fill it, and their keys then have 512 MiB."""
    return CHUNK if device.type == "cpu" else 2**26


def search(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    (Q, n), step = s1.shape, max(1, at_once(s1.device) // s1.shape[1])
    scores, ids = s1.new_empty(Q, k), s1.new_empty(Q, k, dtype=torch.int64)
    axis, (a, b) = torch.arange(n, device=s1.device), (x.to(s1.device) for x in ranks(k))
    bits = 32 if n <= WIDEST else 64
    for q in range(0, Q, step):
        x1, x2 = s1[q : q + step], s2[q : q + step]
        (t1, i), (t2, j) = best(x1, axis, k), best(x2, axis, k)
        on_cpu = s1.device.type == "cpu"  # where topk counts NaN as the greatest; keys of NaN can be the least
        refuse_nan("product_key_topk", *((t1[:, 0], t2[:, 0]) if on_cpu else (x1, x2)))
        pairs = t1.index_select(1, a).add_(t2.index_select(1, b))  # [q, P]
        scores[q : q + step], ids[q : q + step] = best(pairs, (i * n).index_select(1, a).add_(j.index_select(1, b)), k, bits)
    return scores, ids


@cache
def ranks(k: int) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of the pairs that k others do not dominate: (a + 1)(b + 1) <= k."""
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    return torch.tensor([a for a, _ in pairs], device="cpu"), torch.tensor([b for _, b in pairs], device="cpu")


def scatter(dscores: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    wide = dscores.to(torch.promote_types(dscores.dtype, torch.float32))
    i, j = ids // n, ids % n
    ds1, ds2 = (wide.new_zeros(ids.shape[0], n).scatter_add_(1, x, wide) for x in (i, j))
    return ds1.to(dscores.dtype), ds2.to(dscores.dtype)


product_key_topk = define("product_key_topk", search, scatter)
