"""The mixture of experts against a loop over tokens; float64."""

import torch
from torch.nn import functional as F

from memarch.layers import MoEConfig, SwiGLUConfig
from zoo import DIM, F64, close, noisy


def test_it_is_the_loop_over_tokens():
    layer = noisy(MoEConfig(experts=5, topk=2, hidden=7).build(DIM))
    x = torch.randn(2, 40, DIM, dtype=F64)
    p = (x @ layer.router.weight.mT).softmax(-1)
    best, ids = p.topk(2, -1)
    y = torch.zeros_like(x)
    for b in range(2):
        for t in range(40):
            for w, e in zip(best[b, t] / best[b, t].sum(), ids[b, t], strict=True):
                gate, up = (x[b, t] @ layer.up.weight[e]).chunk(2, -1)
                y[b, t] += w * ((F.silu(gate) * up) @ layer.down.weight[e])
    close(layer(x).y, y, "output", 1e-12)


def test_one_expert_is_a_swiglu():
    one, plain = noisy(MoEConfig(experts=1, topk=1, hidden=12).build(DIM)), noisy(SwiGLUConfig(hidden=12).build(DIM))
    with torch.no_grad():
        plain.up.weight.copy_(one.up.weight[0].mT)
        plain.down.weight.copy_(one.down.weight[0].mT)
    x = torch.randn(2, 9, DIM, dtype=F64)
    close(one(x).y, plain(x).y, "output", 1e-12)
