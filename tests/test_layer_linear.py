"""The recurrences over one op, held against their definitions and against each other; float64."""

import torch
from torch.nn import functional as F

from memarch.layers import DeltaNetConfig, GatedDeltaConfig, LinearAttentionConfig, RetNetConfig
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
