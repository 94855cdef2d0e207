"""What every entry of the tables owes: exact counts, JSON round trip, examples that use every option, nothing shared."""

import dataclasses
import json
import types
import typing

import pytest
import torch

import zoo
from memarch import LM, LMConfig, create_model, decode, encode, list_models
from memarch.config import override
from memarch.contracts import Fed
from memarch.layers import CHANNELS, MIXERS, ValuePool
from memarch.models.presets import PRESETS
from memarch.wrappers import WRAPPERS
from zoo import DIM, F64, close, noisy

TABLES = {"mixer": MIXERS, "channel": CHANNELS, "wrapper": WRAPPERS}
ENTRIES = [(family, kind, cls) for family, table in TABLES.items() for kind, cls in table.items()]
EXAMPLES = [(family, kind, i, config) for family, kind, cls in ENTRIES for i, config in enumerate(cls.examples())]
entry = pytest.mark.parametrize("family, kind, cls", ENTRIES, ids=[e[1] for e in ENTRIES])
example = pytest.mark.parametrize("family, kind, i, config", EXAMPLES, ids=[f"{e[1]}-{e[2]}" for e in EXAMPLES])
channel = pytest.mark.parametrize("config", [e[3] for e in EXAMPLES if e[0] == "channel"], ids=[f"{e[1]}-{e[2]}" for e in EXAMPLES if e[0] == "channel"])


def pools_for(config):
    """The pools that an example names, as a model would declare them."""
    pools = {name: ValuePool(*size) for name, size in config.borrows(DIM).items()}
    with torch.no_grad():
        for pool in pools.values():
            pool.init_(torch.Generator().manual_seed(3))
    return {name: pool.to(F64) for name, pool in pools.items()}


def built(family, config, seed=0):
    if family == "wrapper":
        return zoo.initialised(config.wrap(LM(decode(LMConfig, {"vocab_size": 11, "dim": DIM, "layers": 1, "pattern": "A", **INNER})).backbone, DIM), seed)
    return config.build(DIM, seed=seed, **({"pools": pools_for(config)} if family == "channel" else {}))


INNER = {"parts": {"A": {"mixer": {"kind": "attention", "heads": 2}}}}


@entry
def test_the_table_and_the_class_agree(family, kind, cls):
    assert {f.name: f.default for f in dataclasses.fields(cls)}["kind"] == kind
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} must be frozen"
    assert cls.paper, f"{cls.__name__} names no paper"
    assert cls.examples(), f"{cls.__name__} has no examples, so nothing of it is tested"


@entry
def test_examples_use_every_option(family, kind, cls):
    """Every member of a Literal, every kind of an inner config, both values of a bool, None and not None, and at least one value that is not the default."""
    examples = cls.examples()
    for field, hint in ((f, typing.get_type_hints(cls)[f.name]) for f in dataclasses.fields(cls) if f.name != "kind"):
        used = {getattr(config, field.name) for config in examples}
        if typing.get_origin(hint) is typing.Literal:
            wanted = set(typing.get_args(hint))
        elif hint is bool:
            wanted = {True, False}
        elif any(map(dataclasses.is_dataclass, typing.get_args(hint))):  # a choice of inner configs
            used, wanted = {type(value) for value in used}, {member for member in typing.get_args(hint) if dataclasses.is_dataclass(member)}
        else:
            wanted = {field.default} if typing.get_origin(hint) in (typing.Union, types.UnionType) else set()
            assert used - {field.default}, f"{kind}.{field.name}: no example leaves the default {field.default!r}"
        assert wanted <= used, f"{kind}.{field.name}: no example uses {wanted - used}"


@example
def test_json_round_trip(family, kind, i, config):
    assert decode(type(config), json.loads(json.dumps(encode(config)))) == config


@example
def test_counts_are_exact(family, kind, i, config):
    module = built(family, config)
    inner = sum(p.numel() for p in module.inner.parameters()) if family == "wrapper" else 0
    assert config.num_params(DIM) == sum(p.numel() for p in module.parameters()) - inner
    assert 0 <= config.active_params(DIM) <= config.num_params(DIM) + sum(pool.table.numel() for pool in pools_for(config).values())


@example
def test_two_instances_share_nothing(family, kind, i, config):
    a, b = built(family, config), built(family, config)
    theirs = {p.data_ptr() for p in b.parameters() if p.numel()} | {t.data_ptr() for t in b.buffers() if t.numel()}
    for name, p in (*a.named_parameters(), *a.named_buffers()):
        assert not p.numel() or p.data_ptr() not in theirs, f"{name} is one tensor in two instances"


@channel
def test_law_6_a_position_stands_alone(config):
    layer = noisy(built("channel", config))
    x = torch.randn(3, 7, DIM, dtype=F64)
    y = layer(x).y
    changed = x.clone()
    changed[1, 4] += 1.0
    z = layer(changed).y
    different = (z != y).any(-1)
    assert different[1, 4] and different.sum() == 1, "changing one position changed others"
    close(layer(x[1:2]).y, y[1:2], "a row alone")
    close(layer(x[:, 4:5]).y, y[:, 4:5], "a position alone")


@channel
def test_law_7_channel_parameters_learn(config):
    layer = noisy(built("channel", config))
    layer(torch.randn(4, 40, DIM, dtype=F64)).y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_counts_and_meta(name):
    model = create_model(name, device="meta")
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())
    assert 0 < model.config.active_params() <= model.config.num_params()
    assert decode(LMConfig, json.loads(json.dumps(encode(model.config)))) == model.config
    assert PRESETS[name].family and PRESETS[name].paper
    assert all(p.is_meta for p in model.parameters())
    published = PRESETS[name].published
    assert published is None or stated(model.config.num_params(), published) == published


def stated(count: int, like: str) -> str:
    """A count in the unit of `like` and to as many digits: 363,012,096 is "360M" as it is "0.36B" or "363M"."""
    number, unit = like[:-1], like[-1]
    value = count / {"M": 1e6, "B": 1e9}[unit]
    if "." in number:
        return f"{value:.{len(number.partition('.')[2])}f}{unit}"
    step = 10 ** (len(number) - len(number.rstrip("0")))
    return f"{round(value / step) * step:.0f}{unit}"


def test_every_kind_has_a_tiny_preset():
    used = set()
    for name in list_models("*-tiny"):
        config = create_model(name, device="meta").config
        blocks = [config.block(i) for i in range(config.layers)]
        used |= {layer.kind for b in blocks for layer in (b.mixer, b.ffn) if layer} | {w.kind for w in config.wrap}
        used |= {branch.layer.kind for branch in config.branches}
    assert {kind for _, kind, _ in ENTRIES} <= used


@pytest.mark.parametrize("seed", range(zoo.STACKS))
def test_random_stacks_count_and_round_trip(seed):
    config = zoo.stack(seed)
    model = LM(config)
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    assert decode(LMConfig, json.loads(json.dumps(encode(config)))) == config


def test_the_random_stacks_draw_everything():
    kinds, wraps, branches, pools = set(), 0, 0, 0
    for seed in range(zoo.STACKS):
        config = zoo.stack(seed)
        kinds |= {layer.kind for b in config.parts.values() for layer in (b.mixer, b.ffn) if layer} | {w.kind for w in config.wrap}
        wraps, branches, pools = wraps + bool(config.wrap), branches + bool(config.branches), pools + bool(config.pools)
    assert kinds == {kind for _, kind, _ in ENTRIES}
    assert min(wraps, branches, pools) >= 5


def test_a_change_in_one_layer_leaves_the_other_weights_as_they_were():
    a = create_model("hybrid-tiny", seed=3)
    b = create_model("hybrid-tiny", seed=3, set={"parts.M.mixer.heads": 4, "parts.M.mixer.head_dim": 8})
    mine, theirs = a.backbone.blocks[1].state_dict(), b.backbone.blocks[1].state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_set_replaces_what_it_names():
    data = {"parts": {"G": {"mixer": {"kind": "gated_delta", "heads": 4, "conv": 2}}}, "wrap": [{"kind": "rmt"}]}
    new = override(data, "parts.G.mixer", {"kind": "attention"})
    assert new["parts"]["G"]["mixer"] == {"kind": "attention"}, "nothing is merged"
    assert override(data, "wrap.0.segment", 7)["wrap"] == [{"kind": "rmt", "segment": 7}]
    assert data["wrap"] == [{"kind": "rmt"}], "the original is left as it was"


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_a_layer_works_alone_in_a_users_module(kind):
    """The five lines of the README, for every mixer."""
    config = next(c for c in MIXERS[kind].examples())
    if zoo.made(config).reads:
        writer = next(w for note in zoo.made(config).reads for w in zoo.writers(note) if zoo.fits(w, config))
        below = {name: (note,) for name, note in writer.build(DIM)(torch.randn(2, 9, DIM)).note.items()}
    else:
        below = {}

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = config.build(DIM)

        def forward(self, x, state=None):
            h = self.mixer(x, state, below=below)
            return x + h.y, h.state

    y, _ = Mine()(torch.randn(2, 9, DIM))
    assert y.shape == (2, 9, DIM)
    assert y.isfinite().all()


def test_a_channel_mixer_answers_fed():
    assert isinstance(CHANNELS["swiglu"]().build(DIM)(torch.randn(1, 2, DIM)), Fed)
