"""Memory+ against its formula, against PKM, and sharing; float64."""

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from memarch import create_model, from_pretrained
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers import MemoryPlusConfig, PKMConfig
from zoo import DIM, F64, close, noisy


def inputs():
    return torch.randn(2, 9, DIM, dtype=F64)


def test_it_is_its_formula_by_brute_force():
    """All n^2 rows scored, the best k taken."""
    layer = noisy(MemoryPlusConfig(keys=6, heads=2, topk=4, query_dim=8, value_dim=10, qk_norm=True).build(DIM))
    x = inputs()

    def unit(y, gain):
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * gain

    q = unit(layer.query(x).unflatten(-1, (2, 2, 4)), layer.gains[0])
    keys = unit(layer.keys, layer.gains[1])
    s = torch.einsum("bthq,hnq->bthn", q[..., 0, :], keys[0])[..., :, None] + torch.einsum("bthq,hnq->bthn", q[..., 1, :], keys[1])[..., None, :]
    best, ids = s.flatten(-2).topk(4)
    m = (best.softmax(-1)[..., None] * layer.values.table[ids]).sum((2, 3))
    close(layer(x).y, (m * F.silu(x @ layer.gate.weight.mT)) @ layer.out.weight.mT, "output", 1e-12)


def test_without_gate_and_projection_it_is_pkm():
    a = noisy(MemoryPlusConfig(keys=6, heads=2, topk=4, query_dim=8, gate=False).build(DIM))
    b = noisy(PKMConfig(keys=6, heads=2, topk=4, query_dim=8, query_norm="none").build(DIM))
    with torch.no_grad():
        b.load_state_dict({name: p for name, p in a.state_dict().items() if not name.startswith("out")})
        a.out.weight.copy_(torch.eye(DIM))
    x = inputs()
    close(a(x).y, b(x).y, "output", 1e-12)


def test_scores_start_with_a_spread_of_one():
    layer = MemoryPlusConfig(keys=64, heads=4, topk=8, query_dim=64, qk_norm=True).build(128)
    q = layer.query(torch.randn(1, 200, 128)).unflatten(-1, (4, 2, 32))
    q, keys = (F.rms_norm(y, [32], gain) for y, gain in zip((q, layer.keys), layer.gains, strict=True))
    spread = torch.einsum("bthaq,ahnq->abthn", q, keys).std()
    assert 0.9 < spread < 1.1


def test_layers_share_one_table_and_its_gradient_is_the_sum_of_both_uses():
    model = create_model("memory-plus-tiny").double()
    tables = [name for name, _ in model.named_parameters() if name.endswith("table")]
    assert tables == ["backbone.pools.facts.table"]
    first, second = (model.backbone.blocks[i].ffn for i in (0, 2))
    assert first.values.pool is second.values.pool
    x = torch.randn(1, 5, 64, dtype=F64)
    grads = []
    for layers in ((first,), (second,), (first, second)):
        model.zero_grad()
        sum(layer(x).y.sum() for layer in layers).backward()
        grads.append(model.backbone.pools["facts"].table.grad.clone())
    close(grads[0] + grads[1], grads[2], "gradient", 1e-12)
    other = create_model("memory-plus-tiny")
    assert other.backbone.pools["facts"].table is not model.backbone.pools["facts"].table


def test_the_presets_are_the_papers():
    """What the names count is the model whose three feed-forwards were not yet replaced."""
    for name, said, width, hidden in (("373m", 374e6, 1024, 2816), ("1.3b", 1.34e9, 2048, 5472)):
        config = create_model(f"memory-plus-{name}", device="meta").config
        assert [i for i in range(24) if config.block(i).ffn.kind == "memory_plus"] == [4, 12, 20]
        memory = config.parts["K"].ffn.num_params(width)
        assert config.pools["facts"].rows == 1024**2
        assert config.num_params() - config.pools["facts"].num_params(width) + 3 * (3 * width * hidden - memory) == pytest.approx(said, rel=0.005)


def test_columns_may_live_apart():
    """Each of four devices holds a quarter of the columns and sums it for all tokens: to the bit what one device does."""
    torch.manual_seed(0)
    table, ids, weights = torch.randn(50, 16), torch.randint(50, (7, 6)), torch.randn(7, 6)
    parts = [part.contiguous().requires_grad_() for part in table.chunk(4, 1)]
    whole, w, each = table.clone().requires_grad_(), weights.clone().requires_grad_(), weights.clone().requires_grad_()
    y, z = weighted_bag(whole, ids, w), torch.cat([weighted_bag(part, ids, each) for part in parts], -1)
    assert torch.equal(y, z)
    dy = torch.randn(7, 16)
    y.backward(dy)
    z.backward(dy)
    assert torch.equal(whole.grad, torch.cat([part.grad for part in parts], 1))
    close(each.grad, w.grad, "gradient of weights", 1e-6)  # a sum of four parts, in another order


def test_sharing_survives_the_file(tmp_path):
    model = create_model("memory-plus-tiny")
    model.save_pretrained(tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert [name for name in file.keys() if name.endswith("table")] == ["backbone.pools.facts.table"]  # noqa: SIM118 not a dict
    again = from_pretrained(tmp_path)
    first, second = (again.backbone.blocks[i].ffn for i in (0, 2))
    assert first.values.pool is second.values.pool is again.backbone.pools["facts"]
    assert torch.equal(first.values.pool.table, model.backbone.pools["facts"].table)


def test_no_gate_input_no_output():
    layer = noisy(MemoryPlusConfig(keys=6, heads=2, topk=4, query_dim=8).build(DIM))
    with torch.no_grad():
        layer.gate.weight.zero_()
    assert (layer(inputs()).y == 0).all()
