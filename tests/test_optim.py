"""Groups hold every parameter once, schedules are where they say, clipping clips."""

import itertools
import math

import pytest
import torch
from torch import nn

from memarch import create_model, decode, list_models
from memarch.config import ConfigError
from memarch.layers.parts.pool import ValuePool
from memarch.optim import OptimConfig, build, clip, factor, param_groups, table_factor

CFG = OptimConfig()


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_is_in_exactly_one_group(name):
    model = create_model(name, device="meta")
    groups = {group["name"]: group["params"] for group in param_groups(model, CFG)}
    found = [p for params in groups.values() for p in params]
    assert len(found) == len({id(p) for p in found}), "a parameter is in two groups"
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    tables = {id(m.table) for m in model.modules() if isinstance(m, ValuePool)}
    assert {id(p) for p in groups.get("tables", [])} == tables
    assert all(p.ndim >= 2 for p in groups["matrices"])


def names(model, kind):
    which = {id(p) for group in param_groups(model, CFG) if group["name"] == kind for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in which}


def test_what_decays_is_told_by_what_it_is():
    model = create_model("pkm-tiny")
    decayed, free = names(model, "matrices"), names(model, "vectors")
    assert {"embed.weight", "backbone.blocks.0.mixer.into.qkv.weight", "backbone.blocks.0.mixer.into.conv.weight"} <= decayed
    assert "head.weight" not in decayed | free, "a tied head is the embedding, and is met there first"
    for name in ("norm.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias", "blocks.1.ffn.keys", "blocks.1.ffn.query.bias"):
        assert f"backbone.{name}" in free
    assert names(model, "tables") == {"backbone.pools.facts.table"}
    assert "backbone.first" in names(create_model("rmt-tiny"), "vectors"), "RMT's memory is two-dimensional and does not decay"


def test_rates_and_decay_of_groups():
    groups = {g["name"]: g for g in param_groups(create_model("pkm-tiny"), OptimConfig(lr=2e-3, memory_lr=5.0, weight_decay=0.3))}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {"matrices": (2e-3, 0.3), "vectors": (2e-3, 0.0), "tables": (1e-2, 0.0)}


@pytest.mark.parametrize("tables", ["lazy", "row"])
def test_lazy_tables_leave_all_other_weights_to_adamw(tables):
    """To the bit, and what is kept of them is the same."""
    plain, other = create_model("transformer-tiny"), create_model("transformer-tiny")
    (dense, _), (lazy, _) = build(plain, OptimConfig(), 10), build(other, OptimConfig(tables=tables), 10)
    for _ in range(3):
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        dense.step()
        lazy.step()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(dict(dense.state[a]), dict(lazy.state[b]), rtol=0, atol=0)


def test_frozen_parameters_are_left_out():
    model = create_model("transformer-tiny")
    model.embed.weight.requires_grad_(False)
    assert all(p is not model.embed.weight for group in param_groups(model, CFG) for p in group["params"])


# ------------------------------------------------------------------------------------------------ schedules


def test_cosine():
    cfg = OptimConfig(warmup=10, min_lr=0.1)
    at = [factor(cfg, step, 110) for step in range(120)]
    assert at[0] == pytest.approx(0.1) and at[9] == 1.0 and at[10] == 1.0, "warm-up ends at the full rate, and the first step moves"
    assert at[60] == pytest.approx(0.55), "half-way between 1 and min_lr"
    assert at[110] == pytest.approx(0.1) and at[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(at[10:]))


def test_wsd():
    cfg = OptimConfig(schedule="wsd", warmup=10, decay=0.2, min_lr=0.0)
    at = [factor(cfg, step, 100) for step in range(101)]
    assert set(at[10:81]) == {1.0}, "flat until the last fifth"
    assert at[85] == pytest.approx(1 - math.sqrt(5 / 20)) and at[100] == 0.0


def test_constant_and_no_warmup():
    assert [factor(OptimConfig(schedule="constant", warmup=0), step, 0) for step in (0, 1, 10**6)] == [1.0, 1.0, 1.0]
    assert factor(OptimConfig(warmup=0), 0, 10) == 1.0


def test_a_schedule_needs_an_end():
    with pytest.raises(ConfigError, match="max_steps"):
        build(nn.Linear(2, 2), OptimConfig(), None)
    build(nn.Linear(2, 2), OptimConfig(schedule="constant"), None)
    with pytest.raises(ConfigError, match="memory_decay"):
        build(nn.Linear(2, 2), OptimConfig(schedule="constant", memory_decay=0.5), None)


def test_the_rate_of_tables():
    """4x that falls to 1x over half of the run, by the schedule or in place of it."""

    def rates(**more):
        cfg = OptimConfig(lr=2.0, warmup=10, memory_lr=4.0, **more)
        optimizer, schedule = build(create_model("pkm-tiny"), cfg, 100)
        groups, found = {group["name"]: group for group in optimizer.param_groups}, []
        for _ in range(100):
            found.append((groups["tables"]["lr"], groups["matrices"]["lr"]))
            optimizer.step()
            schedule.step()
        return zip(*found, strict=True)

    falling = [1 + 3 * max(0, 1 - step / 50) for step in range(100)]
    tables, model = rates(memory_decay=0.5)
    assert tables == pytest.approx([mult * lr for mult, lr in zip(falling, model, strict=True)]) and model[9] == 2.0
    assert tables[50:] == pytest.approx(model[50:])
    assert next(rates(memory_decay=0.5, memory_schedule="constant")) == pytest.approx([2.0 * mult for mult in falling])
    assert set(next(rates(memory_schedule="constant"))) == {8.0}
    tables, model = rates()
    assert tables == tuple(4 * lr for lr in model), "to the bit"
    assert [table_factor(CFG, step, 200) for step in range(200)] == [factor(CFG, step, 200) for step in range(200)]


def test_the_schedule_resumes():
    def rates(schedule, optimizer, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            found.append(schedule.get_last_lr())
        return found

    whole, schedule = build(create_model("pkm-tiny"), OptimConfig(warmup=5), 20)
    expected = rates(schedule, whole, 20)
    first, schedule = build(create_model("pkm-tiny"), OptimConfig(warmup=5), 20)
    assert rates(schedule, first, 8) == expected[:8]
    saved = first.state_dict(), schedule.state_dict()
    again, schedule = build(create_model("pkm-tiny"), OptimConfig(warmup=5), 20)
    again.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert rates(schedule, again, 12) == expected[8:]


# ------------------------------------------------------------------------------------------------ clipping


def graded(size):
    """pkm-tiny with random gradients, those of the table `size` times larger."""
    model = create_model("pkm-tiny")
    optimizer, _ = build(model, OptimConfig(), 10)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p) * (size if group["name"] == "tables" else 1.0)
    return optimizer, {g["name"]: [p.grad.clone() for p in g["params"]] for g in optimizer.param_groups}


def norm(tensors):
    return torch.stack([t.norm() for t in tensors]).norm()


def test_clipping_clips_each_of_tables_and_the_rest():
    optimizer, before = graded(1000.0)
    norms = clip(optimizer, 1.0)
    after = {g["name"]: [p.grad for p in g["params"]] for g in optimizer.param_groups}
    rest = norm(before["matrices"] + before["vectors"])
    torch.testing.assert_close(norms, {"rest": rest, "tables": norm(before["tables"])})
    torch.testing.assert_close(norm(after["matrices"] + after["vectors"]), torch.tensor(1.0))
    torch.testing.assert_close(norm(after["tables"]), torch.tensor(1.0))
    for old, new in zip(before["vectors"], after["vectors"], strict=True):
        torch.testing.assert_close(new, old / rest)


def test_small_gradients_and_no_clipping_change_nothing():
    for most, size in ((1e9, 1.0), (None, 100.0)):
        optimizer, before = graded(size)
        clip(optimizer, most)
        for group in optimizer.param_groups:
            for p, old in zip(group["params"], before[group["name"]], strict=True):
                assert torch.equal(p.grad, old)


def test_scaling_comes_before_clipping():
    optimizer, before = graded(1.0)
    norms = clip(optimizer, 1e9, torch.tensor(0.5))
    torch.testing.assert_close(norms["tables"], norm(before["tables"]) / 2)
    torch.testing.assert_close(norm([p.grad for g in optimizer.param_groups if g["name"] == "tables" for p in g["params"]]), norms["tables"])


def test_parameters_without_a_gradient_are_passed_over():
    optimizer, _ = build(nn.Linear(2, 2), OptimConfig(), 10)
    assert clip(optimizer, 1.0) == {}


WRONG = {"lr": 0.0, "betas": (0.9, 1.0), "eps": 0.0, "weight_decay": -1.0, "clip": 0.0, "decay": 0.0, "min_lr": 2.0, "warmup": -1, "memory_lr": -1.0}
WRONG |= {"memory_decay": 1.5}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_cannot_be_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        OptimConfig(**{name: WRONG[name]})


def test_a_rate_of_nothing_cannot_rise():
    with pytest.raises(ConfigError, match="do not learn"):
        OptimConfig(memory_lr=0.0, memory_decay=0.5)


def test_unknown_ways_to_step_tables_are_refused():
    with pytest.raises(ConfigError, match=r"dense.*lazy.*row"):
        decode(OptimConfig, {"tables": "sparse"})
