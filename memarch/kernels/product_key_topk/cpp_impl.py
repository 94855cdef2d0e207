"""The search in C++ (cpu.cpp)."""

import torch
from torch import Tensor

from memarch.kernels.native import call
from memarch.kernels.product_key_topk.operator import define

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def search(s1: Tensor, s2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    Q, n = s1.shape
    scores, ids = s1.new_empty(Q, k), s1.new_empty(Q, k, dtype=torch.int64)
    if call(f"product_key_topk_{SUFFIX[s1.dtype]}", s1.contiguous(), s2.contiguous(), scores, ids, Q, n, k):
        raise ValueError("product_key_topk: NaN among the scores; the queries or the sub-keys have overflowed")
    return scores, ids


def scatter(dscores: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    Q, k = ids.shape
    ds1, ds2 = (dscores.new_empty(Q, n) for _ in range(2))
    call(f"product_key_topk_backward_{SUFFIX[dscores.dtype]}", dscores.contiguous(), ids, ds1, ds2, Q, n, k)
    return ds1, ds2


product_key_topk = define("product_key_topk_cpp", search, scatter)
