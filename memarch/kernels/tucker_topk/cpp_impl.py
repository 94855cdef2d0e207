"""The search in C++ (cpu.cpp)."""

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.tucker_topk.operator import define

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def search(s1: Tensor, s2: Tensor, core: Tensor, u: Tensor, v: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    Q, H, r, n = s1.shape
    scores, ids = s1.new_empty(Q, H, k), s1.new_empty(Q, H, k, dtype=torch.int64)
    inputs = (x.to(s1.dtype).contiguous() for x in (s1, s2, core, u, v))
    if call(f"tucker_topk_{SUFFIX[s1.dtype]}", *inputs, scores, ids, Q, H, r, n, k, axis):
        raise ValueError("tucker_topk: NaN among the scores; the queries or the sub-keys have overflowed")
    return scores, ids


tucker_topk = define("tucker_topk_cpp", search)
