"""Pools: whose a table is, which rows a layer sees, how it starts, and what is too large."""

import pytest
import torch

from memarch import LM, create_model
from memarch.config import ConfigError, decode, override
from memarch.layers import PKMConfig, PoolConfig, ValuePool
from memarch.layers.parts.pool import Borrowed, afford
from memarch.models import preset
from memarch.models.lm import LMConfig
from zoo import DIM, F64, close, noisy


def windows(layers, **said):
    """The rows that each layer sees, of one pool."""
    pool = PoolConfig(**said).make(4)
    return [Borrowed(pool).at(torch.arange(pool.cfg.seen())).tolist() for _ in range(layers)]


def test_a_ring_is_a_window_that_wraps():
    """As UltraMemV2's: layer l sees `window` rows from l step on."""
    assert windows(4, rows=8, window=4, step=2) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 0, 1]]
    found = windows(20, rows=20 * 9, window=100, step=9)
    for layer, rows in enumerate(found):
        assert rows == [(layer * 9 + i) % 180 for i in range(100)]
    assert {row for rows in found for row in rows} == set(range(180))


def test_the_whole_pool_is_a_window_too():
    assert windows(3, rows=5) == [list(range(5))] * 3


def test_clamp_ends_where_the_pool_ends():
    assert windows(4, rows=8, window=4, step=2, shift="clamp") == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [4, 5, 6, 7]]


def test_block_never_leaves_its_block():
    assert windows(4, rows=8, window=4, step=2, shift="block") == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    with pytest.raises(ConfigError, match="too few for layer 4"):
        windows(5, rows=8, window=4, step=2, shift="block")


def test_only_rows_of_the_window_are_read_and_learn():
    pool = PoolConfig(rows=100, window=64, step=50).make(DIM)
    with torch.no_grad():
        pool.init_(torch.Generator().manual_seed(0))
    layers = [noisy(PKMConfig(keys=8, heads=2, topk=8, query_dim=8, pool="facts").build(DIM, seed=i, pools={"facts": pool})) for i in range(2)]
    for layer, seen in zip(layers, (set(range(64)), {i % 100 for i in range(50, 114)}), strict=True):
        pool.table.grad = None
        layer(torch.randn(8, 100, DIM, dtype=F64)).y.square().sum().backward()
        assert set(pool.table.grad.abs().amax(1).nonzero().flatten().tolist()) == seen


def test_a_window_reads_what_a_table_of_its_own_would():
    pool = PoolConfig(rows=100, window=64, step=50).make(DIM).to(F64)
    alone = PKMConfig(keys=8, heads=2, topk=4, query_dim=8).build(DIM).to(F64)
    shared = [PKMConfig(keys=8, heads=2, topk=4, query_dim=8, pool="facts").build(DIM, pools={"facts": pool}).to(F64) for _ in range(2)][1]
    with torch.no_grad():
        pool.table.copy_(torch.randn(100, DIM))
        alone.values.table.copy_(pool.table[(torch.arange(64) + 50) % 100])
    x = torch.randn(2, 9, DIM, dtype=F64)
    close(shared(x).y, alone(x).y, "output", 1e-12)


def test_a_table_can_be_kept_in_bfloat16():
    said = override(override(preset("pkm-tiny"), "pools.facts", {"rows": 1024, "dtype": "bfloat16"}), "layers", 2)
    model = LM(decode(LMConfig, said))
    table = model.backbone.pools["facts"].table
    assert table.dtype == torch.bfloat16 and model.embed.weight.dtype == torch.float32
    tokens = torch.randint(256, (2, 16))
    out = model.loss(tokens, tokens)
    out.loss.backward()
    assert table.grad.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    wide = create_model("pkm-tiny")
    wide.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    close(wide(tokens).logits, model(tokens).logits, "sums are as wide as the model", 1e-6)


def test_std_at_init():
    def std(**said):
        return create_model("pkm-tiny", set={"pools.facts": {"rows": 1024, **said}}).backbone.pools["facts"].table.std().item()

    assert std() == pytest.approx(64**-0.5, rel=0.02)
    assert std(std=0.3) == pytest.approx(0.3, rel=0.02)


def test_models_share_nothing():
    a, b = (create_model(name).backbone.pools["facts"] for name in ("pkm-tiny", "pkm-tiny"))
    assert a.table.data_ptr() != b.table.data_ptr()
    assert ValuePool(4, 4).claims == 0 and a.claims == b.claims == 1


def test_a_table_that_cannot_be_held_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"a table of 4,294,967,296 x 4096 values of torch.float32 takes 64.0 TiB; cpu has .* GiB free"):
        ValuePool(2**32, 4096)
    with pytest.raises(ConfigError, match="fewer keys"):
        PKMConfig(keys=2**16).build(4096)
    afford(10, 10, torch.float32)
    with torch.device("meta"):
        assert ValuePool(2**32, 4096).table.shape == (2**32, 4096)


@pytest.mark.parametrize(
    "said, words",
    [
        ({"rows": 0}, "at least 1 row"),
        ({"rows": 4, "width": 0}, "width"),
        ({"rows": 4, "std": 0.0}, "std"),
        ({"rows": 4, "window": 5}, r"between 1 and rows \(4\)"),
        ({"rows": 4, "step": 2}, "set window"),
    ],
)
def test_bad_pools(said, words):
    with pytest.raises(ConfigError, match=words):
        PoolConfig(**said)


def test_a_layer_says_what_window_it_needs():
    with pytest.raises(ConfigError, match="shows a layer 512 x 64; this layer needs 1024 x 64"):
        create_model("pkm-tiny", set={"pools.facts": {"rows": 1024, "window": 512}})
