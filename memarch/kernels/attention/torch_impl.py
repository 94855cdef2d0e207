"""Banded causal softmax attention over `scaled_dot_product_attention`.

Without a window (or with fewer tokens than it spans) one call with a mask. With a window the first queries, which may see history and
sinks that are not there yet, go that way; the others are cut into blocks of c, and each block sees itself and the m blocks before it
(m c >= window), all blocks in one call: the cost is linear in T, and the mask [c, (m+1) c] is the same for all of them.

    B rows   T queries   S keys   H query heads   G key heads   D key width   V value width   P sinks   N blocks of c tokens
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # a wider window is covered by two blocks of half its width: 1.5 w keys for a query instead of 2 w
ROWS = 1024  # queries under one mask: a mask of [T, S] is never built for a long sequence

Sink = tuple[Tensor, Tensor] | None


def attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, window: int | None, sink: Sink, slopes: Tensor | None, scale: float) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    P = 0 if sink is None else sink[0].shape[1]
    if sink is not None and pos is None:
        pos = torch.full((q.shape[0],), S - T, device=q.device)  # every row of k is real
    if window is not None and T + window <= S:  # history nobody sees
        k, v = k[:, S - T - window + 1 :], v[:, S - T - window + 1 :]
        S = T + window - 1
    if S == T and sink is None:
        pos = None  # the queries' own rows are always real
    if window is None or window >= S:
        return masked(q, k, v, pos, None, sink, slopes, scale)
    c, m = blocks(window)
    head = -(-max(m * c, P + window) // c) * c  # from here on a query sees no history, no row that a sink replaces, and every sink
    if T - head < c:
        return masked(q, k, v, pos, window, sink, slopes, scale)
    own = S - T
    first = masked(q[:, :head], k[:, : own + head], v[:, : own + head], pos, window, sink, slopes, scale)
    at = None if pos is None else pos + head
    k, v = k[:, own + head - m * c :], v[:, own + head - m * c :]
    return torch.cat([first, banded(q[:, head:], k, v, at, window, sink, slopes, scale)], 1)


def blocks(window: int) -> tuple[int, int]:
    """The block length c and the number m of earlier blocks that cover the window."""
    m = 1 if window <= BLOCK else 2
    return max(BLOCK // 2, -(-window // (16 * m)) * 16), m


def masked(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, window: int | None, sink: Sink, slopes: Tensor | None, scale: float) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    if pos is None and window is None and slopes is None and (T == S or T == 1):
        return sdpa(q, k, v, None, scale, causal=T > 1)
    if T > ROWS:
        outs = []
        for t in range(0, T, ROWS):
            end, at = min(t + ROWS, T), None if pos is None else pos + t
            outs.append(attention(q[:, t:end], k[:, : S - T + end], v[:, : S - T + end], at, window, sink, slopes, scale))
        return torch.cat(outs, 1)
    j = torch.arange(S, device=q.device)
    far = torch.arange(S - T, S, device=q.device)[:, None] - j  # [T, S] how far back a key lies
    seen = far >= 0 if window is None else (far >= 0) & (far < window)
    if pos is not None:
        P = 0 if sink is None else sink[0].shape[1]
        seen = seen & (j >= S - T + P - pos[:, None])[:, None]  # [B, T, S] real, and not a sink
        if sink is not None:
            k, v, (seen, far) = torch.cat([sink[0], k], 1), torch.cat([sink[1], v], 1), with_sinks(seen, far, pos, P)
    return sdpa(q, k, v, bias(seen, far, slopes, q.dtype), scale)


def banded(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, window: int, sink: Sink, slopes: Tensor | None, scale: float) -> Tensor:
    """The queries q with the m c keys before them; query 0 stands at pos and sees every sink."""
    B, T, (c, m) = q.shape[0], q.shape[1], blocks(window)
    N = -(-T // c)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, N * c - T)) for x in (q, k, v))
    q = q.unflatten(1, (N, c)).flatten(0, 1)  # [B N, c, H, D]
    k, v = (x.unflatten(1, (N + m, c)) for x in (k, v))
    k, v = (torch.cat([x[:, i : i + N] for i in range(m + 1)], 2) for x in (k, v))  # [B, N, (m+1) c, G, D or V]
    far = torch.arange(m * c, (m + 1) * c, device=q.device)[:, None] - torch.arange((m + 1) * c, device=q.device)
    seen = (far >= 0) & (far < window)
    if sink is not None:
        k, v = (torch.cat([s[:, None].expand(-1, N, -1, -1, -1), x], 2) for s, x in zip(sink, (k, v), strict=True))
        P = sink[0].shape[1]
        if slopes is None:
            seen = F.pad(seen, (P, 0), value=True)
        else:  # the distance to a sink differs from block to block
            assert pos is not None
            at = pos[:, None] + c * torch.arange(N, device=q.device)
            seen, far = with_sinks(seen[None], far, at.flatten(), P)
    o = sdpa(q, k.flatten(0, 1), v.flatten(0, 1), bias(seen, far, slopes, q.dtype), scale)
    return o.unflatten(0, (B, N)).flatten(1, 2)[:, :T]


def with_sinks(seen: Tensor, far: Tensor, pos: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """The mask [B or 1, T, S] and the distances [T, S] with P sinks in front: both [B, T, P+S]."""
    B, (T, S) = len(pos), far.shape
    back = (pos[:, None] + torch.arange(T, device=pos.device))[..., None] - torch.arange(P, device=pos.device)  # [B, T, P]
    return torch.cat([back >= 0, seen.expand(B, T, S)], 2), torch.cat([back, far.expand(B, T, S)], 2)


def bias(seen: Tensor, far: Tensor, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mask [B or 1, H or 1, T, S]: booleans, or ALiBi's numbers with -inf where nothing is seen."""
    seen, far = (x[None, None] if x.ndim == 2 else x[:, None] for x in (seen, far))
    if slopes is None:
        return seen
    exact = torch.promote_types(dtype, torch.float32)
    numbers = (-slopes.to(exact)[:, None, None] * far).masked_fill(~seen, -torch.inf)
    return numbers.to(dtype) if numbers.is_cuda else numbers  # the kernels for CUDA want the mask in q's dtype, the CPU's takes float32 too


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """q [B,T,H,D], k [B,S,G,D], v [B,S,G,V] -> [B,T,H,V]; query head h reads key head h // (H/G)."""
    (B, T, H, D), G = q.shape, k.shape[2]
    if T == 1 and G < H:  # one query: the heads of a group are queries of one head, and no key is repeated
        if mask is not None and mask.shape[1] == H:
            mask = mask.view(-1, G, H // G, mask.shape[-1])
        q = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale).reshape(B, 1, H, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=G < H).transpose(1, 2)
