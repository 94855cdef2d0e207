"""The search without gradients, then the scores of the cells that were found, with them.

Kept rows and columns are put in the order of their indices, so that places in the k x k grid are ordered as ids are, and ties with them. Grid and
found cells use the same products in the same order, and so agree to the bit.

    r rank   n sub-keys an axis   k cells kept   H heads   Q searches
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.product_key_topk.operator import refuse_nan
from memarch.kernels.product_key_topk.torch_impl import best

CHUNK = 2**18  # scores searched at a time: they stay in the cache


def tucker_topk(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    inputs = [x.detach() for x in (s1, s2, core, u, v)]
    ids = search_operator(*inputs, k) if torch.compiler.is_compiling() else search(*inputs, k)
    return cell_scores(s1, s2, core, ids), ids


def cell_scores(s1: Tensor, s2: Tensor, core: Tensor, ids: Tensor) -> Tensor:
    """s1, s2 [..., H, r, n], core [H, r, r], ids [..., H, k] -> the scores of these cells [..., H, k]. With several cores that share a search,
    each core's own scores."""
    n, r = s1.shape[-1], s1.shape[-2]
    i, j = (x.unsqueeze(-2).expand(*x.shape[:-1], r, x.shape[-1]) for x in (ids // n, ids % n))
    return _bilinear(s1.gather(-1, i).unbind(-2), s2.gather(-1, j).unbind(-2), core[..., None, :, :])


def _bilinear(a: Sequence[Tensor], b: Sequence[Tensor], core: Tensor) -> Tensor:
    """sum_pq a[p] C_pq b[q], for numbers C_pq = core[..., p, q]: r^2 products over whole tensors, and the rank is small, 2 in the papers."""
    core = core.to(a[0].dtype)
    left = [reduce(add, [x * core[..., p, q] for p, x in enumerate(a)]) for q in range(len(b))]
    return reduce(add, [x * y for x, y in zip(left, b, strict=True)])


@exact
def search(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int) -> Tensor:
    (Q, H, _, n), step = s1.shape, max(1, CHUNK // (s1.shape[1] * max(s1.shape[3], k * k)))
    ids = s1.new_empty(Q, H, k, dtype=torch.int64)
    place = torch.arange(k * k, device=s1.device)
    for q in range(0, Q, step):
        a, i = _kept(s1[q : q + step], u, k)
        b, j = _kept(s2[q : q + step], v, k)
        grid = _bilinear(a[..., None].unbind(2), b[:, :, :, None].unbind(2), core[:, None, None])  # [q, H, k, k]
        grid = grid.flatten(2).flatten(0, 1)
        values, found = best(grid, place, k)
        refuse_nan("tucker_topk", values[:, 0] if s1.device.type == "cpu" else grid)
        found = found.view(-1, H, k)
        ids[q : q + step] = i.gather(-1, found // k) * n + j.gather(-1, found % k)
    return ids


def _kept(s: Tensor, u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """s [q, H, r, n] -> its k columns that the filter likes best, in the order of their indices: [q, H, r, k] and the indices [q, H, k]."""
    filtered = (s * u.to(s.dtype)[..., None]).sum(-2)  # [q, H, n]
    values, index = best(filtered.flatten(0, 1), torch.arange(s.shape[-1], device=s.device), k)
    refuse_nan("tucker_topk", values[:, 0] if s.device.type == "cpu" else filtered)
    index = index.sort(-1).values.view(*filtered.shape[:2], k)
    return s.gather(-1, index[:, :, None].expand(*s.shape[:3], k)), index


search_operator = torch.library.custom_op("memarch::tucker_topk", search, mutates_args=())


@search_operator.register_fake
def _(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int) -> Tensor:
    return s1.new_empty(*s1.shape[:2], k, dtype=torch.int64)


FLOPS = {"tucker_topk": lambda s1, s2, core, u, v, k, **_: 2 * s1[0] * s1[1] * s1[2] * (2 * s1[3] + k * s1[2] + k * k)}
