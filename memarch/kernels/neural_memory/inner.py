"""The arithmetic of one memory, rows of tokens at a time: what it answers, the gradient of its loss 1/2 |answer - v|^2, and the derivatives of both.

    x_1 = k    z_l = x_l W_l    x_{l+1} = phi(z_l)    answer = post(z_L, k)

    d_L = d loss / d z_L        none: z - v    res: k + z - v    rms, ln: J (g (k + g zh + b - v))
    d_l = (d_{l+1} W_{l+1}^T) phi'(z_l)                    and  x_l^T d_l is the gradient of W_l

zh = r (z - mean z) with r = 1 / sqrt(var z + eps) is the normalised z (rms: without the mean), and J = dzh/dz, which is symmetric:

    J w = r (w - mean w - zh mean(w zh))

Its own derivative is needed once, for the outer gradient through d_L = J e:

    d(t.J e)/dz = -J (r (t mean(e zh) + e mean(t zh))) - r zh mean(t . J e)
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
TINY = 1e-30  # keeps 0 / 0 away from tokens of zeros

Maybe = Tensor | None


class Net(NamedTuple):
    """What all layers and tokens share."""

    activation: str
    post: str
    gain: Maybe  # [..., 1, V], to be broadcast over rows
    bias: Maybe
    clip: float | None

    def normal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """-> zh, r"""
        if self.post == "ln":
            z = z - z.mean(-1, keepdim=True)
        r = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return z * r, r

    def J(self, w: Tensor, zh: Tensor, r: Tensor) -> Tensor:
        w = w - zh * (w * zh).mean(-1, keepdim=True)
        return r * (w - w.mean(-1, keepdim=True) if self.post == "ln" else w)

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.gain is None else x * self.gain

    def answer(self, z: Tensor, k: Tensor) -> Tensor:
        if self.post == "none":
            return z
        if self.post != "res":
            z = self.scaled(self.normal(z)[0])
        return k + z if self.bias is None else k + z + self.bias

    def error(self, z: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """d_L"""
        miss = self.answer(z, k) - v
        return miss if self.post in ("none", "res") else self.J(self.scaled(miss), *self.normal(z))

    def answer_back(self, z: Tensor, dy: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """-> the gradients of z, k, gain and bias, those of the last two by rows; None where there is none"""
        if self.post in ("none", "res"):
            return dy, None if self.post == "none" else dy, None, None
        zh, r = self.normal(z)
        return self.J(self.scaled(dy), zh, r), dy, dy * zh, dy

    def error_back(self, z: Tensor, k: Tensor, v: Tensor, dd: Tensor) -> tuple[Tensor, Any, Tensor, Any, Any]:
        """-> the gradients of z, k, v, gain and bias, likewise"""
        if self.post in ("none", "res"):
            return dd, None if self.post == "none" else dd, -dd, None, None
        zh, r = self.normal(z)
        miss = self.answer(z, k) - v
        e, de = self.scaled(miss), self.J(dd, zh, r)
        dmiss = self.scaled(de)
        crossed = r * (dd * (e * zh).mean(-1, keepdim=True) + e * (dd * zh).mean(-1, keepdim=True))
        dz = self.J(self.scaled(dmiss) - crossed, zh, r) - r * zh * (de * e).mean(-1, keepdim=True)
        return dz, dmiss, -dmiss, de * miss + dmiss * zh, dmiss


def curve(x: Tensor, kind: str, order: int) -> list[Tensor]:
    """phi and its first `order` derivatives, up to two"""
    if order == 0:
        return [F.gelu(x) if kind == "gelu" else F.silu(x)]
    if kind == "gelu":
        below = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
        bell = torch.exp(-0.5 * x * x - 0.5 * math.log(2 * math.pi))
        return [x * below, torch.addcmul(below, x, bell), bell * (2 - x * x)][: order + 1]
    s = torch.sigmoid(x)
    rest = 1 - s
    return [x * s, s * (1 + x * rest), s * rest * (2 + x * (rest - s))][: order + 1]


def fed(x: Tensor, W: Tensor) -> Tensor:
    """x, with a column of ones for the bias if W has a row for it."""
    return F.pad(x, (0, 1), value=1.0) if W.shape[-2] == x.shape[-1] + 1 else x


def answer(weights: list[Tensor], q: Tensor, net: Net) -> Tensor:
    z = fed(q, weights[0]) @ weights[0]
    for W in weights[1:]:
        z = fed(curve(z, net.activation, 0)[0], W) @ W
    return net.answer(z, q)


class Write(NamedTuple):
    """The rank-one gradients of every token, x^T d, and what they were made of. By layer; the last two without the last layer."""

    x: list[Tensor]  # [..., C, in]
    d: list[Tensor]  # [..., C, out]
    z: list[Tensor]
    curves: list[list[Tensor]]  # of z
    e: list[Tensor]  # d = e phi'(z)


def gradient(weights: list[Tensor], k: Tensor, v: Tensor, net: Net, order: int = 1) -> Write:
    x, z = [fed(k, weights[0])], []
    e: list[Tensor] = []
    curves: list[list[Tensor]] = []
    for W, after in zip(weights, [*weights[1:], None], strict=True):
        z.append(x[-1] @ W)
        if after is not None:
            curves.append(curve(z[-1], net.activation, order))
            x.append(fed(curves[-1][0], after))
    d = [net.error(z[-1], k, v)]
    for W, (_, slope, *_) in zip(weights[:0:-1], curves[::-1], strict=True):
        e.insert(0, d[0] @ W[..., : slope.shape[-1], :].mT)
        d.insert(0, e[0] * slope)
    return Write(x, d, z, curves, e)


def clipped(x: Tensor, d: Tensor, clip: float | None) -> Tensor:
    """d, made so short that no token's gradient |x| |d| is longer than `clip`."""
    if clip is None:
        return d
    return d * (clip / (length(x) * length(d)).clamp(min=clip))


def clipped_back(x: Tensor, d: Tensor, clip: float, du: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and d: what is clipped does not depend on either's length."""
    size = length(x) * length(d)
    scale = clip / size.clamp(min=clip)
    lost = (scale * (du * d).sum(-1, keepdim=True)).masked_fill(size <= clip, 0)
    return -lost * x / x.square().sum(-1, keepdim=True).clamp(min=TINY), scale * du - lost * d / d.square().sum(-1, keepdim=True).clamp(min=TINY)


def length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
