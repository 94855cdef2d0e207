"""The sparse-lookup ops, layers and training steps against what a user could write with torch or install. `ours` is what runs here: C++ once
`memarch warmup` has built it.

`python -m benchmarks.memory_cases` says how much memory a training step of a large table takes, by optimiser."""

import itertools
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.cases import Case, draw
from memarch.kernels.product_key_topk import product_key_topk
from memarch.kernels.tucker_topk import principal, tucker_topk
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers import PEERConfig, PKMConfig, ValuePool
from memarch.optim import OptimConfig, build, clip


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


class Step:
    """As a provider: the forward of a bag; if the weights want a gradient, the whole training step of its table, on other rows every time.
    All share one table of values; moments are made at the first step."""

    def __init__(self, name: str, N: int, d: int, tokens: int, R: int):
        self.name, self.N, self.d = name, N, d
        source = torch.Generator().manual_seed(0)
        self.ids = itertools.cycle([torch.randint(0, N, (tokens, R), generator=source) for _ in range(8)])

    def prepare(self) -> None:
        with torch.device("meta"):
            self.pool = ValuePool(self.N, self.d)
        self.pool.table = nn.Parameter(table(self.N, self.d))
        if self.name == "SparseAdam":
            self.optimizer: torch.optim.Optimizer = torch.optim.SparseAdam([{"name": "tables", "params": [self.pool.table]}], lr=1e-3)
            self.pool.sparse_grad = True
        else:
            self.optimizer, _ = build(self.pool, OptimConfig(schedule="constant", tables=self.name), None)  # type: ignore[arg-type]

    def __call__(self, weights: Tensor) -> Tensor:
        if not hasattr(self, "pool"):
            self.prepare()
        ids = next(self.ids)
        y = weighted_bag(self.pool.table, ids, weights, sparse_grad=self.pool.sparse_grad)
        if not weights.requires_grad:
            return y
        y.square().sum().backward()
        clip(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return weights[:0].sum()


STEPS = {"ours": "lazy", "ours, one second moment a row": "row", "ours, dense AdamW": "dense", "torch SparseAdam": "SparseAdam"}


def step(N: int = 2**22, d: int = 64, tokens: int = 4096, R: int = 32) -> Case:
    shape = f"N=4M d={d} tokens={tokens} R={R} uniform, fwd+bwd: the whole step fp32"
    return Case("table training step", shape, [draw(tokens, R)], {who: Step(name, N, d, tokens, R) for who, name in STEPS.items()}, same=False)


def trained(build: peers.Build) -> Callable[[Tensor], Tensor]:
    """A layer as its optimiser finds it, without gradients; made at its first call, for tables are large."""
    made = cache(build)

    def call(x: Tensor) -> Tensor:
        made().zero_grad()
        y = made()(x)
        return y if isinstance(y, Tensor) else y[0]

    return call


def sparse(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, ValuePool):
            module.sparse_grad = True
    return layer


def peer(D: int = 256, n: int = 256, H: int = 8, k: int = 16, tokens: int = 2048) -> Case:
    config = PEERConfig(keys=n, heads=H, topk=k, query_dim=D, query_norm="none", keys_per_head=True)
    ours = cache(lambda: sparse(config.build(D)))
    providers = {name: trained(build) for name, build in {"ours": ours, **peers.peer(ours)}.items()}
    return Case("peer layer", f"experts={n}^2 D={D} H={H} k={k} tokens={tokens} fp32", [draw(1, tokens, D)], providers)


def pkm(D: int = 256, n: int = 1024, H: int = 4, k: int = 32, tokens: int = 2048) -> Case:
    config = PKMConfig(keys=n, heads=H, topk=k, query_dim=D, query_norm="none")
    ours = cache(lambda: sparse(config.build(D)))
    providers = {name: trained(build) for name, build in {"ours": ours, **peers.pkm(ours)}.items()}
    return Case("pkm layer", f"rows={n}^2 D={D} H={H} k={k} tokens={tokens} fp32", [draw(1, tokens, D)], providers)


def cases() -> Iterator[Case]:
    yield from (bag(2**20, 256, zipf) for zipf in (False, True))
    yield bag(2**16, 256, zipf=False)
    yield sizes()
    yield grouped()
    yield from (topk(256, k) for k in (1, 4, 16, 32))
    yield from (topk(1024, 32), topk(256, 128, Q=4096))
    yield tucker()
    yield peer()
    yield pkm()
    yield step()


def main() -> None:
    """The most a process holds during three training steps, each optimiser in a process of its own; the table itself is 1 GiB of it."""
    for who, name in STEPS.items():
        code = f"from benchmarks.memory_cases import peak; print(peak({name!r}))"
        print(f"{who:32}{subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()} GiB")


def peak(name: str, N: int = 2**22, d: int = 64, tokens: int = 4096, R: int = 32) -> str:
    call, weights = Step(name, N, d, tokens, R), draw(tokens, R).requires_grad_()
    for _ in range(3):
        call(weights)
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"


if __name__ == "__main__":
    main()
