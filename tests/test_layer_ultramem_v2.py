"""UltraMemV2 against its formula and against UltraMem, its numbers at init, and the paper's counts; float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from memarch import create_model
from memarch.config import ConfigError, initialise
from memarch.kernels.row_dot import row_dot
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers import UltraMemConfig, UltraMemV2Config
from zoo import DIM, F64, close, noisy


def inputs(T=9):
    return torch.randn(2, T, DIM, dtype=F64)


def test_it_is_its_formula_by_brute_force():
    """axis_topk = n_v switches the filter off, so all n_v^2 cells compete, and more are taken than an axis has."""
    cfg = UltraMemV2Config(hidden=8, keys=3, heads=2, topk=9, axis_topk=6, key_dim=4, pre_dim=5, value_dim=6, expand=4)
    layer, x = noisy(cfg.build(DIM)), inputs()
    s1, s2 = layer.sides(layer.query(x).unflatten(-1, (2, 2, -1)))
    s = torch.einsum("bthri,chrq,bthqj->bthcij", s1, layer.core, s2).flatten(-2)
    _, ids = s.sum(3).topk(9)  # [B, T, H, k]
    own = s.gather(-1, ids[:, :, :, None].expand(-1, -1, -1, 2, -1))  # [B, T, H, cores, k]
    rows = layer.permutation[ids].long() % 9
    p = torch.einsum("bthkp,btp->bthk", layer.gates.table[rows], x @ layer.pre.weight.mT)
    v = layer.values.table[rows]
    bag = torch.cat([((own[:, :, :, c] * p)[..., None] * v[..., part]).sum((2, 3)) for c, part in ((0, slice(3)), (1, slice(3, 6)))], -1)
    gate, up = (x @ layer.ffn.up.weight.mT).chunk(2, -1)
    close(layer(x).y, bag @ layer.out.weight.mT + (F.silu(gate) * up) @ layer.ffn.down.weight.mT, "output", 1e-12)


def test_with_pre_values_of_one_it_is_ultramem_with_one_projection():
    v2 = noisy(UltraMemV2Config(hidden=0, keys=4, heads=2, topk=8, key_dim=4, pre_dim=1, value_dim=6, expand=4).build(DIM))
    v1 = noisy(UltraMemConfig(keys=4, heads=2, topk=8, key_dim=4, value_dim=6, expand=4).build(DIM))
    x = inputs().abs()
    with torch.no_grad():
        v1.load_state_dict({n: t for n, t in v2.state_dict().items() if not n.startswith(("pre", "gates"))} | {"out.weight": v2.out.weight.repeat(1, 4)})
        x[..., 0] = 1
        v2.pre.weight.copy_(torch.eye(DIM)[:1])  # W_pre x = 1
        v2.gates.table.fill_(1)
    close(v2(x).y, v1(x).y, "output", 1e-12)


def test_columns_may_live_apart():
    """Half of the columns of either table on each of two devices: pre-values are added up before they weigh, outputs are put side by side."""
    layer, x = noisy(UltraMemV2Config(hidden=0, keys=5, topk=5, pre_dim=4, value_dim=6).build(DIM)), inputs()
    found, z = layer.find(x), layer.pre(x)
    halves = [table.chunk(2, 1) for table in (layer.gates.table, layer.values.table)]
    p = sum(row_dot(part.contiguous(), found.rows, z[..., i * 2 : i * 2 + 2]) for i, part in enumerate(halves[0]))
    y = [weighted_bag(part.contiguous(), found.rows, found.own[..., i] * p) for i, part in enumerate(halves[1])]  # a core for each half
    close(layer(x).y, torch.cat(y, -1) @ layer.out.weight.mT, "output", 1e-12)


def test_every_rank_of_either_side_has_a_query_of_its_own():
    layer = noisy(UltraMemV2Config(keys=6, topk=4, key_dim=4).build(DIM))
    layer(inputs()).y.square().sum().backward()
    assert layer.query.weight.grad.shape == (2 * 2 * 4, DIM)
    assert (layer.query.weight.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("match", ["paper", "measured"])
def test_at_init_the_memory_is_as_large_as_the_paper_says(match):
    """0.064 (hidden / D) / 2L; with "measured", as the feed-forward is."""
    D, depth, hidden, found, ffn = 256, 8, 512, [], []
    for seed in range(4):
        layer = UltraMemV2Config(hidden=hidden, keys=48, topk=32, match=match).make(D, {})
        initialise(layer, depth, seed)
        x = torch.randn(1, 512, D, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            ffn.append(layer.ffn(x).y.var().item())
            found.append((layer(x).y - layer.ffn(x).y).var().item())
    found, ffn = sum(found) / 4, sum(ffn) / 4
    said = 0.064 * hidden / D / (2 * depth)
    assert found == pytest.approx(said if match == "paper" else ffn, rel=0.1)
    assert ffn / said == pytest.approx(0.31, rel=0.1), "SiLU's second moment"


def test_the_mean_kept_score_of_a_core_starts_at_one():
    layer = UltraMemV2Config(keys=64, topk=32, cores=2).build(128, depth=4)
    with torch.no_grad():
        assert layer.find(torch.randn(1, 256, 128)).own.mean().item() == pytest.approx(1, rel=0.1)


def test_the_papers_counts():
    """Table 10, 227M / 1.2B: 0.995B in tables; 224.1M a token without the rows it reads (the paper prints 225)."""
    model = create_model("ultramem-v2-227m", device="meta")
    tables = sum(p.numel() for name, p in model.named_parameters() if name.endswith("table"))
    rows = 20 * 32 * (192 + 192)
    assert tables == 20 * 360**2 * 384 and round(tables / 1e9, 3) == 0.995
    assert round((model.config.active_params() - rows) / 1e6, 1) == 224.1


def test_a_shared_ring_is_claimed_layer_by_layer():
    model = create_model("ultramem-v2-tiny")
    first, second = (block.ffn for block in model.backbone.blocks)
    assert first.values.pool is second.values.pool is model.backbone.pools["facts"]
    ids = torch.arange(1024)
    assert torch.equal(first.values.at(ids), ids) and torch.equal(second.values.at(ids), (ids + 512) % 1536)
    std = model.backbone.pools["facts"].table.std().item()
    alone = UltraMemV2Config(hidden=128, keys=32, topk=8).build(64, depth=2).values.table.std().item()
    assert std == pytest.approx(alone, rel=0.05), "a shared table starts as the layer's own would"


def test_bad_input():
    for said, words in (
        ({"cores": 3}, "must divide the value width"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"expand": 2}, "square"),
        ({"topk": 200, "axis_topk": 14}, "cells of 14 rows"),
        ({"axis_topk": 200}, "keys of an axis"),
        ({"hidden": -1}, "hidden"),
        ({"pool": "a", "pre_pool": "a"}, "a pool each"),
    ):
        with pytest.raises(ConfigError, match=words):
            UltraMemV2Config(**said).build(64)
    layer = UltraMemV2Config(keys=6, topk=4).build(DIM)
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((1, 2, DIM), math.nan))
