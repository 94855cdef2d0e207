"""What is timed against what. A case makes its inputs once and offers the same computation by several providers; `ours` is the library's
choice on this machine, and the others are what a user could write or install in its place."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import fla, heads_first
from memarch.kernels.attention import attention
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.gated_linear import gated_linear
from memarch.kernels.short_conv import short_conv
from memarch.kernels.taylor_attention import taylor_attention
from memarch.layers import BasedConfig, GatedDeltaConfig, GLAConfig, Mamba2Config, MoMConfig


class Case(NamedTuple):
    op: str
    shape: str
    inputs: list[Tensor]  # floating ones are differentiated in mode fwd+bwd
    providers: dict[str, Callable[..., Tensor]]
    same: bool = True  # all providers compute the same; False: what is compared is the cost of different things
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    rounds: int | None = None  # instead of those asked for, where a provider takes minutes


Sized = Callable[[int], tuple[str, Callable[..., Any], list[Tensor]]]  # tokens -> shape, the call and its inputs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def delta_autograd(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, C: int = 64) -> Tensor:
    """The chunked gated delta rule as one writes it in plain torch: a triangular solve, a loop over chunks, gradients by autograd."""
    B, T, H, K = q.shape
    q, k, v = (x.movedim(1, 2).unflatten(2, (-1, C)) for x in (q, k, v))  # [B, H, N, C, .]
    beta, g = (x.movedim(1, 2).unflatten(2, (-1, C)) for x in (beta, g))
    G = g.cumsum(-1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(torch.ones(C, C, dtype=torch.bool).triu(1), -torch.inf).exp()
    L = (beta[..., None] * (k @ k.mT) * D).tril(-1)
    both = torch.cat([beta[..., None] * v, (beta * G.exp())[..., None] * k], -1)
    U, W = torch.linalg.solve_triangular(L + torch.eye(C), both, upper=False, unitriangular=True).split([v.shape[-1], K], -1)
    S, out = v.new_zeros(B, H, K, v.shape[-1]), []
    for n in range(T // C):
        u = U[:, :, n] - W[:, :, n] @ S
        decay = G[:, :, n, :, None].exp()
        out.append((q[:, :, n] * decay) @ S + ((q[:, :, n] @ k[:, :, n].mT) * D[:, :, n]) @ u)
        last = G[:, :, n, -1:, None]
        S = last.exp() * S + ((last - G[:, :, n, :, None]).exp() * k[:, :, n]).mT @ u
    return torch.stack(out, 2).flatten(2, 3).movedim(2, 1)


def vectors(T: int, B: int, H: int, D: int) -> tuple[str, Tensor, Tensor, Tensor]:
    """q and k of unit length, q scaled, and v."""
    q, k, v = (draw(B, T, H, D, seed=i) for i in range(3))
    return f"B={B} T={T} H={H} K=V={D} fp32", F.normalize(q, dim=-1) * D**-0.5, F.normalize(k, dim=-1), v


def gates(T: int, B: int, H: int) -> tuple[Tensor, Tensor]:
    return draw(B, T, H).sigmoid(), -F.softplus(draw(B, T, H, seed=1) - 4)


def delta(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    shape, *x = vectors(T, B, H, D)
    peer = fla("gated_delta_rule", "naive_chunk_gated_delta_rule", lambda f: lambda q, k, v, beta, g: f(q, k, v, g, beta, scale=1.0)[0])
    providers = {"ours": lambda *x: delta_rule(*x)[0], "torch autograd, chunk 64": delta_autograd, **peer}
    return Case("delta_rule", shape, [*x, *gates(T, B, H)], providers)


def delta_ungated(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    shape, *x = vectors(T, B, H, D)

    def chunkwise(f: Callable) -> Callable[..., Tensor]:
        return lambda q, k, v, beta: f(*heads_first(q * D**0.5, k, v, beta))[0].transpose(1, 2)

    peer = fla("delta_rule", "delta_rule_chunkwise", chunkwise)
    return Case("delta_rule", f"no decay {shape}", [*x, gates(T, B, H)[0]], {"ours": lambda q, k, v, beta: delta_rule(q, k, v, beta, None)[0], **peer})


def decay_only(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    shape, *x = vectors(T, B, H, D)
    peer = fla("simple_gla", "naive_chunk_simple_gla", lambda f: lambda *x: f(*x, scale=1.0)[0])
    return Case("delta_rule", f"no erasing {shape}", [*x, gates(T, B, H)[1]], {"ours": lambda q, k, v, g: delta_rule(q, k, v, None, g)[0], **peer})


def plain_linear(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    shape, *x = vectors(T, B, H, D)
    peer = fla("linear_attn", "naive_chunk_linear_attn", lambda f: lambda *x: f(*x, scale=1.0))
    return Case("delta_rule", f"linear attention {shape}", x, {"ours": lambda q, k, v: delta_rule(q, k, v, None, None)[0], **peer})


def vector_decay(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    shape, *x = vectors(T, B, H, D)
    peer = fla("gla", "naive_recurrent_gla", lambda f: lambda *x: f(*x)[0] * D**0.5)
    return Case("gated_linear", shape, [*x, -F.softplus(draw(B, T, H, D, seed=1) - 4)], {"ours": lambda *x: gated_linear(*x)[0], **peer})


def taylor(T: int, B: int = 2, H: int = 4, K: int = 16, D: int = 64) -> Case:
    q, k, v = draw(B, T, H, K), draw(B, T, H, K, seed=1), draw(B, T, H, D, seed=2)

    def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, total, _ = taylor_attention(q * K**-0.5, k, v)
        return o / total[..., None]

    peers = {}
    for name in ("naive_chunk_based", "naive_parallel_based"):
        peers |= fla("based", name, lambda f: lambda q, k, v: f(*heads_first(q, k, v)).transpose(1, 2))
    return Case("taylor_attention", f"B={B} T={T} H={H} F={K} V={D} fp32", [q, k, v], {"ours": divided, **peers})


def mixture(T: int, memories: int, shared: bool, B: int = 2, D: int = 256) -> Case:
    inner = GatedDeltaConfig(heads=4)
    layers = {
        "ours": MoMConfig(memories=memories, shared=shared, inner=inner),
        "one gated_delta layer": inner,
        **({"the same with 4 memories": MoMConfig(shared=shared, inner=inner)} if memories != 4 else {}),
    }
    built = {name: config.build(D) for name, config in layers.items()}
    shape = f"M={memories} k=2{' shared' * shared} B={B} T={T} D={D} H=4 fp32"
    return Case("mom layer", shape, [draw(B, T, D)], {name: lambda x, layer=layer: layer(x).y for name, layer in built.items()}, same=False)


def conv(B: int, T: int, D: int, W: int = 4) -> Case:
    def conv1d(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], groups=D).mT

    return Case("short_conv", f"B={B} T={T} D={D} W={W} fp32", [draw(B, T, D), draw(D, W)], {"ours": lambda x, w: short_conv(x, w)[0], "torch conv1d": conv1d})


def window(T: int, w: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    far = torch.arange(T)[:, None] - torch.arange(T)
    mask = (far >= 0) & (far < w)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.movedim(1, 2) for x in (q, k, v)), attn_mask=mask).movedim(2, 1)

    x = [draw(B, T, H, D, seed=i) for i in range(3)]
    return Case("attention", f"window={w} B={B} T={T} H={H} D={D} fp32", x, {"ours": lambda *x: attention(*x, window=w), "torch SDPA with a mask": masked})


def cases() -> Iterator[Case]:
    for T in (1024, 4096):
        yield from (case(T) for case in (delta, delta_ungated, decay_only, plain_linear, vector_decay, taylor))
        yield from (mixture(T, M, shared) for M, shared in ((4, True), (4, False), (16, False)))
    yield from (conv(*shape) for shape in ((2, 1024, 256), (2, 4096, 256), (4, 1024, 1024)))
    yield from (window(*shape) for shape in ((1024, 64), (4096, 64), (4096, 256)))


FIELDS: Any = ("date", "commit", "op", "mode", "shape", "provider", "ms", "ms_p20", "ms_p80", "times_ours", "runs", "threads", "device", "torch")


def scaling() -> dict[str, Sized]:
    """What is timed over growing lengths, by op."""

    def op(make: Callable[[int], Case]) -> Sized:
        def at(T: int) -> tuple[str, Callable[..., Any], list[Tensor]]:
            case = make(T)
            return case.shape.replace(f" T={T}", ""), case.providers["ours"], case.inputs

        return at

    return {
        "delta_rule": op(lambda T: delta(T, B=1)),
        "gated_linear": op(lambda T: vector_decay(T, B=1)),
        "taylor_attention": op(lambda T: taylor(T, B=1)),
        "mom layer": op(lambda T: mixture(T, 4, True, B=1)),
    }


def decoders() -> dict[str, Any]:
    """Layers whose time for one more token is taken after short and long contexts."""
    configs = (GatedDeltaConfig(heads=4), GLAConfig(heads=4), Mamba2Config(), BasedConfig(heads=4), MoMConfig(inner=GatedDeltaConfig(heads=4)))
    return {config.kind: config.build(256) for config in configs}
