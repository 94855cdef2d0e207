"""The sparse-lookup ops against what a user could write with torch. `ours` is what runs here: C++ once `memarch warmup` has built it."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case, draw
from memarch.kernels.product_key_topk import product_key_topk
from memarch.kernels.tucker_topk import principal, tucker_topk
from memarch.kernels.weighted_bag import weighted_bag


@cache
def table(N: int, d: int) -> Tensor:
    return torch.randn(N, d, generator=torch.Generator().manual_seed(0))


def read(N: int, tokens: int, R: int, zipf: bool) -> Tensor:
    """ids: uniform, or row of rank x with a probability of 1/x."""
    source = torch.Generator().manual_seed(0)
    if not zipf:
        return torch.randint(0, N, (tokens, R), generator=source)
    rank = (torch.rand(tokens, R, generator=source) * torch.tensor(float(N)).log()).exp().long().clamp(1, N) - 1
    return torch.randperm(N, generator=source)[rank]


def coalesced(t: Tensor) -> Tensor:
    """Its gradient is made unique by rows before it arrives in .grad, as an optimiser needs it."""
    if t.requires_grad:
        t.register_hook(lambda g: g.coalesce())
    return t


def bag(N: int, d: int, zipf: bool, tokens: int = 4096, R: int = 32) -> Case:
    """Every provider with its sparse gradient."""
    ids = read(N, tokens, R, zipf)
    # The einsum moves all rows through the cache; whoever runs next pays for that, so neither of those two is compared with the other.
    providers = {
        "torch gather and einsum": lambda t, w: torch.einsum("tr,trd->td", w, F.embedding(ids, coalesced(t), sparse=True)),
        "ours without C++": lambda t, w: weighted_bag(t, ids, w, sparse_grad=True, impl="torch"),
        "torch embedding_bag and coalesce": lambda t, w: F.embedding_bag(ids, coalesced(t), per_sample_weights=w, mode="sum", sparse=True),
        "ours": lambda t, w: weighted_bag(t, ids, w, sparse_grad=True),
    }
    shape = f"N={N} d={d} tokens={tokens} R={R} {'Zipf' if zipf else 'uniform'} row-sparse gradient fp32"
    return Case("weighted_bag", shape, [table(N, d), draw(tokens, R)], providers)


def sizes(d: int = 64, tokens: int = 4096, R: int = 32) -> Case:
    """The same work on 4M and on 1M rows, and what a dense gradient costs."""
    many, few = 2**22, 2**20
    ids = {N: read(N, tokens, R, zipf=False) for N in (many, few)}
    providers = {
        "ours": lambda t, s, w: weighted_bag(t, ids[many], w, sparse_grad=True),
        "ours, 1M rows": lambda t, s, w: weighted_bag(s, ids[few], w, sparse_grad=True),
        "ours, dense gradient": lambda t, s, w: weighted_bag(t, ids[many], w),
        "torch embedding_bag, dense gradient": lambda t, s, w: F.embedding_bag(ids[many], t, per_sample_weights=w, mode="sum"),
    }
    return Case("weighted_bag", f"N=4M d={d} tokens={tokens} R={R} uniform fp32", [table(many, d), table(few, d), draw(tokens, R)], providers, same=False)


def grouped(N: int = 2**20, d: int = 256, E: int = 4, h: int = 2, tokens: int = 4096, R: int = 32) -> Case:
    """UltraMem's bag: a sum for each block of virtual rows, a weight for each core."""
    ids = read(N, tokens, R, zipf=False)
    groups = torch.randint(0, E, ids.shape, generator=torch.Generator().manual_seed(1))

    def by_masks(t: Tensor, w: Tensor) -> Tensor:
        rows = F.embedding(ids, coalesced(t), sparse=True).unflatten(-1, (h, d // h))
        return torch.einsum("trh,tre,trhd->tehd", w, F.one_hot(groups, E).to(w), rows).flatten(-2)

    providers = {
        "ours": lambda t, w: weighted_bag(t, ids, w, groups=groups, n_groups=E, sparse_grad=True),
        "ours without C++": lambda t, w: weighted_bag(t, ids, w, groups=groups, n_groups=E, sparse_grad=True, impl="torch"),
        "torch gather and einsum": by_masks,
    }
    return Case("weighted_bag", f"N={N} d={d} E={E} h={h} tokens={tokens} R={R} uniform row-sparse gradient fp32", [table(N, d), draw(tokens, R, h)], providers)


def full_grid(s1: Tensor, s2: Tensor, k: int) -> Tensor:
    """Axis top-k, then all k x k pairs with their ids, as the public implementations do it."""
    n = s1.shape[-1]
    (a, i), (b, j) = s1.topk(k), s2.topk(k)
    pairs, ids = (a[..., :, None] + b[..., None, :]).flatten(-2), (i[..., :, None] * n + j[..., None, :]).flatten(-2)
    scores, at = pairs.topk(k)
    ids.gather(-1, at)
    return scores


def topk(n: int, k: int, Q: int = 16384) -> Case:
    providers = {
        "ours": lambda a, b: product_key_topk(a, b, k)[0],
        "ours without C++": lambda a, b: product_key_topk(a, b, k, impl="torch")[0],
        "torch with the whole grid": lambda a, b: full_grid(a, b, k),
    }
    return Case("product_key_topk", f"queries={Q} n={n} k={k} fp32", [draw(Q, n), draw(Q, n, seed=1)], providers)


def tucker(n: int = 512, k: int = 32, r: int = 2, Q: int = 4096) -> Case:
    core = torch.rand(r, r, generator=torch.Generator().manual_seed(0))
    u, v = principal(core)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        i, j = (u @ a).topk(k).indices, (v @ b).topk(k).indices
        rows, columns = (x.gather(-1, at[:, None].expand(-1, r, -1)) for x, at in ((a, i), (b, j)))
        return (rows.mT @ core @ columns).flatten(-2).topk(k).values

    providers = {
        "ours": lambda a, b: tucker_topk(a, b, core, u, v, k)[0],
        "ours without C++": lambda a, b: tucker_topk(a, b, core, u, v, k, impl="torch")[0],
        "torch topk of a grid": plain,
    }
    return Case("tucker_topk", f"queries={Q} n={n} r={r} k={k} fp32", [draw(Q, r, n), draw(Q, r, n, seed=1)], providers)


def cases() -> Iterator[Case]:
    yield from (bag(2**20, 256, zipf) for zipf in (False, True))
    yield bag(2**16, 256, zipf=False)
    yield sizes()
    yield grouped()
    yield from (topk(256, k) for k in (1, 4, 16, 32))
    yield from (topk(1024, 32), topk(256, 128, Q=4096))
    yield tucker()
