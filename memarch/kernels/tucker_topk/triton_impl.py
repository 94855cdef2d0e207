"""The search for a GPU. The filters' best are those of product_key_topk's axes; the cells, axis^2 of them, are never written.

Of every kept row only the best cell is known that has not been taken: the front. The k best come in k rounds: the best of the front, in whose place the
next of its row comes, the best of the row's cells behind it in the order (score, id). So a round costs `axis` cells in place of axis^2. Rows enter by
the same lines, with what is behind nothing: a cell's score has to come from one place, for a compiler may round two in two ways.

    r rank   n sub-keys an axis, `axis` of them kept   k cells kept   H heads   X = Q H searches
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.launch import Check, accumulator, launch, noted
from memarch.kernels.product_key_topk.operator import refuse_nan
from memarch.kernels.product_key_topk.triton_impl import NONE, axis_best, spread, tiles
from memarch.kernels.tucker_topk import operator
from memarch.kernels.tucker_topk.operator import define

TILE = 128  # cells that a warp looks at in a round, of several searches where rows are short


@triton.jit
def _cells(
    s1, s2, core, t1, i, t2, j, scores, ids, nan, X, n, k, axis, H,
    RANK: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """t1, i, t2, j [X, axis]: what the filters kept. nan [X] is NaN where the search met one."""
    x = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]).to(tl.int64)
    kept = x * axis + tl.arange(0, WIDTH)[None, :]
    inside = (x < X) & (tl.arange(0, WIDTH)[None, :] < axis)
    rows, cols = tl.load(i + kept, inside, NONE), tl.load(j + kept, inside, NONE)
    front, front_id = tl.full([QUERIES, WIDTH], float("-inf"), ACC), tl.full([QUERIES, WIDTH], NONE, tl.int32)  # the best cell left in each row
    bad = front != front
    for step in range(axis + k):
        if step < axis:
            score, id = tl.full([QUERIES, 1], float("inf"), ACC), tl.full([QUERIES, 1], -1, tl.int32)
            row = tl.load(i + x * axis + step, x < X, NONE)
        else:
            score = tl.max(front, 1)[:, None]
            id = tl.min(tl.where(front == score, front_id, NONE), 1)[:, None]
            row = id // n
            tl.store(scores + x * k + (step - axis), score.to(scores.dtype.element_ty), x < X)
            tl.store(ids + x * k + (step - axis), id.to(tl.int64), x < X)
        known, there = (x < X) & (row < n), cols < n  # with NaN the filters or the rows run out
        cell = tl.zeros([QUERIES, WIDTH], ACC)
        for q in tl.static_range(RANK):
            left = tl.zeros([QUERIES, 1], ACC)
            for p in tl.static_range(RANK):
                left += tl.load(s1 + (x * RANK + p) * n + row, known, 0.0).to(ACC) * tl.load(core + (x % H * RANK + p) * RANK + q).to(ACC)
            cell += left * tl.load(s2 + (x * RANK + q) * n + cols, there, 0.0).to(ACC)
        cell = cell.to(s1.dtype.element_ty).to(ACC)
        bad = bad | (cell != cell)
        cell_id = row * n + cols
        behind = there & ((cell < score) | ((cell == score) & (cell_id > id)))
        score = tl.max(tl.where(behind, cell, float("-inf")), 1)[:, None]
        id = tl.min(tl.where(behind & (cell == score), cell_id, NONE), 1)[:, None]
        front, front_id = tl.where(rows == row, score, front), tl.where(rows == row, id, front_id)
    filters = tl.load(t1 + x * axis, x < X, 0.0).to(ACC) + tl.load(t2 + x * axis, x < X, 0.0).to(ACC)
    tl.store(nan + x, tl.where((tl.max(bad.to(tl.int32), 1)[:, None] > 0) | (filters != filters), float("nan"), 0.0), x < X)


def search(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    (Q, H, r, n), (s1, s2) = s1.shape, (s1.contiguous(), s2.contiguous())
    (t1, i), (t2, j) = axis_best(s1.flatten(0, 1), u, axis), axis_best(s2.flatten(0, 1), v, axis)
    scores, ids, nan = s1.new_empty(Q, H, k), s1.new_empty(Q, H, k, dtype=torch.int64), s1.new_empty(Q * H, dtype=torch.float32)
    a: dict[str, Any] = {"s1": s1, "s2": s2, "core": core.contiguous(), "t1": t1, "i": i, "t2": t2, "j": j, "scores": scores, "ids": ids, "nan": nan}
    launch(_cells, **tiles(Q * H, axis, TILE), **a, X=Q * H, n=n, k=k, axis=axis, H=H, RANK=r, ACC=accumulator(s1.dtype))
    refuse_nan("tucker_topk", nan)
    return scores, ids


tucker_topk = define("tucker_topk_triton", search, spread)
flops.file(operator.flops("tucker_topk_triton"))


def checks() -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float32):
        for r, n, k, axis in ((2, 256, 32, 32), (1, 100, 16, 16), (4, 360, 40, 64), (2, 1024, 768, 128)):
            s, core = (torch.empty(n, dtype=dtype, device="meta") for n in ((9, 2, r, n), (2, r, r)))
            with noted() as found:
                ids = search(s, s, core, core[..., 0], core[..., 0], k, axis)[1]
                spread(s.new_empty(9, 2, r, k, dtype=torch.float32), ids, n)
            yield from found
