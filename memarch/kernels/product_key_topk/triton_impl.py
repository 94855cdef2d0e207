"""The search for a GPU: every score is read once, into the registers of one program.

There the k best are found in k rounds: the greatest score, the lowest id that has it, and that one is taken out. A round looks at all scores again, so n
and k have limits (__init__.py); within them nothing is packed or sorted, and it is one way for every dtype. Where rows of scores are short, a
program searches several.

The gradient needs no scattered sums either: a program owns rows of the result and goes through their k values in order.

    n sub-keys an axis   k pairs kept   Q searches   P pairs that can win
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels.launch import Check, accumulator, launch, noted
from memarch.kernels.product_key_topk.operator import define, refuse_nan
from memarch.kernels.product_key_topk.torch_impl import ranks

TILE, MOST = 512, 1024  # scores that a warp searches: of several queries, of one; 32 scores and 32 ids fill half the registers of a thread
NONE = tl.constexpr(2**31 - 1)  # the id of what cannot be taken


@triton.jit
def best(scores, ids, k, K: tl.constexpr):
    """scores, ids [Q, m] -> the k best scores and their ids [Q, K], best first, ties to the lowest id. NONE is no id."""
    rank = tl.arange(0, K)[None, :]
    top = tl.full([scores.shape[0], K], float("-inf"), scores.dtype)
    found = tl.full([scores.shape[0], K], NONE, tl.int32)
    for r in range(k):
        score = tl.max(scores, 1)[:, None]
        id = tl.min(tl.where(scores == score, ids, NONE), 1)[:, None]
        top, found = tl.where(rank == r, score, top), tl.where(rank == r, id, found)
        scores, ids = tl.where(ids == id, float("-inf"), scores), tl.where(ids == id, NONE, ids)
    return top, found


@triton.jit
def has_nan(scores):
    return tl.max((scores != scores).to(tl.int32), 1)[:, None] > 0


@triton.jit
def keep(top, found, scores, ids, q, Q, k, nan, K: tl.constexpr):
    """Write what was found; NaN among the scores makes the best score NaN."""
    rank = tl.arange(0, K)[None, :]
    mine = (q < Q) & (rank < k)
    top = tl.where((rank == 0) & nan, float("nan"), top)
    tl.store(scores + q * k + rank, top.to(scores.dtype.element_ty), mine)
    tl.store(ids + q * k + rank, found.to(ids.dtype.element_ty), mine)


@triton.jit
def axis_kernel(
    s, u, scores, ids, Q, n, k, H,
    RANK: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The k best of s [Q, n]; or, with u [H, r], of u^T s for s [Q, r, n] (kernels/tucker_topk)."""
    q = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]).to(tl.int64)
    col = tl.arange(0, WIDTH)[None, :]
    there = (q < Q) & (col < n)
    x = tl.zeros([QUERIES, WIDTH], ACC)
    for p in tl.static_range(RANK):
        y = tl.load(s + (q * RANK + p) * n + col, there, 0.0).to(ACC)
        if u is not None:
            y *= tl.load(u + q % H * RANK + p).to(ACC)
        x += y
    x = tl.where(there, x.to(s.dtype.element_ty).to(ACC), float("-inf"))
    top, found = best(x, tl.where(there, col, NONE), k, K)
    keep(top, found, scores, ids, q, Q, k, has_nan(x), K)


@triton.jit
def _pairs(
    t1, i, t2, j, first, second, scores, ids, Q, n, k, P,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """t1, i, t2, j [Q, k]: the best of either axis. first, second [P]: the ranks of the pairs that can win."""
    q = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]).to(tl.int64)
    pair = tl.arange(0, WIDTH)[None, :]
    there = (q < Q) & (pair < P)
    a, b = q * k + tl.load(first + pair, pair < P, 0), q * k + tl.load(second + pair, pair < P, 0)
    x = tl.load(t1 + a, there, float("-inf")).to(ACC) + tl.load(t2 + b, there, float("-inf")).to(ACC)
    x = x.to(t1.dtype.element_ty).to(ACC)  # rounded as scores are: what ties here ties elsewhere
    id = tl.load(i + a, there, 0) * n + tl.load(j + b, there, 0)
    top, found = best(x, tl.where(there, id, NONE), k, K)
    keep(top, found, scores, ids, q, Q, k, has_nan(x), K)


@triton.jit
def _spread(values, index, out, X, n, k, r, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    x = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([ROWS, WIDTH], ACC)
    for j in range(k):
        value, at = tl.load(values + x * k + j, x < X, 0.0).to(ACC), tl.load(index + x // r * k + j, x < X, 0)
        total += tl.where(at == col, value, 0.0)
    tl.store(out + x * n + col, total.to(out.dtype.element_ty), (x < X) & (col < n))


def spread(values: Tensor, index: Tensor, n: int) -> Tensor:
    """values [..., r, k], index [..., k] -> [..., r, n]: each value added where its index says, in order."""
    *lead, r, k = values.shape
    out, X, width = values.new_empty(*lead, r, n), values.shape[:-1].numel(), min(TILE, triton.next_power_of_2(n))
    a = {"values": values.contiguous(), "index": index.contiguous(), "out": out, "X": X, "n": n, "k": k, "r": r, "ACC": accumulator(values.dtype)}
    launch(_spread, (triton.cdiv(X, TILE // width), triton.cdiv(n, width)), warps=1, **a, ROWS=TILE // width, WIDTH=width)
    return out


def search(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    (Q, n), (first, second) = s1.shape, _ranks(k, s1.device)
    (t1, i), (t2, j) = axis_best(s1[:, None], None, k), axis_best(s2[:, None], None, k)
    scores, ids = s1.new_empty(Q, k), s1.new_empty(Q, k, dtype=torch.int64)
    a: dict[str, Any] = {"t1": t1, "i": i, "t2": t2, "j": j, "first": first, "second": second, "scores": scores, "ids": ids}
    a |= {"Q": Q, "n": n, "k": k, "P": len(first)}
    launch(_pairs, **tiles(Q, len(first), TILE), **a, K=triton.next_power_of_2(k), ACC=accumulator(s1.dtype))
    refuse_nan("product_key_topk", scores[:, 0])
    return scores, ids


def axis_best(s: Tensor, u: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """s [Q, r, n], u [H, r] with H a divisor of Q, or None where r is 1 -> the k best of u^T s [Q, k] and their int32 ids."""
    Q, r, n = s.shape
    scores, ids, H = s.new_empty(Q, k), s.new_empty(Q, k, dtype=torch.int32), 1 if u is None else u.shape[0]
    a: dict[str, Any] = {"s": s.contiguous(), "u": None if u is None else u.contiguous(), "scores": scores, "ids": ids, "Q": Q, "n": n, "k": k, "H": H}
    launch(axis_kernel, **tiles(Q, n, TILE), **a, RANK=r, K=triton.next_power_of_2(k), ACC=accumulator(s.dtype))
    return scores, ids


def tiles(Q: int, m: int, tile: int) -> dict[str, Any]:
    """For Q searches among m scores: the grid, the sides of a tile, its warps."""
    width = triton.next_power_of_2(m)
    queries = max(1, tile // width)
    return {"grid": (triton.cdiv(Q, queries),), "QUERIES": queries, "WIDTH": width, "warps": max(1, width // MOST)}


@cache
def _ranks(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = (x.to(device, torch.int32) for x in ranks(k))
    return first, second


def scatter(dscores: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    ds1, ds2 = (spread(dscores[:, None], x, n)[:, 0] for x in (ids // n, ids % n))
    return ds1, ds2


product_key_topk = define("product_key_topk_triton", search, scatter)


def checks() -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float32):
        for n, k in ((1024, 32), (128, 16), (4096, 128), (512, 64)):
            s = torch.empty(9, n, dtype=dtype, device="meta")
            with noted() as found:
                scores, ids = search(s, s, k)
                scatter(scores, ids, n)
            yield from found
