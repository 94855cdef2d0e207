"""PEER against its formula and its limits; float64."""

import pytest
import torch
from torch.nn import functional as F

from memarch.layers import PEERConfig, PKMConfig
from zoo import DIM, F64, close, noisy


def inputs():
    return torch.randn(2, 9, DIM, dtype=F64)


@pytest.mark.parametrize("act, score, per_head", [("gelu", "softmax", False), ("relu", "sigmoid", True)])
def test_it_is_its_formula_by_brute_force(act, score, per_head):
    layer = noisy(PEERConfig(keys=6, heads=3, topk=4, query_dim=8, query_norm="none", act=act, score=score, keys_per_head=per_head).build(DIM))
    x = inputs()
    u, v = layer.experts.table.view(36, 2, DIM).unbind(1)
    q = layer.query(x).unflatten(-1, (3, 2, 4))
    y = torch.zeros_like(x)
    for h in range(3):
        k1, k2 = layer.keys[:, h if per_head else 0]
        s = (q[:, :, h, 0] @ k1.mT)[..., :, None] + (q[:, :, h, 1] @ k2.mT)[..., None, :]
        best, ids = s.flatten(-2).topk(4)
        g = best.softmax(-1) if score == "softmax" else best.sigmoid()
        a = torch.einsum("btd,btkd->btk", x, u[ids])
        y += torch.einsum("btk,btkd->btd", g * (F.gelu(a) if act == "gelu" else F.relu(a)), v[ids])
    close(layer(x).y, y, "output", 1e-12)


def test_one_expert_a_head_is_a_small_mlp():
    """k = 1: the weight is 1, and the layer is a dense MLP of H neurons, those that were found."""
    layer = noisy(PEERConfig(keys=6, heads=3, topk=1, query_dim=8).build(DIM))
    x = inputs()
    _, ids = layer.find(x)
    u, v = layer.experts.table.view(36, 2, DIM)[ids[..., 0]].unbind(-2)  # [B, T, H, D]
    close(layer(x).y, (F.gelu((u @ x[..., None]).squeeze(-1))[..., None, :] @ v).squeeze(-2), "output", 1e-12)


def test_a_single_expert():
    layer = noisy(PEERConfig(keys=1, heads=5, topk=1, query_dim=2).build(DIM))
    x, (u, v) = inputs(), layer.experts.table
    close(layer(x).y, 5 * F.gelu(x @ u)[..., None] * v, "output", 1e-12)


def test_experts_that_always_answer_one_are_a_product_key_memory():
    """act(u . x) = 1 for all: relu with u . x = 1."""
    peer = noisy(PEERConfig(keys=6, heads=2, topk=4, query_dim=8, query_norm="none", act="relu", keys_per_head=True).build(DIM))
    pkm = noisy(PKMConfig(keys=6, heads=2, topk=4, query_dim=8, query_norm="none").build(DIM))
    x = inputs()
    x[..., 0] = 1
    with torch.no_grad():
        peer.experts.table[0::2] = F.one_hot(torch.tensor(0), DIM).to(F64)
        pkm.load_state_dict({name: p for name, p in peer.state_dict().items() if name != "experts.table"} | {"values.table": peer.experts.table[1::2].clone()})
    close(peer(x).y, pkm(x).y, "output", 1e-12)


def test_an_inactive_neuron_gets_no_gradient():
    layer = noisy(PEERConfig(keys=6, heads=2, topk=4, query_dim=8, act="relu").build(DIM))
    x = torch.randn(1, 1, DIM, dtype=F64)
    _, ids = layer.find(x)
    layer(x).y.sum().backward()
    u, grad = layer.experts.table.view(36, 2, DIM)[:, 0], layer.experts.table.grad.view(36, 2, DIM)[:, 0]
    for i in ids.flatten().tolist():
        assert (grad[i].abs().sum() > 0) == (u[i] @ x[0, 0] > 0)
    rest = torch.ones(36, dtype=torch.bool)
    rest[ids.flatten()] = False
    assert (grad[rest] == 0).all()
