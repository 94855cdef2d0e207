"""Notes of a stream: every window of tokens leaves one when it closes, a pool of bounded size keeps some of them, and tokens read the pool as it was
when their own window began.

Who is in the pool depends on scores alone, which are known before anything is read. So all windows are judged at once. A block of tokens shares one list
of candidates, the pool at the block's beginning and the windows that close inside it, and which of them a token sees is counted: a note is gone when
K better ones have closed. Time and memory are linear in T.

    B rows   T tokens   G windows of a call   K notes of the pool   N = K + G   n tokens of a block   P candidates of a block   r width of a note
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memarch.kernels.autocast import exact
from memarch.layers.parts.linear import Linear, uniform_

BLOCK = 512  # tokens of a block: with more of them there are more candidates, with fewer the pool is read anew more often


class Pool(NamedTuple):
    """What the tokens of one call see of one layer's notes."""

    s: Tensor  # [B, blocks, P, r]
    e: Tensor  # [B, blocks, P] their scores
    seen: Tensor  # [B, blocks, n, P] bool; the last block may be longer than what is left of T


class Kept(NamedTuple):
    """The pool that a call leaves, by window."""

    s: Tensor  # [B, K, r]
    e: Tensor  # [B, K]
    window: Tensor  # [B, K] int64; empty slots are -1 and stand last


def peaks(x: Tensor, left: Tensor, size: int, place: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima over the windows of x [B, T, D] -> of those that close [B, G, D], 0 where one does not, and of the open one [B, D], 0 when it has no token.
    `left` [B, D] is the open one's so far, and `place` [B] how many tokens it has, None when no row has one and every token is real; `count` [B] are."""
    T = x.shape[1]
    x = x.to(left.dtype)
    if place is None:
        whole = T // size
        closed, rest = x.split([whole * size, T - whole * size], 1)
        return closed.unflatten(1, (whole, size)).amax(2), rest.amax(1) if rest.shape[1] else torch.zeros_like(left)
    if T == 1:  # it is in the open window, which may close with it
        top = torch.where(place[:, None] > 0, torch.maximum(x[:, 0], left), x[:, 0])
        top = torch.where(count[:, None] > 0, top, left)
        shut = (place + count == size)[:, None]
        return torch.where(shut, top, 0)[:, None], torch.where(shut, 0, top)
    begin = size * torch.arange((2 * size - 2 + T) // size, device=x.device) - place[:, None]  # [B, G] each window's first token, before 0 if it is past
    at = begin.clamp(min=0)[..., None] + torch.arange(min(size, T), device=x.device)  # [B, G, w]
    real = at < torch.minimum(begin + size, count[:, None])[..., None]
    rows = x.gather(1, at.clamp(max=T - 1).flatten(1)[..., None].expand(-1, -1, x.shape[2])).unflatten(1, at.shape[1:])
    top = rows.masked_fill(~real[..., None], -torch.inf).amax(2)  # [B, G, D]
    first = torch.where(place[:, None] > 0, torch.maximum(top[:, 0], left), top[:, 0])
    top = torch.cat([first[:, None], top[:, 1:]], 1)
    done, more = (place + count) // size, (place + count) % size
    last = top.gather(1, done.clamp(max=top.shape[1] - 1)[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
    shut = torch.arange(top.shape[1], device=x.device) < done[:, None]
    return torch.where(shut[..., None], top, 0), torch.where(more[:, None] > 0, last, 0)


def unchanged(kept: Kept) -> Pool:
    """What one token sees that closes no note."""
    return Pool(kept.s[:, None], kept.e[:, None], (kept.window >= 0)[:, None, None])


def collect(s: Tensor, e: Tensor, accepted: Tensor, kept: Kept, pos: Tensor, T: int, size: int, policy: Literal["priority", "fifo"]) -> tuple[Pool, Kept]:
    """s [B, G, r], e [B, G] >= 0 and accepted [B, G] of the windows from pos // size on, where pos [B] counts the tokens before these T."""
    (B, K), (G, device) = kept.window.shape, (e.shape[1], e.device)
    N, blocks = K + G, -(-T // BLOCK)
    n = -(-T // blocks)
    window = torch.cat([kept.window, (pos // size)[:, None] + torch.arange(G, device=device)], 1)  # [B, N]
    s, e = torch.cat([kept.s, s], 1), torch.cat([kept.e, e], 1)
    accepted = torch.cat([kept.window >= 0, accepted], 1)

    # A candidate is known by its rank, 0 the best; what is not accepted has rank N, and so has "none". Among equal scores the earlier one is better.
    order = (e.detach() if policy == "priority" else window).masked_fill(~accepted, -1).argsort(dim=1, descending=True, stable=True)
    rank = F.pad(order.argsort(1).masked_fill(~accepted, N), (0, 1), value=N)  # [B, N + 1]
    order = F.pad(order, (0, 1), value=N)

    now = (pos % size)[:, None] + torch.arange(blocks * n, device=device)
    now = (now // size).unflatten(1, (blocks, n))  # [B, blocks, n] the window of a token, counted from the first of this call
    after = torch.cat([now[:, 1:, 0], ((pos % size + blocks * n) // size)[:, None]], 1)  # [B, blocks] the window of the next block's first token
    new = now[:, :, :1] + torch.arange(-(-n // size), device=device)  # [B, blocks, M] those that close before it
    new = rank.gather(1, (K + new).clamp(max=N).flatten(1)).view_as(new).masked_fill(new >= after[..., None], N)
    best = [rank[:, :K]]
    for i in range(blocks):
        best.append(torch.cat([best[-1], new[:, i]], 1).topk(K, largest=False).values)
    ranks = torch.cat([torch.stack(best[:-1], 1), new], 2)  # [B, blocks, P]
    at = order.gather(1, ranks.flatten(1)).view_as(ranks)
    closed = ((at - K)[:, :, None] < now[..., None]) & (ranks < N)[:, :, None]  # [B, blocks, n, P]
    seen = closed & (_beaten(closed, ranks) < K)

    def take(x: Tensor, index: Tensor) -> Tensor:
        """Rows of x [B, N, ..], zeros where there is none."""
        x = torch.cat([x, x.new_zeros(B, 1, *x.shape[2:])], 1)
        wide = index.flatten(1).view(B, -1, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, wide).unflatten(1, index.shape[1:])

    stay = order.gather(1, best[-1]).sort(1).values  # [B, K] by window, since candidates are
    return Pool(take(s, at), take(e, at), seen), Kept(take(s, stay), take(e, stay), take(window + 1, stay) - 1)


@exact
def _beaten(closed: Tensor, ranks: Tensor) -> Tensor:
    """How many better ones have closed, for every token and candidate [B, blocks, n, P]."""
    better = ranks[..., :, None] < ranks[..., None, :]
    return closed.float() @ better.float()


class Recall(nn.Module):
    """What tokens read of the notes they see, by attention with a slot of logit 0 and value 0 beside them: who sees nothing reads exactly nothing.

        o_t = alpha * W_o [f_t sum_i softmax_i(q_t . k_i / sqrt(width) + log e_i) v_i]      q = W_q x_t   k_i = W_k s_i (+ distance)   v_i = W_v s_i

    `layers`: of how many layers below at most, the nearest first; each has a learned vector on its keys."""

    def __init__(self, dim: int, note: int, width: int, heads: int, layers: int = 0):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, width)
        self.k = Linear(note, width)
        self.v = Linear(note, width)
        self.out = Linear(width, dim)
        self.alpha = nn.Parameter(torch.empty(dim))
        self.distance = nn.Parameter(torch.empty(layers, width)) if layers else None

    @staticmethod
    def num_params(dim: int, note: int, width: int, layers: int = 0) -> int:
        return 2 * (dim + note) * width + dim + layers * width

    def init_(self, depth: int, alpha: float, generator: torch.Generator) -> None:
        for linear in (self.q, self.k, self.v, self.out):
            plain_(linear, generator)
        self.out.weight.div_(depth**0.5)
        self.alpha.fill_(alpha)
        if self.distance is not None:
            self.distance.zero_()

    def forward(self, x: Tensor, pools: Sequence[Pool], gate: Tensor | None = None) -> Tensor:
        """x [B, T, D], gate [B, T] -> [B, T, D]."""
        T, (_, blocks, n, _) = x.shape[1], pools[0].seen.shape
        s, e, seen = (torch.cat(parts, dim) if len(pools) > 1 else parts[0] for parts, dim in zip(zip(*pools, strict=True), (2, 2, 3), strict=True))
        distance = None
        if self.distance is not None:
            distance = torch.cat([d.expand(pool.e.shape[2], -1) for pool, d in zip(pools, self.distance, strict=False)])  # [P, A]
        if T == 1:
            o = _attend_once(self.q(x), self.k.weight, self.v.weight, s[:, 0], e[:, 0], seen[:, 0, 0], distance, self.heads)
        else:
            s = s.to(self.k.weight.dtype)
            k, v = self.k(s), self.v(s)  # [B, blocks, P, A]
            k = k if distance is None else k + distance
            q = F.pad(self.q(x), (0, 0, 0, blocks * n - T)).unflatten(1, (blocks, n))
            o = _attend(*(part.unflatten(-1, (self.heads, -1)) for part in (q, k, v)), e, seen)  # [B, blocks, n, A]
            o = o.flatten(1, 2)[:, :T]
        if gate is not None:
            o = o * gate[..., None]
        return self.alpha * self.out(o.to(self.out.weight.dtype))


@exact
def _attend(q: Tensor, k: Tensor, v: Tensor, e: Tensor, seen: Tensor) -> Tensor:
    """In float32 also under autocast. q [B, blocks, n, H, width], k and v [B, blocks, P, H, width] -> [B, blocks, n, H width]."""
    k, v = (F.pad(part, (0, 0, 0, 0, 1, 0)) for part in (k, v))  # the slot that is always there
    q, k, v = (part.to(torch.promote_types(q.dtype, torch.float32)).transpose(2, 3) for part in (q, k, v))
    bias = torch.where(seen, torch.where(e > 0, e, 1).log()[:, :, None], -torch.inf)  # [B, blocks, n, P]
    logits = q @ k.mT * q.shape[-1] ** -0.5 + F.pad(bias, (1, 0))[:, :, None]
    return (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)


@exact
def _attend_once(q: Tensor, key: Tensor, value: Tensor, s: Tensor, e: Tensor, seen: Tensor, distance: Tensor | None, heads: int) -> Tensor:
    """The same for one token: q . W s is (q W) . s, which maps one query instead of all notes. q [B, 1, A], key and value [A, r], s [B, P, r], e and
    seen [B, P], distance [P, A] -> [B, 1, A]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    key, value = (weight.to(dtype).unflatten(0, (heads, -1)) for weight in (key, value))  # [H, width, r]
    q, s = q.to(dtype).squeeze(1).unflatten(1, (heads, -1)).transpose(0, 1) * key.shape[1] ** -0.5, s.to(dtype)  # [H, B, width]
    logits = (q @ key).transpose(0, 1) @ s.mT  # [B, H, P]
    if distance is not None:
        logits = logits + (q @ distance.to(dtype).unflatten(-1, (heads, -1)).permute(1, 2, 0)).transpose(0, 1)
    bias = torch.where(seen, torch.where(e > 0, e, 1).log(), -torch.inf)
    read = F.pad(logits + bias[:, None], (1, 0)).softmax(-1)[..., 1:] @ s  # [B, H, r]; the slot that is always there adds nothing
    return (read.transpose(0, 1) @ value.mT).transpose(0, 1).flatten(1)[:, None]


def plain_(linear: Any, generator: torch.Generator) -> None:
    """torch's own init, as Mamba's linear maps have it; no bias."""
    uniform_(linear.weight, linear.in_features, generator)
    if linear.bias is not None:
        linear.bias.zero_()
