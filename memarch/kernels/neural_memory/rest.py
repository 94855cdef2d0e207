"""A memory at rest: what it answers, and how hard a token would push it. Nothing is written.

B rows   T tokens   H heads   K width of keys   V width of values
"""

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.neural_memory.inner import Net, answer, gradient, length
from memarch.kernels.neural_memory.memory import Memory


@exact
def read(q: Tensor, weights: tuple[Tensor, ...], memory: Memory) -> Tensor:
    """M(q): q [B,T,H,K], weights [B,H,in,out] by layer -> [B,T,H,V], in the dtype of the weights"""
    return answer(list(weights), _rows(q, weights), _net(weights, memory)).transpose(1, 2)


@exact
def push(k: Tensor, v: Tensor, weights: tuple[Tensor, ...], memory: Memory) -> Tensor:
    """|grad 1/2 |M(k) - v|^2|, over all layers and before any clip: k [B,T,H,K], v [B,T,H,V] -> [B,T,H]"""
    write = gradient(list(weights), _rows(k, weights), _rows(v, weights), _net(weights, memory))
    layers = [length(x) * length(d) for x, d in zip(write.x, write.d, strict=True)]  # of x^T d
    return length(torch.cat(layers, -1)).squeeze(-1).transpose(1, 2)


def _rows(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    return x.transpose(1, 2).to(weights[0].dtype)  # [B, H, T, .]


def _net(weights: tuple[Tensor, ...], memory: Memory) -> Net:
    gain, bias = (None if x is None else x.to(weights[0].dtype)[:, None] for x in (memory.gain, memory.bias))
    return Net(memory.activation, memory.post, gain, bias, None)
