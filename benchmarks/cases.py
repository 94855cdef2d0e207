"""What is timed against what. A case makes its inputs once and offers the same computation by several providers; `ours` is the library's
choice on this machine, and the others are what a user could write or install in its place."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memarch.kernels.attention import attention
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.short_conv import short_conv
from memarch.kernels.weighted_bag import weighted_bag


class Case(NamedTuple):
    op: str
    shape: str
    inputs: list[Tensor]  # floating ones are differentiated in mode fwd+bwd
    providers: dict[str, Callable[..., Tensor]]


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


def delta(T: int, B: int = 2, H: int = 4, D: int = 64) -> Case:
    q, k, v = (draw(B, T, H, D, seed=i) for i in range(3))
    beta, g = draw(B, T, H).sigmoid(), -F.softplus(draw(B, T, H, seed=1) - 4)
    return Case(
        "delta_rule",
        f"B={B} T={T} H={H} K=V={D} fp32",
        [F.normalize(q, dim=-1) * D**-0.5, F.normalize(k, dim=-1), v, beta, g],
        {"ours": lambda *x: delta_rule(*x)[0], "torch autograd, chunk 64": delta_autograd},
    )


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


def bag(N: int, d: int, tokens: int = 4096, R: int = 32) -> Case:
    ids = torch.randint(0, N, (tokens, R), generator=torch.Generator().manual_seed(0))
    return Case(
        "weighted_bag",
        f"N={N} d={d} tokens={tokens} R={R} uniform fp32",
        [draw(N, d), draw(tokens, R)],
        {"ours": lambda t, w: weighted_bag(t, ids, w), "torch gather and einsum": lambda t, w: torch.einsum("tr,trd->td", w, t[ids])},
    )


def cases() -> Iterator[Case]:
    yield from (delta(T) for T in (1024, 4096))
    yield from (conv(*shape) for shape in ((2, 1024, 256), (2, 4096, 256), (4, 1024, 1024)))
    yield from (window(*shape) for shape in ((1024, 64), (4096, 64), (4096, 256)))
    yield from (bag(*shape) for shape in ((65536, 256),))


FIELDS: Any = ("date", "commit", "op", "mode", "shape", "provider", "ms", "ms_p20", "ms_p80", "times_ours", "runs", "threads", "device", "torch")
