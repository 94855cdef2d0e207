"""The gated delta rule in chunks of C tokens, with its backward written by hand (Gated Delta Networks, arXiv 2412.06464, section 3.3).

Inside a chunk, with G the running sum of g, D_ij = e^{G_i - G_j} for i >= j and else 0, S the memory before the chunk:

    M = (1 + strictly_lower(beta K K^T o D))^-1          unit lower triangular, [C, C]
    R = V - e^G K S                                      what the memory does not answer yet
    U = M (beta R)                                       what is written, with the chunk's own erasures resolved; U = V without beta
    O = e^G Q S + (Q K^T o D) U
    S <- e^{G_C} S + (e^{G_C - G} K)^T U

Every exponent is <= 0, so nothing overflows however strong the decay is. M is kept for the backward: with dZ = M^T dU the gradient of the
inverse is -dZ U^T, and no second solve is needed. The gradient of G needs no [C, C] sums: every e^G multiplies q, the erasing k or the
writing k, so dG = q.dq + k.dk_erasing - k.dk_writing, without the diagonal of (Q K^T o D), where D is 1 whatever G is.

    B rows   T tokens   H heads   K key width   V value width   N chunks   C tokens of a chunk   X = B H matrices side by side
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
GROUP = 128  # [C, C] matrices worked on at once: enough to amortise a call, few enough to stay in the cache
LEAF = 16  # below this size a triangular solve beats splitting further


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    if lengths is not None:  # a token with k = 0 and g = 0 is a no-op, one with q = 0 answers 0
        pad = (torch.arange(q.shape[1], device=q.device) >= lengths[:, None])[:, :, None]  # [B, T, 1]
        q, k, v = (x.masked_fill(pad[..., None], 0) for x in (q, k, v))
        g = None if g is None else g.masked_fill(pad, 0)
    if q.shape[1] == 1:
        return step(q, k, v, beta, g, state)
    inputs = [x for x in (q, k, v, beta, g, state) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _forward(q, k, v, beta, g, state, save)[:2]


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself, with the memory read once, for key and query together."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q1, k1, v1 = (x[:, 0, :, None].to(dtype) for x in (q, k, v))  # [B, H, 1, K or V]
    b = None if beta is None else beta[:, 0, :, None, None].to(dtype)
    if state is None:
        u = v1 if b is None else b * v1
        S = k1.mT * u
        return (q1 @ S).movedim(2, 1).to(v.dtype), S
    S = state.to(dtype) if g is None else state.to(dtype) * g[:, 0, :, None, None].to(dtype).exp()
    told, read = (torch.cat([k1, q1], 2) @ S).split(1, 2)  # [B, H, 1, V] each
    u = v1 if b is None else b * (v1 - told)
    o = read + (q1 * k1).sum(-1, keepdim=True) * u
    return o.movedim(2, 1).to(v.dtype, memory_format=torch.contiguous_format), S + k1.mT * u


@torch.library.custom_op("memarch::delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, final state, and if `save` the memory before every chunk [N,X,K,V] and M [N,X,C,C]."""
    grid = Grid(q, v)
    S = grid.start(state)
    o = v.new_empty(grid.B, grid.N, grid.C, grid.H, grid.V)
    states = S.new_empty((grid.N, *S.shape) if save else (0,))
    inverse = S.new_empty((grid.N, S.shape[0], grid.C, grid.C) if save and beta is not None else (0,))
    for part in grid.parts():
        qc, kc, vc, bc = grid.cut(part, q, k, v, beta)
        A = qc @ kc.mT  # [n, X, C, C]
        D, grow, fade, last = grid.decay(part, g)
        A = A.mul_(D)
        if beta is not None:
            M = invert((kc @ kc.mT).mul_(D).mul_(bc))
            if save:
                inverse[part] = M
        if g is not None:
            qg, kg, kd = qc * grow, kc * grow, kc * fade
        else:
            qg, kg, kd = qc, kc, kc
        out = torch.empty_like(vc)
        for i in range(len(vc)):
            if save:
                states[part.start + i] = S
            u = vc[i]
            if beta is not None:
                u = M[i] @ torch.baddbmm(u, kg[i], S, alpha=-1).mul_(bc[i])
            torch.bmm(qg[i], S, out=out[i]).baddbmm_(A[i], u)
            S = torch.baddbmm(S if g is None else S * last[i], kd[i].mT, u)
        o[:, part] = grid.back(out)
    return grid.crop(o), S.view(grid.B, grid.H, grid.K, grid.V), states, inverse


class Grid:
    """How [B, T, H, .] lies as chunks [N, X, C, .]: padded to N C tokens, a slice of chunks at a time, in the working dtype."""

    def __init__(self, q: Tensor, v: Tensor):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.N = chunks(self.T)
        self.C = -(-self.T // self.N)  # chunks of even length: 65 tokens are 2 x 33, not 2 x 64
        self.dtype = torch.promote_types(v.dtype, torch.float32)

    def start(self, state: Tensor | None) -> Tensor:
        raise NotImplementedError
