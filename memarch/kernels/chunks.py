"""How the chunked implementations lay tokens out: [B, T, H, .] in pieces of C tokens, a group of chunks at a time as one batch of matrices.

B rows   T tokens   H heads   N chunks   C tokens in a chunk   n chunks in a group   X = B H
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 2048  # tokens (times heads) worked on at once: enough to amortise a call, few enough to stay in the cache


def groups(N: int, C: int, X: int) -> Iterator[slice]:
    n = max(1, GROUP // (C * X))
    return (slice(i, min(i + n, N)) for i in range(0, N, n))


def chunks(part: slice, X: int) -> Iterator[tuple[int, slice]]:
    """The number of every chunk in a group, and where its matrices lie."""
    return ((i, slice((i - part.start) * X, (i - part.start + 1) * X)) for i in range(part.start, part.stop))


def padded(T: int, *xs: Tensor | None) -> list[Any]:
    """[B, t, H, .] and [B, t, H] -> [B, T, H, .], filled with zeros, which is a token that changes nothing."""
    four = [x[..., None] if x is not None and x.ndim == 3 else x for x in xs]
    return [x if x is None or x.shape[1] == T else F.pad(x, (0, 0, 0, 0, 0, T - x.shape[1])) for x in four]


def view(x: Tensor, N: int, part: slice) -> Tensor:
    return x.unflatten(1, (N, -1))[:, part].permute(1, 0, 3, 2, 4)  # [n, B, H, C, .]


def cut(x: Tensor | None, N: int, part: slice, dtype: torch.dtype, lengths: Tensor | None = None) -> Any:
    """[B, N C, H, .] -> the chunks of `part` [n X, C, .], each matrix in one piece and in the working dtype; zeros at t >= lengths[b]."""
    if x is None:
        return None
    y = view(x, N, part)
    y = torch.empty(y.shape, dtype=dtype, device=x.device).copy_(y)
    if lengths is not None:
        n, _, _, C, _ = y.shape
        t = part.start * C + torch.arange(n * C, device=x.device).view(n, 1, 1, C, 1)
        y.masked_fill_(t >= lengths.view(1, -1, 1, 1, 1), 0)
    return y.flatten(0, 2)


def put(x: Tensor, N: int, part: slice, value: Tensor) -> None:
    """The reverse of `cut`: write chunks into [B, N C, H, .]."""
    B, _, H, _ = x.shape
    view(x, N, part).copy_(value.unflatten(0, (-1, B, H)))


def crop(x: Tensor, T: int) -> Tensor:
    return x if x.shape[1] == T else x[:, :T].clone()
