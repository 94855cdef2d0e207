"""Product-key memory against its formula, and what the formula implies; float64."""

import math

import pytest
import torch

from memarch.layers import PKMConfig
from memarch.layers.parts.pool import watch
from zoo import DIM, F64, close, noisy


def inputs(T=9):
    return torch.randn(2, T, DIM, dtype=F64)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_it_is_its_formula_by_brute_force(norm):
    """All n^2 rows scored, the best k taken, head by head."""
    layer, x = noisy(PKMConfig(keys=6, heads=3, topk=5, query_dim=8, query_norm=norm).build(DIM)), inputs()
    q = x @ layer.query.weight.mT + layer.query.bias
    if norm == "layer":
        q = (q - q.mean(-1, keepdim=True)) * torch.rsqrt(q.var(-1, correction=0, keepdim=True) + 1e-5) * layer.norm.weight + layer.norm.bias
    q = q.unflatten(-1, (3, 2, 4))
    y = 0
    for head in range(3):
        s = (q[:, :, head, 0] @ layer.keys[0, head].mT)[..., :, None] + (q[:, :, head, 1] @ layer.keys[1, head].mT)[..., None, :]
        best, ids = s.flatten(-2).topk(5)
        weights = best.softmax(-1)
        close(weights.sum(-1), torch.ones(2, 9, dtype=F64), "weights of a head", 1e-12)
        y = y + (weights[..., None] * layer.values.table[ids]).sum(-2)
    close(layer(x).y, y, "output", 1e-12)


def test_a_single_row_is_read_by_every_head():
    layer = noisy(PKMConfig(keys=1, heads=3, topk=1, query_dim=4).build(DIM))
    close(layer(inputs()).y, 3 * layer.values.table[0].expand(2, 9, DIM), "output", 1e-12)


def test_the_order_of_keys_is_a_name():
    layer, x = noisy(PKMConfig(keys=6, heads=1, topk=4, query_dim=8).build(DIM)), inputs()
    before, order = layer(x).y.detach(), torch.randperm(6)
    with torch.no_grad():
        layer.keys[0] = layer.keys[0][:, order]
        layer.values.table.copy_(layer.values.table.view(6, 6, DIM)[order].flatten(0, 1))
    close(layer(x).y, before, "output", 1e-12)


def test_gradients():
    """Where no two scores are close: topk may not change its mind between x and x + eps."""
    layer = noisy(PKMConfig(keys=4, heads=2, topk=2, query_dim=4).build(DIM))
    x = torch.randn(1, 3, DIM, dtype=F64, requires_grad=True)
    weights = [layer.query.weight, layer.keys, layer.values.table]

    def call(x, *weights):
        names = ("query.weight", "keys", "values.table")
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,)).y

    assert torch.autograd.gradcheck(call, (x, *weights))


def test_only_rows_that_were_read_get_a_gradient():
    layer, x = noisy(PKMConfig(keys=8, heads=2, topk=3, query_dim=8).build(DIM)), inputs(2)
    layer(x).y.square().sum().backward()
    read = layer.find(x)[1].unique()
    assert set(layer.values.table.grad.abs().amax(1).nonzero().flatten().tolist()) == set(read.tolist()) and len(read) < 64


def test_all_rows_read_alike_is_full_and_even_use():
    layer = PKMConfig(keys=2, heads=1, topk=2, query_dim=4, query_norm="none").build(DIM)
    (usage,) = watch(layer)
    with torch.no_grad():
        layer.keys.zero_()  # every row ties; then spread over the rows by hand
    usage.due = True
    assert usage.add(torch.arange(4)[None], torch.full((1, 4), 0.25), 4)["usage"] == 1
    found = layer(torch.randn(1, 5, DIM)).aux
    assert found["usage"] == 0.5, "ties go to the lowest rows"
    assert found["unevenness"].item() == pytest.approx(math.log(2), abs=1e-6)
