"""Based's linear attention: against its formula, its two normalisers, its sizes. The laws are in test_laws."""

import pytest
import torch

from memarch import create_model
from memarch import state as states
from memarch.config import ConfigError
from memarch.layers.based import BasedConfig

F64 = torch.float64


def formula(layer, x: torch.Tensor) -> torch.Tensor:
    """[B, T, H V]: weights 1 + a + a^2/2 with a = q.k / sqrt(F), all T^2 of them, divided by their sum."""
    q, k, v = (part.unflatten(-1, (layer.heads, -1)) for part in layer.into.qkv(x).split(layer.into.sizes, -1))
    a = torch.einsum("bthf,bshf->bhts", q, k) / layer.feature**0.5
    w = (1 + a + a.square() / 2).tril()
    return torch.einsum("bhts,bshv->bthv", w / w.sum(-1, keepdim=True), v).flatten(2)


@pytest.mark.parametrize("T", [1, 2, 40, 300])
def test_it_is_the_published_formula(T):
    layer = BasedConfig(heads=2, feature_dim=5, head_dim=3).build(8).to(F64)
    x = 3 * torch.randn(2, T, 8, dtype=F64)
    torch.testing.assert_close(layer(x).y, layer.out(formula(layer, x)))


def before_out(layer, x: torch.Tensor) -> torch.Tensor:
    """What the output map is given, [B, T, H, V]."""
    read = []
    layer.out.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    layer(x)
    return read[0].unflatten(-1, (layer.heads, -1))


def test_with_the_denominator_it_is_a_mean_of_values():
    """Equal values come back as they are, after one token and after many."""
    layer = BasedConfig(heads=2, feature_dim=4).build(8).to(F64)
    values = torch.randn(8, 1, dtype=F64)
    with torch.no_grad():
        layer.into.qkv.weight[-8:] = values  # a value is this times the sum of the input, and that sum is 1
    x = torch.randn(1, 50, 7, dtype=F64)
    read = before_out(layer, torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1))
    torch.testing.assert_close(read, values.view(1, 1, 2, 4).expand(1, 50, 2, 4))


def test_with_rms_every_head_has_unit_size():
    layer = BasedConfig(heads=2, feature_dim=4, normalize="rms").build(8).to(F64)
    size = before_out(layer, torch.randn(1, 50, 8, dtype=F64)).square().mean(-1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-2, atol=1e-2)


def test_the_state_is_packed_and_constant():
    """Spec of the published sizes: H (V + 1) E elements with E = 153 for F = 16; d = 64 with one head is zoology's 4 x 65 x 153 bytes."""
    layer = BasedConfig(heads=1).build(64)
    assert layer.start(1).memory.shape == (1, 1, 153, 65)
    assert states.nbytes(layer.start(1)) == 4 * 65 * 153 == 39780
    state = layer(torch.randn(3, 7, 64)).state
    assert states.nbytes(layer(torch.randn(3, 1, 64), state).state) == 3 * 39780


def test_sums_stay_float32_in_bfloat16():
    layer = BasedConfig(heads=2, feature_dim=4, conv=2).build(8).bfloat16()
    h = layer(torch.randn(2, 20, 8).bfloat16())
    assert h.y.dtype == torch.bfloat16 and h.state.memory.dtype == torch.float32 and h.state.tail.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(2, 20, 8)).state.memory.dtype == torch.float32


def test_pads_do_not_divide_by_zero():
    """A row without tokens has no weights to divide by: outputs and gradients stay finite, and the parameters feel nothing of it."""
    layer = BasedConfig(heads=2, feature_dim=4).build(8).to(F64)
    x = torch.randn(2, 6, 8, dtype=F64).requires_grad_()
    h = layer(x, lengths=torch.tensor([0, 6]))
    h.y.square().sum().backward()
    assert h.y.isfinite().all() and x.grad.isfinite().all() and (x.grad[0] == 0).all()
    alone = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x[1:].detach()).y.square().sum().backward()
    for a, p in zip(alone, layer.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_recall_starts_with_keys_equal_to_queries():
    layer = BasedConfig(heads=2, feature_dim=4, init="recall", conv=3).build(8)
    q, k, _ = layer.into.qkv.weight.split(layer.into.sizes)
    assert torch.equal(q, k)
    q, k, _ = BasedConfig(heads=2, feature_dim=4).build(8).into.qkv.weight.split(layer.into.sizes)
    assert not torch.equal(q, k)


def test_the_tiny_preset_has_the_published_order():
    """Convolution, linear attention, window: the period of the paper's stack, shortened."""
    config = create_model("based-tiny", device="meta").config
    assert [config.block(i).mixer.kind for i in range(config.layers)] == ["short_conv", "based", "attention"]


@pytest.mark.parametrize(
    "change, message",
    [({"heads": 0}, "heads"), ({"feature_dim": 0}, "feature_dim"), ({"conv": -1}, "conv counts taps")],
)
def test_errors_teach(change, message):
    with pytest.raises(ConfigError, match=message):
        BasedConfig(**change)


def test_heads_divide_the_width_or_head_dim_is_set():
    with pytest.raises(ConfigError, match="must divide dim"):
        BasedConfig(heads=3).build(8)
    assert BasedConfig(heads=3, head_dim=4).build(8)(torch.randn(1, 2, 8)).y.shape == (1, 2, 8)
