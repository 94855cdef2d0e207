"""Where the tokens of a call lie on their rows' chunks: row b is `place[b]` tokens into its first chunk, and has `lengths[b]` to come.

B rows   T tokens   H heads   N chunks   C places in a chunk   X = B H
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.chunks import crop

Maybe = Tensor | None


class Grid(NamedTuple):
    T: int
    N: int
    C: int  # `chunk`, or less for a call that ends in its first chunk
    chunk: int
    t: Tensor  # [B or 1, N C]: the token at every place
    given: Maybe  # the same, True where there is one; None where there is everywhere
    real: Maybe  # and not one that is only learned once more
    ends: Maybe  # [B, 1]: places filled in the end; None for T of them
    aligned: bool  # place 0 everywhere

    def on(self, x: Maybe) -> Any:
        """[B, T, H, .] or [B, T, H] -> [B, N C, H, .], zero where no token is."""
        if x is None:
            return None
        x = x[..., None] if x.ndim == 3 else x
        if self.aligned:
            x = x if x.shape[1] == self.t.shape[1] else F.pad(x, (0, 0, 0, 0, 0, self.t.shape[1] - x.shape[1]))
        else:
            x = x[torch.arange(x.shape[0], device=x.device)[:, None], self.t.clamp(0, self.T - 1)]
        return x if self.given is None else x.masked_fill(~self.given[:, :, None, None], 0)

    def off(self, y: Tensor, where: Maybe) -> Tensor:
        """The way back, of what is `where`; zero for the rest, and for a token before the grid."""
        y = y if where is None else y.masked_fill(~where[:, :, None, None], 0)
        if self.aligned:
            return crop(y, self.T)
        place = torch.arange(self.T, device=y.device) - self.t[:, :1]
        return y[torch.arange(y.shape[0], device=y.device)[:, None], place.clamp(min=0)].masked_fill((place < 0)[:, :, None, None], 0)

    def done(self, chunks: int, H: int) -> Any:
        """Which rows have come to the end of so many chunks: [X, 1, 1], or one answer for all."""
        if self.ends is None:
            return chunks * self.chunk <= self.T
        return (self.ends >= chunks * self.chunk)[:, :, None].expand(-1, H, 1).reshape(-1, 1, 1)


def size(T: int, chunk: int, placed: bool) -> tuple[int, int]:
    """How many chunks, and how long."""
    return ((T + 2 * chunk - 2) // chunk, chunk) if placed else ((T + chunk - 1) // chunk, min(chunk, T))


def grid(like: Tensor, chunk: int, place: Maybe, lengths: Maybe, again: int) -> Grid:
    """like [B, T, ...]. place [B] is that of the first token, None for 0 in every row; it is negative for a token of the chunk before, which is left
    out. The first `again` tokens are only learned once more."""
    B, T = like.shape[:2]
    N, C = size(T, chunk, place is not None)
    t = torch.arange(N * C, device=like.device)[None]
    if place is None and lengths is None:
        given = None if N * C == T else t < T
        return Grid(T, N, C, chunk, t, given, given, None, True)
    many = torch.full((B,), T, device=like.device) if lengths is None else lengths.clamp(max=T)
    first = torch.zeros_like(many) if place is None else place
    t = t - first[:, None]
    given = (t >= 0) & (t < many[:, None])
    return Grid(T, N, C, chunk, t, given, given & (t >= again), (first + many)[:, None], place is None)
