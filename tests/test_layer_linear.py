"""The recurrences over one op, held against their definitions and against each other; float64."""

import pytest
import torch
from torch.nn import functional as F

from memarch import kernels
from memarch import state as states
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.gated_linear import gated_linear
from memarch.layers import (
    AttentionConfig,
    BaseConvConfig,
    BaseConvMQARConfig,
    BasedConfig,
    DeltaNetConfig,
    GatedDeltaConfig,
    GLAConfig,
    LinearAttentionConfig,
    Mamba2Config,
    RetNetConfig,
)
from memarch.layers.parts.rope import rotate
from zoo import DIM, F64, close, noisy


def inputs(T=70):
    return torch.randn(2, T, DIM, dtype=F64)


def heads(layer, x):
    return [part.unflatten(-1, (layer.heads, -1)) for part in layer.into.qkv(x).split(layer.into.sizes, -1)]


def test_gated_delta_that_never_forgets_is_delta_net():
    gated = noisy(GatedDeltaConfig(heads=2, gate=False).build(DIM))
    plain = noisy(DeltaNetConfig(heads=2).build(DIM))
    with torch.no_grad():
        gated.A_log.fill_(-1e9)  # exp is 0: the decay is 1
        plain.into.load_state_dict(gated.into.state_dict())
        plain.read.load_state_dict(gated.read.state_dict())
        plain.b.weight.copy_(gated.ab.weight[2:])
    x = inputs()
    close(plain(x).y, gated(x).y, "output", 1e-12)


def test_negative_doubles_the_write_strength():
    a, b = (noisy(DeltaNetConfig(heads=2, negative=n).build(DIM)) for n in (False, True))
    x = inputs(1)  # into an empty memory the first token writes in proportion to its strength
    close(b(x).state.memory, 2 * a(x).state.memory, "memory", 1e-12)


def test_retention_is_its_parallel_form():
    layer = noisy(RetNetConfig(heads=3, head_dim=4, value_dim=6).build(DIM))
    x = inputs()
    q, k, v = heads(layer, x)
    at = torch.arange(x.shape[1]).expand(2, -1)
    q, k = rotate(q, at, 10000.0), rotate(k, at, 10000.0)
    far = (at[0][:, None] - at[0]).to(F64)
    gamma = 1 - 2.0 ** -(5 + torch.arange(3, dtype=F64))
    D = torch.where(far >= 0, gamma[:, None, None] ** far, 0.0)  # [H, T, T]
    o = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, D, v) / 2
    close(layer(x).y, layer.read(o, x), "output", 1e-10)


def test_linear_attention_is_a_weighted_mean():
    layer = noisy(LinearAttentionConfig(heads=2).build(DIM))
    x = inputs()
    q, k, v = heads(layer, x)
    w = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    o = torch.einsum("bhts,bshv->bthv", w / w.sum(-1, keepdim=True), v)
    close(layer(x).y, layer.read(o, x), "output", 1e-10)


def test_linear_attention_with_learned_features():
    layer = noisy(LinearAttentionConfig(heads=2, feature="product").build(DIM))
    x = inputs()
    q, k, v = heads(layer, x)
    a, b, c, d = layer.maps
    w = torch.einsum("bthk,bshk->bhts", (q @ a) * (q @ b), (k @ c) * (k @ d)).tril() * layer.key**-0.5
    close(layer(x).y, layer.read(torch.einsum("bhts,bshv->bthv", w, v), x), "output", 1e-10)


def test_gla_is_its_parallel_form():
    """w_ts = sum_d q_td k_sd prod_{s < i <= t} a_id, with a the gate of the paper."""
    layer = noisy(GLAConfig(heads=2, rank=3, temper=4.0, bias=1.0).build(DIM))
    x = inputs(40)
    q, k, v = heads(layer, x)
    assert k.shape[-1] == DIM // 4
    assert v.shape[-1] == DIM // 2
    a = torch.sigmoid(layer.up(layer.low(x))).unflatten(-1, (2, -1)) ** (1 / 4)  # [B, T, H, K]
    o = torch.zeros_like(v)
    for t in range(40):
        for s in range(t + 1):
            w = (q[:, t] * k[:, s] * a[:, s + 1 : t + 1].prod(1)).sum(-1) / 2
            o[:, t] += w[..., None] * v[:, s]
    close(layer(x).y, layer.read(o, x), "output", 1e-10)


def test_gla_with_one_gate_for_all_channels_is_the_scalar_decay():
    g = -torch.rand(2, 70, 3, dtype=F64)
    q, k, v = (torch.randn(2, 70, 3, 5, dtype=F64) for _ in range(3))
    state = torch.randn(2, 3, 5, 5, dtype=F64)
    for a, b in zip(gated_linear(q, k, v, g[..., None].expand_as(k), state), delta_rule(q, k, v, None, g, state), strict=True):
        close(a, b, "one gate", 1e-12)


def test_base_conv_is_its_formula():
    layer = noisy(BaseConvConfig(bias=True).build(DIM))
    x = inputs()
    u, z = layer.into(x).chunk(2, -1)
    u = F.conv1d(F.pad(u.mT, (2, 0)), layer.conv.weight[:, None], layer.conv.bias, groups=2 * DIM).mT
    close(layer(x).y, layer.out(F.silu(u) * z), "output", 1e-12)


def test_base_conv_mqar_is_its_formula():
    layer = noisy(BaseConvMQARConfig().build(DIM))
    x = inputs()
    u = F.conv1d(F.pad(x.mT, (2, 0)), layer.conv.weight[:, None], layer.conv.bias, groups=DIM).mT
    close(layer(x).y, x + u * layer.map(x), "output", 1e-12)


def test_state_sizes_are_the_published_ones():
    """The bytes that zoology plots (spec 4.1), without its convolution layer's 12 d and without a mixer's own tail."""
    gated, plain = GatedDeltaConfig(heads=2, value_dim=64), DeltaNetConfig(heads=2)
    for config, dim, published in ((gated, 64, 17_152), (plain, 64, 8_960), (BasedConfig(heads=1), 64, 40_548), (BasedConfig(heads=1), 128, 80_484)):
        assert states.nbytes(config.build(dim).start(1).memory) + 12 * dim == published
    assert 2 * states.nbytes(Mamba2Config(state=16).build(64).start(1).memory) == 16_384  # two such layers, no convolution layer
    ring = AttentionConfig(heads=1, window=64).build(128)
    assert sum(x.numel() * 4 // 63 * 64 for name, x in states.leaves(ring.start(1)) if x.ndim == 4) + 12 * 128 == 67_072  # we hold w - 1 of w keys


# ------------------------------------------------------------------------------------------------ what the recurrences must do (spec, P5 and 1.5)


def recall(T=6, K=8, V=5):
    k = torch.linalg.qr(torch.randn(K, K, dtype=F64))[0][:T].view(1, T, 1, K)  # orthonormal keys
    return k, torch.randn(1, T, 1, V, dtype=F64)


def test_a_delta_memory_gives_back_what_it_stored():
    k, v = recall()
    one = torch.ones(1, 6, 1, dtype=F64)
    _, S = delta_rule(k, k, v, one, None)
    close(torch.einsum("btk,bkv->btv", k[:, :, 0], S[:, 0]), v[:, :, 0], "read", 1e-12)


def test_a_repeated_key_is_overwritten_by_the_delta_rule_and_added_to_without():
    k, v = recall(1)
    k, v = k.expand(1, 2, 1, -1), torch.cat([v, torch.randn_like(v)], 1)
    one = torch.ones(1, 2, 1, dtype=F64)
    close(delta_rule(k, k, v, one, None)[0][:, 1], v[:, 1], "overwritten", 1e-12)
    close(delta_rule(k, k, v, None, None)[0][:, 1], v.sum(1), "added", 1e-12)


def test_writing_with_strength_0_only_decays():
    k, v = recall()
    zero, g, S = torch.zeros(1, 6, 1, dtype=F64), -torch.rand(1, 6, 1, dtype=F64), torch.randn(1, 1, 8, 5, dtype=F64)
    close(delta_rule(k, k, v, zero, g, S)[1], S * g.sum().exp(), "memory", 1e-12)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 35.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_gate_overflows(T, strength, dtype):
    """From a memory that keeps everything to one that is emptied by every token, also both at once: outputs, states and gradients finite and right."""
    q, k, v = (torch.randn(2, T, 2, 6, dtype=dtype) for _ in range(3))
    k = F.normalize(k, dim=-1)
    mixed = torch.where(torch.rand(2, T, 2) < 0.5, strength, 0.01 * torch.rand(2, T, 2)).to(dtype)  # what keeps must not lose digits beside what empties
    for gates in (torch.full_like(mixed, strength), mixed):
        for call, g in (
            (lambda q, k, v, g: delta_rule(q, k, v, torch.full_like(g, 0.5), g), -gates),
            (lambda q, k, v, g: delta_rule(q, k, v, None, g), -gates),
            (gated_linear, -gates[..., None] * torch.tensor([1, 0, 1, 0.5, 1e-3, 1], dtype=dtype)),
        ):
            given = [x.clone().requires_grad_() for x in (q, k, v, g)]
            out = call(*given)
            grads = torch.autograd.grad(sum(x.square().sum() for x in out), given, materialize_grads=True)
            assert all(x.isfinite().all() for x in (*out, *grads))
            if T <= 65:
                with kernels.using("reference"):
                    truth = call(q.double(), k.double(), v.double(), g.double())
                for x, y in zip(out, truth, strict=True):
                    assert (x.double() - y).norm() <= (2e-6 if dtype == torch.float32 else 1e-13) * y.norm()
