"""The bag for a GPU: rows are read where they lie, once, and sums are made in registers, in an order that shapes and ids decide.

A table [N, d] of h slices is a table [N h, d / h] in the same memory: slice i of row n is row n h + i there, and no program knows more of slices
than its i. Every pass is a tile of slots times columns:

    forward          a bag and a group; the slots of the tile are added up
    weights          some slots of a bag, their rows times dy; the columns of the tile are added up
    rows, chunks     CHUNK places of the slots sorted by id, where a row is a segment: a scan of sums that starts anew with each segment, so that the
                     last place of a segment holds its sum. What the chunk's borders cut goes to `parts` [C, 2]: [0] the end of a segment
                     that began earlier, or the whole chunk in the middle of one; [1] the beginning of one that goes on
    rows, joined     for each chunk in which a segment begins that goes on: its beginning and its parts in all chunks that it reaches

So a row that half of all slots read costs little more than any others, and the grid is known without knowing the segments: only a row-sparse gradient
waits for the GPU, once, for the number of its rows.

    N rows   d width   T bags   R slots a bag   E groups   h slices of D columns   S = T R slots   C chunks of them
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memarch.kernels import flops
from memarch.kernels.launch import Check, accumulator, launch, noted
from memarch.kernels.weighted_bag import operator
from memarch.kernels.weighted_bag.operator import Maybe, check_ids, define

TILE, COLS = 2048, 256  # numbers that a program loads at a time, and columns of them: 16 sums in registers of each thread, and room for ten programs
CHUNK, NARROW = 64, 64  # places and columns of the scan
FEW = 1024  # programs: 132 processors have room for more, so tiles are narrower then


@triton.jit
def _forward(
    table, ids, weights, groups, y, R, D, E, h,
    SLOTS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    bag, e, i = tl.program_id(0) // E, tl.program_id(0) % E, tl.program_id(2)
    first = bag.to(tl.int64) * R
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([SLOTS, COLS], ACC)
    for begin in range(0, R, SLOTS):
        r = begin + tl.arange(0, SLOTS)
        mine = r < R
        if groups is not None:
            mine = mine & (tl.load(groups + first + r, mine, -1) == e)
        row = tl.load(ids + first + r, mine, 0).to(tl.int64) * h + i
        weight = tl.load(weights + (first + r) * h + i, mine, 0.0).to(ACC)
        x = tl.load((table + row * D)[:, None] + col[None, :], mine[:, None] & (col < D)[None, :], 0.0).to(ACC)
        total += weight[:, None] * x
    tl.store(y + (tl.program_id(0).to(tl.int64) * h + i) * D + col, tl.sum(total, 0).to(y.dtype.element_ty), col < D)


@triton.jit
def _weights(
    dy, table, ids, groups, dweights, R, D, E, h,
    SLOTS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    bag, i = tl.program_id(0).to(tl.int64), tl.program_id(2)
    r = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    slot, mine = bag * R + r, r < R
    row = tl.load(ids + slot, mine, 0).to(tl.int64) * h + i
    fed = bag * E + tl.zeros([1], tl.int64)  # without groups one row of dy for all slots
    if groups is not None:
        fed += tl.load(groups + slot, mine, 0)
    total = tl.zeros([SLOTS, COLS], ACC)
    for begin in range(0, D, COLS):
        col = begin + tl.arange(0, COLS)[None, :]
        x = tl.load((table + row * D)[:, None] + col, mine[:, None] & (col < D), 0.0).to(ACC)
        total += x * tl.load((dy + (fed * h + i) * D)[:, None] + col, col < D, 0.0).to(ACC)
    tl.store(dweights + slot * h + i, tl.sum(total, 1).to(dweights.dtype.element_ty), mine)


@triton.jit
def _anew(begins, x, next_begins, y):
    return begins | next_begins, tl.where(next_begins != 0, y, x + y)


@triton.jit
def _chunks(
    dy, weights, groups, sorted_ids, order, place, dtable, parts, S, R, D, E, h,
    CHUNK: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    c, i = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at = tl.arange(0, CHUNK)
    p = c * CHUNK + at
    live = p < S
    id = tl.load(sorted_ids + p, live, -1)
    begins = (id != tl.load(sorted_ids + p - 1, live & (p > 0), -1)).to(tl.int32)
    ends = id != tl.load(sorted_ids + p + 1, p + 1 < S, -1)
    whole = tl.cumsum(begins, 0) > 0  # as far as here: the segment began in this chunk
    slot = tl.load(order + p, live, 0)
    weight = tl.load(weights + slot * h + i, live, 0.0).to(ACC)
    fed = slot // R * E
    if groups is not None:
        fed += tl.load(groups + slot, live, 0)

    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    x = weight[:, None] * tl.load((dy + (fed * h + i) * D)[:, None] + col, live[:, None] & (col < D), 0.0).to(ACC)
    _, sums = tl.associative_scan((tl.broadcast_to(begins[:, None], [CHUNK, COLS]), x), 0, _anew)
    row = tl.load(place + p, live, 0).to(tl.int64) * h + i
    tl.store((dtable + row * D)[:, None] + col, sums.to(dtable.dtype.element_ty), (live & ends & whole)[:, None] & (col < D))
    cut = live & (ends | (at == CHUNK - 1)) & ~(ends & whole)
    part = (c * 2 + whole.to(tl.int64)) * h + i
    tl.store((parts + part * D)[:, None] + col, sums, cut[:, None] & (col < D))


@triton.jit
def _join(
    sorted_ids, reach, place, dtable, parts, D, h,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """reach [C]: how far the segment goes that the chunk's last place belongs to."""
    c, i = tl.program_id(0).to(tl.int64), tl.program_id(2)
    last, end = (c + 1) * CHUNK - 1, tl.load(reach + c)
    begins_here = tl.load(sorted_ids + c * CHUNK - 1, c > 0, -1) != tl.load(sorted_ids + last)
    if begins_here & (end > last + 1):
        col = tl.program_id(1) * COLS + tl.arange(0, COLS)
        total = tl.zeros([ROWS, COLS], ACC)
        for begin in range(c + 1, (end - 1) // CHUNK + 1, ROWS):
            chunk = begin + tl.arange(0, ROWS)
            there = (chunk * CHUNK < end)[:, None] & (col < D)[None, :]
            total += tl.load((parts + (chunk * 2 * h + i) * D)[:, None] + col[None, :], there, 0.0)
        own = tl.load(parts + ((c * 2 + 1) * h + i) * D + col, col < D, 0.0)
        row = tl.load(place + last).to(tl.int64) * h + i
        tl.store(dtable + row * D + col, (own + tl.sum(total, 0)).to(dtable.dtype.element_ty), col < D)


def bag(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse_grad: bool) -> Tensor:
    check_ids(table, ids, groups, n_groups)
    (T, R), E = ids.shape, n_groups
    y = table.new_empty(T, E, table.shape[1], dtype=torch.promote_types(table.dtype, weights.dtype))
    a = plan(table, ids, weights, groups, E)
    cols = _tile(a["D"], COLS if T * E * a["h"] * triton.cdiv(a["D"], COLS) >= FEW else NARROW)
    launch(_forward, (T * E, triton.cdiv(a["D"], cols), a["h"]), **a, y=y, SLOTS=_tile(R, TILE // cols), COLS=cols, ACC=accumulator(y.dtype))
    return y


def backward(
    dy: Tensor, table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, n_groups: int, sparse: bool, rows: bool, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    T, R = ids.shape
    read, values, dweights = ids.new_empty(0, dtype=torch.int64), table.new_empty(0), weights.new_empty(weights.shape if scales else 0)
    a = plan(table, ids, weights, groups, n_groups) | {"dy": dy.contiguous(), "ACC": accumulator(dy.dtype)}
    if scales:
        cols = _tile(a["D"], COLS)
        slots = _tile(R, TILE // cols)
        launch(_weights, (T, triton.cdiv(R, slots), a["h"]), **a, dweights=dweights, SLOTS=slots, COLS=cols)
    if rows:
        short = torch.int32 if table.shape[0] < 2**31 else torch.int64  # half of the passes of a radix sort
        sorted_ids, order = ids.flatten().to(short).sort(stable=True)
        place = sorted_ids
        if sparse:
            read, place = sorted_ids.long().unique_consecutive(return_inverse=True)
        values = table.new_empty(read.shape[0], table.shape[1]) if sparse else torch.zeros_like(table)
        lasts = sorted_ids[CHUNK - 1 :: CHUNK].contiguous()  # without that of a chunk that is not full: nothing goes on behind it
        reach = torch.searchsorted(sorted_ids, lasts, right=True)
        S, D, h, cols = T * R, a["D"], a["h"], _tile(a["D"], NARROW)
        parts = dy.new_empty(triton.cdiv(S, CHUNK), 2, table.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
        a |= {"sorted_ids": sorted_ids, "order": order, "place": place, "reach": reach, "dtable": values, "parts": parts, "S": S}
        launch(_chunks, (parts.shape[0], triton.cdiv(D, cols), h), **a, warps=8, CHUNK=CHUNK, COLS=cols)
        launch(_join, (reach.shape[0], triton.cdiv(D, cols), h), **a, CHUNK=CHUNK, ROWS=TILE // cols, COLS=cols)
    return read, values, dweights


def plan(table: Tensor, ids: Tensor, weights: Tensor, groups: Maybe, E: int) -> dict[str, Any]:
    """What the kernels ask for, by the names they use."""
    a: dict[str, Any] = {"table": table, "ids": ids.contiguous(), "weights": weights.contiguous(), "groups": None if groups is None else groups.contiguous()}
    h = weights.shape[-1]
    return a | {"R": ids.shape[1], "D": table.shape[1] // h, "E": E, "h": h}


def _tile(n: int, most: int) -> int:
    """The side of a tile over n things."""
    return min(most, max(16, triton.next_power_of_2(n)))


weighted_bag = define("weighted_bag_triton", bag, backward)
flops.file(operator.flops("weighted_bag_triton"))


def checks() -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float32):
        for d, h, E, T in ((64, 1, 1, 1), (256, 2, 4, 1), (2048, 1, 1, FEW), (1000, 1, 4, FEW)):
            table, weights = (torch.empty(n, dtype=dtype, device="meta") for n in ((9, d), (T, 128, h)))
            ids = torch.empty(T, 128, dtype=torch.int32 if E > 1 else torch.int64, device="meta")
            groups = ids if E > 1 else None
            with noted() as found:
                dy = bag(table, ids, weights, groups, E, False)
                backward(dy, table, ids, weights, groups, E, False, True, True)
            yield from found
