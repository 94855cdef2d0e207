"""MemoryFormer's hashed lookup against its formula; float64."""

import itertools

import torch

from memarch.layers import MemoryFormerConfig
from memarch.layers.memory_former import Hashed
from zoo import DIM, F64, close, noisy


def lookup_layer(bits, chunks, width):
    layer = Hashed(MemoryFormerConfig(bits=bits), chunks, bits, width)
    with torch.no_grad():
        layer.init_(torch.Generator().manual_seed(0))
    return noisy(layer)


def test_it_is_its_formula():
    for score in ("paper", "code"):
        layer = noisy(MemoryFormerConfig(bits=4, expand=1, temperature=0.7, score=score).build(DIM))
        x = torch.randn(3, DIM, dtype=F64)

        def lookup(hashed, x, bits, score=score):
            out = torch.zeros(len(x), hashed.rows.table.shape[1], dtype=F64)
            for i, row in enumerate(x):
                for k, z in enumerate(row.split(bits)):
                    at = sum(2**j for j in range(bits) if z[j] >= 0)
                    p = torch.prod(1 / (1 + torch.exp(-2 * z.abs() / 0.7)))
                    out[i] += (p if score == "paper" else p * z.abs().sum()) * hashed.rows.table[k * 2**bits + at]
            return out

        y = lookup(layer.second, layer.norm(lookup(layer.first, x, 4)), 5)
        close(layer(x[None]).y[0], y, score, 1e-12)


def test_the_share_is_that_of_a_softmax_over_all_patterns():
    """p of the chosen pattern is its softmax probability among all 2^tau, with t as temperature: the shares of all patterns sum to 1."""
    z = torch.randn(5, dtype=F64)
    hashed = lookup_layer(5, 1, 3)
    _, p, _ = hashed(z)
    logits = torch.stack([(torch.tensor(s, dtype=F64) * z).sum() for s in itertools.product((-1, 1), repeat=5)])
    close(p[0], logits.softmax(0).max(), "share", 1e-12)
    assert hashed(1e3 * z)[1].item() == 1


def test_gradients():
    """Through p into x, and into exactly K rows."""
    hashed = lookup_layer(3, 2, 4)
    x = torch.randn(6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hashed(x)[0], x)
    hashed(x)[0].sum().backward()
    assert (hashed.rows.table.grad.abs().sum(1) > 0).sum() == 2
