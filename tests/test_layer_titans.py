"""Titans: every layer against its formulas written out, what it sees and what it must not, and that it stays bounded; float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from memarch import LM, LMConfig, kernels
from memarch import state as states
from memarch.config import ConfigError
from memarch.kernels.neural_memory import neural_memory
from memarch.layers import AttentionConfig, SwiGLUConfig, TitansLMMConfig, TitansMACConfig, TitansMAGConfig, TitansMALConfig
from memarch.layers.parts.neural import Kind
from memarch.layers.parts.norm import l2_norm
from memarch.models.lm import BlockConfig
from zoo import DIM, F64, close, noisy

LMM = [config for config in TitansLMMConfig.examples() if not config.shift]
SMALL = TitansLMMConfig(heads=2, chunk=4, expand=2)
HYBRIDS = {
    "mag": TitansMAGConfig(attention=AttentionConfig(heads=2, window=5), memory=SMALL),
    "mal": TitansMALConfig(attention=AttentionConfig(heads=2, window=5), memory=SMALL),
    "mal-prefix": TitansMALConfig(prefix=True, attention=AttentionConfig(heads=2, window=5), memory=SMALL),
    "mac": TitansMACConfig(segment=8, heads=2, memory=SMALL),
}
hybrids = pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)


def inputs(T=30, B=2, seed=0):
    return torch.randn(B, T, DIM, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gates(layer, x):
    """log a, log eta, step, written out once more; without the brake."""
    kind = layer.memory.kind
    g = dict(zip([*["a"] * kind.decay, *["eta"] * kind.momentum, "step"], (layer.memory.gates(x) + layer.memory.gate_bias).split(kind.heads, -1), strict=True))
    a = g["a"].sigmoid() if kind.decay else torch.ones_like(g["step"])
    eta = g["eta"].sigmoid() if kind.momentum else torch.zeros_like(g["step"])
    return a, eta, kind.cap * (1 - eta) * (1 + a) / 2 * g["step"].sigmoid()


def convolved(layer, x):
    """q, k, v [B, T, H, K]"""
    qkv = layer.into.qkv(x)
    if layer.into.conv is not None:
        W = layer.into.conv.weight  # [E, taps]
        T, taps = x.shape[1], W.shape[1]
        qkv = F.pad(qkv, (0, 0, taps - 1, 0))
        qkv = sum(qkv[:, i : i + T] * W[:, i] for i in range(taps))
    q, k, v = F.silu(qkv).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (layer.into.heads, -1)) for y in (q, k, v))
    return l2_norm(q), l2_norm(k), v


def read_out(layer, o, x):
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.read.norm.weight
    o = o.flatten(2)
    return layer.read.out(o if layer.read.gate is None else o * F.silu(layer.read.gate(x)))


def answer(memory, weights, k):
    """M(k) of one row and head: k [K]."""
    z = k
    for i, W in enumerate(weights):
        if i:
            z = F.gelu(z) if memory.activation == "gelu" else F.silu(z)
        z = torch.cat([z, z.new_ones(len(W) - len(z))]) @ W
    if memory.post == "ln":
        z = F.layer_norm(z, z.shape, memory.gain, memory.bias, 1e-6)
    if memory.post == "rms":
        z = z / (z.square().mean() + 1e-6).sqrt() * memory.gain
    return z if memory.post == "none" else k + z


def by_definition(layer, x):
    """A loop over rows, heads and tokens with autograd of the loss: the paper's recurrence, the Omega rule's sum, TTT's mean."""
    kind, whole = layer.memory.kind, layer.memory.memory()
    q, k, v = convolved(layer, x)
    a, eta, step = gates(layer, x)
    out = torch.zeros_like(v)
    for b in range(len(x)):
        for h in range(kind.heads):
            one = whole._replace(gain=None if whole.gain is None else whole.gain[h], bias=None if whole.bias is None else whole.bias[h])
            first = [W[h].detach() for W in whole.weights]
            M, S, before = first, [torch.zeros_like(W) for W in first], 0.0
            for t in range(x.shape[1]):
                place = 0 if kind.chunk is None else t % kind.chunk
                if place == 0:
                    point = [W.detach().clone().requires_grad_() for W in M]
                    total = [torch.zeros_like(W) for W in M]
                g = [torch.zeros_like(W) for W in M]
                for i in range(max(t - place, t - kind.window + 1), t + 1):
                    grads = torch.autograd.grad((answer(one, point, k[b, i, h].detach()) - v[b, i, h].detach()).square().sum() / 2, point)
                    length = [y.norm() if kind.clip is None else max(y.norm() / kind.clip, torch.tensor(1.0)) for y in grads]
                    g = [y + d / (1 if kind.clip is None else n) for y, d, n in zip(g, grads, length, strict=True)]
                keep, theta = a[b, t, h].item(), step[b, t, h].item()
                if kind.ttt:
                    total = [y + theta * d for y, d in zip(total, g, strict=True)]
                    pull = max(1 / (place + 1) + layer.memory.pull[place].item(), 0)
                    M = [W.detach() - pull * y for W, y in zip(point, total, strict=True)]
                else:
                    e = eta[b, t, h].item()
                    if kind.momentum and kind.clip is None:
                        e, before = e * min(1.0, math.sqrt((1 - e) / (1 - before))), e
                    S = [e * s - theta * d for s, d in zip(S, g, strict=True)]
                    rest = first if kind.decay_to == "init" else [0.0] * len(M)
                    M = [keep * W + (1 - keep) * r + s for W, r, s in zip(M, rest, S, strict=True)]
                out[b, t, h] = answer(one, M, q[b, t, h].detach())
    return read_out(layer, out, x)


@pytest.mark.parametrize("config", LMM, ids=range(len(LMM)))
def test_the_memory_is_its_definition(config):
    """Titans with both gradient points and every norm, the Omega rule, TTT."""
    layer, x = noisy(config.build(DIM)), inputs(17)
    with torch.enable_grad():
        wanted = by_definition(layer, x)
    close(layer(x).y, wanted, "output", 1e-9)


@pytest.mark.parametrize("depth", [1, 2])
def test_ttt_linear_and_mlp(depth):
    layer, x = noisy(TitansLMMConfig(heads=2, depth=depth, grad_point="chunk", chunk=4, expand=2, ttt=True, momentum=False, decay=False).build(DIM)), inputs(11)
    close(layer(x).y, by_definition(layer, x), "output", 1e-9)


@pytest.mark.parametrize("config", [c for c in TitansLMMConfig.examples() if c.shift] + [TitansLMMConfig(heads=2, chunk=4, window=2, shift=True)], ids=str)
def test_a_value_is_stored_under_the_key_before_it(config):
    """The same as the memory that is given the keys one token late, from the second token on; the first one writes nothing."""
    layer, x = noisy(config.build(DIM)), inputs(17)
    (q, k, v), (a, eta, step), memory = convolved(layer, x), gates(layer, x), layer.memory
    late = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1)
    step = torch.cat([torch.zeros_like(step[:, :1]), step[:, 1:]], 1)
    o, _ = neural_memory(
        q, late, v, a.log(), eta.log() if config.momentum else None, step, memory=memory.memory(), clip=memory.kind.clip, impl="reference", **memory.form
    )  # fmt: skip
    close(layer(x).y, read_out(layer, o, x), "output", 1e-10)


# ------------------------------------------------------------------------------------------------ the three architectures


def turned(x, pos):
    """x [B, T, H, K] by pos [T]"""
    half = x.shape[-1] // 2
    angle = pos.to(F64)[:, None] * 10000.0 ** (-torch.arange(half, dtype=F64) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def dense(q, k, v, seen):
    """q [B, T, H, K], k, v [B, S, H, K], seen [T, S] -> [B, T, H K]"""
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(2)


def windowed(attention, z, window, P):
    """Rows of z see the last `window`, and the first P for ever."""
    T = z.shape[1]
    q, k, v = (y.unflatten(-1, (attention.heads, -1)) for y in attention.qkv(z).chunk(3, -1))
    q, k = turned(q, torch.arange(T)), turned(k, torch.arange(T))
    t, j = torch.arange(T)[:, None], torch.arange(T)
    return attention.out(dense(q, k, v, (j <= t) & ((t - j < window) | (j < P))))


def rms(norm, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def mixed(mix, y, m):
    y, m = rms(mix.first, y), rms(mix.second, m)
    return y * m.sigmoid() if mix.how == "gate" else (y + m) / 2


def with_persistent(layer, x):
    return torch.cat([layer.persistent.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("mix", ["gate", "mean"])
def test_mag_is_attention_gated_by_the_memory(P, mix):
    layer, x = noisy(TitansMAGConfig(persistent=P, mix=mix, attention=AttentionConfig(heads=2, window=5), memory=SMALL).build(DIM)), inputs()
    z = with_persistent(layer, x)
    wanted = mixed(layer.mix, windowed(layer.attention, z, 5, P), layer.memory(z).y)
    close(layer(x).y, wanted[:, P:], "output", 1e-10)


@pytest.mark.parametrize("P, prefix", [(0, False), (3, False), (3, True)])
def test_mal_is_attention_over_the_memory(P, prefix):
    layer, x = noisy(TitansMALConfig(persistent=P, prefix=prefix, attention=AttentionConfig(heads=2, window=5), memory=SMALL).build(DIM)), inputs()
    z = rms(layer.norm, layer.memory(with_persistent(layer, x)).y)
    close(layer(x).y, windowed(layer.attention, z, 5, P * prefix)[:, P:], "output", 1e-10)


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("memory", [SMALL, TitansLMMConfig(heads=2, depth=1)], ids=["mlp", "linear"])
def test_mac_segment_by_segment(P, positions, memory):
    C = 8
    layer, x = noisy(TitansMACConfig(segment=C, persistent=P, heads=2, positions=positions, memory=memory).build(DIM)), inputs(29)
    inner = layer.inner
    state, outs = inner.memory.start(2), []
    for z in x.split(C, 1):
        L = z.shape[1]
        q = l2_norm(F.silu(z @ inner.memory.into.qkv.weight[:DIM].mT).unflatten(-1, (2, -1)))
        whole = inner.memory.memory.memory()
        told = torch.zeros_like(q)
        for b in range(2):
            for h in range(2):
                one = whole._replace(gain=None if whole.gain is None else whole.gain[h], bias=None if whole.bias is None else whole.bias[h])
                for t in range(L):
                    told[b, t, h] = answer(one, [W[b, h] for W in state.memory.memory.weights], q[b, t, h])
        hs = rms(inner.h_norm, read_out(inner.memory, told, z))
        rows = [inner.persistent.expand(2, -1, -1), hs, z]
        place = torch.arange(L)
        keys, values = inner.kv(torch.cat(rows, 1)).chunk(2, -1)
        keys, values, queries = (y.unflatten(-1, (2, -1)) for y in (keys, values, inner.q(z)))
        if positions == "rope":
            keys = torch.cat([keys[:, :P], turned(keys[:, P : P + L], place), turned(keys[:, P + L :], place)], 1)
            queries = turned(queries, place)
        past = place <= place[:, None]
        y = z + inner.out(dense(queries, keys, values, torch.cat([torch.ones(L, P, dtype=torch.bool), past, past], 1)))
        m = inner.memory(rms(inner.y_norm, y), state)
        state = m.state
        outs.append(mixed(inner.mix, y, m.y))
    close(layer(x).y, torch.cat(outs, 1), "output", 1e-9)


# ------------------------------------------------------------------------------------------------ what is seen


@hybrids
def test_no_token_sees_the_future(config):
    """Bit for bit, wherever in two segments the change is: what leaks inside a segment or chunk, leaks for some places only."""
    layer, x = noisy(config.build(DIM)), inputs(16)
    before = layer(x).y
    for t in range(16):
        other = x.clone()
        other[:, t] += 1
        after = layer(other).y
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} is seen before it comes"
        assert (after[:, t:] != before[:, t:]).any(-1).all(), f"token {t} is forgotten within sixteen tokens"


@hybrids
def test_persistent_tokens_reach_every_position(config):
    layer, x = noisy(config.build(DIM)), inputs(40, 1)
    persistent = next(p for name, p in layer.named_parameters() if name.endswith("persistent"))
    y = layer(x).y
    for t in range(40):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), persistent, retain_graph=True)
        assert (grad.abs().amax(-1) > 0).all(), f"position {t}"


def test_mac_remembers_across_segments_by_its_memory_alone():
    """Without writing, a segment knows nothing of those before it."""
    layer, x = noisy(HYBRIDS["mac"].build(DIM)), inputs(32)
    other = x.clone()
    other[:, 3] += 1
    assert (layer(other).y[:, 24:] != layer(x).y[:, 24:]).any(-1).all()
    memory = layer.inner.memory.memory
    with torch.no_grad():
        memory.gates.weight.zero_()
        memory.gate_bias[-2:] = -torch.inf  # step 0
    close(layer(other).y[:, 24:], layer(x).y[:, 24:], "the fourth segment", 1e-12)


@pytest.mark.parametrize("config", [SMALL, *HYBRIDS.values()], ids=lambda c: c.kind)
def test_decoding_writes_without_gradients(config):
    layer, x = noisy(config.build(DIM)), inputs(20)
    wanted = layer(x).y
    layer.eval()
    with torch.inference_mode():
        state, outs = layer.start(2), []
        for token in x.split(1, 1):
            out = layer(token, state)
            state = out.state
            outs.append(out.y)
    close(torch.cat(outs, 1), wanted, "output", 1e-10)


def test_mac_writes_each_token_into_one_chunk():
    """Every segment begins with a chunk, so the memory works as much as it would without segments."""
    config, x = HYBRIDS["mac"], inputs(64)

    def products(layer):
        with kernels.flop_counter() as counter, torch.enable_grad():
            layer(x)
        return {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "neural_memory" in str(op)}

    alone, inside = (products(noisy(c.build(DIM))) for c in (config.memory, config))
    assert alone == inside and len(alone) == 1


# ------------------------------------------------------------------------------------------------ learning

PAIRS, KINDS = 4, 8  # pairs of a row; kinds of keys, and of values


def told_and_asked(rows, generator):
    """-> tokens [rows, 3 PAIRS], key value key value .., then the keys in another order; and the values that they ask for"""
    keys = torch.rand(rows, KINDS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KINDS, 2 * KINDS, (rows, PAIRS), generator=generator)
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    return torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1), values.gather(1, order)


def learned(mixer, steps, rate, frozen=False):
    """The share of values that two layers recall after training; `frozen`: nothing is ever written."""
    part = BlockConfig(mixer=mixer, ffn=SwiGLUConfig(hidden=64))
    model = LM(LMConfig(vocab_size=2 * KINDS, dim=32, layers=2, pattern="M", parts={"M": part}))
    for name, p in model.named_parameters():
        if frozen and name.endswith("gate_bias"):
            p.requires_grad_(False)[-2:] = -torch.inf  # the steps of two heads
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - i / steps)
        tokens, values = told_and_asked(32, generator)
        optimiser.zero_grad()
        F.cross_entropy(model(tokens).logits[:, -PAIRS:].mT, values).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        tokens, values = told_and_asked(1000, generator)
        return (model(tokens).logits[:, -PAIRS:].argmax(-1) == values).double().mean().item()


@pytest.mark.parametrize("momentum", [True, False])
def test_it_learns_to_recall(momentum):
    """A guess is right once in eight times."""
    assert learned(TitansLMMConfig(heads=2, depth=1, momentum=momentum, init="recall"), 100, 1e-2) > 0.6


@pytest.mark.slow
def test_mac_recalls_what_an_earlier_segment_was_told():
    """Which its attention alone, inside of segments, cannot know."""
    memory = TitansLMMConfig(heads=2, depth=1, shift=True, conv=0)
    config = TitansMACConfig(segment=2 * PAIRS, persistent=0, heads=2, memory=memory)
    assert learned(config, 600, 5e-3) > 0.8
    assert learned(config, 600, 5e-3, frozen=True) < 0.2


# ------------------------------------------------------------------------------------------------ gates, gauges, errors


def test_half_lives_at_init():
    layer = TitansLMMConfig(heads=64, head_dim=4).build(DIM)
    decay, momentum, step = layer.memory.steer(torch.zeros(1, 1, DIM))
    half_life = (math.log(0.5) / decay).flatten()
    assert 16 <= half_life.min() < 32 and 1024 < half_life.max() <= 2048.5
    close(momentum.exp(), torch.full_like(momentum, 0.5), "momentum", 1e-6)
    close(step, 0.25 * 0.5 * 0.5 * (1 + decay.exp()) / 2, "step", 1e-6)


def test_an_mlp_that_forgets_to_zero_dies():
    """At a half-life of sixteen tokens: hence the other default."""
    x = torch.randn(1, 1024, 32, generator=torch.Generator().manual_seed(0))
    for decay_to, alive in (("zero", False), (None, True)):
        layer = TitansLMMConfig(heads=1, post="none", decay_to=decay_to).build(32)
        with torch.no_grad():
            layer.memory.gate_bias[0] = 3.1
            weights = layer(x).state.memory.memory.weights
        assert all((W.norm() > 1) == alive for W in weights)
        assert alive or all(W.norm() < 1e-6 for W in weights)


def test_gauges_are_of_the_last_token():
    layer, x = noisy(SMALL.build(DIM)), inputs(9)
    out = layer(x)
    _, k, v = convolved(layer, x)
    a, _, step = gates(layer, x)
    weights = out.state.memory.memory.weights
    norm = sum(W.square().sum((2, 3)) for W in weights).sqrt().mean()
    miss = x.new_zeros(())
    for b, h in itertools.product(range(2), range(2)):
        one = layer.memory.memory()._replace(gain=layer.memory.gain[h], bias=layer.memory.bias[h])
        miss += (answer(one, [W[b, h] for W in weights], k[b, -1, h]) - v[b, -1, h]).norm() / 4
    for name, value in {"norm": norm, "miss": miss, "decay": a[:, -1].mean(), "step": step[:, -1].mean()}.items():
        close(out.aux[name], value.detach(), name, 1e-10)
    padded = layer(torch.cat([x, inputs(5, seed=1)], 1), lengths=torch.tensor([9, 9]))
    for name, value in out.aux.items():
        close(padded.aux[name], value, name, 1e-10)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TitansLMMConfig(depth=1, clip=1.0), "clip"),
        (lambda: TitansLMMConfig(depth=1, grad_point="exact", window=2), "window"),
        (lambda: TitansLMMConfig(ttt=True), "momentum and decay"),
        (lambda: TitansLMMConfig(ttt=True, grad_point="exact", momentum=False, decay=False), "grad_point"),
        (lambda: TitansMAGConfig(attention=AttentionConfig()), "window"),
        (lambda: TitansMALConfig(attention=AttentionConfig(window=4, prefix=2)), "persistent"),
        (lambda: TitansMACConfig(segment=60), "divide"),
    ],
)
def test_a_config_that_cannot_be_says_why(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# ------------------------------------------------------------------------------------------------ stability

HOSTILE = ["random", "positive", "one key", "one pair", "there and back", "far", "jumps"]
FORMS = {
    "exact": TitansLMMConfig(heads=1, depth=1),
    "matrix": TitansLMMConfig(heads=1, depth=1, grad_point="chunk"),
    "mlp": TitansLMMConfig(heads=1),
    "plain mlp": TitansLMMConfig(heads=1, post="none"),
    "ttt linear": TitansLMMConfig(heads=1, depth=1, chunk=16, grad_point="chunk", ttt=True, momentum=False, decay=False),
    "ttt mlp": TitansLMMConfig(heads=1, chunk=16, ttt=True, momentum=False, decay=False),
}


def hostile(kind, T, K):
    k, v = torch.randn(1, T, 1, K), torch.randn(1, T, 1, K)
    if kind == "positive":
        k = F.silu(k)
    if kind in ("one key", "one pair", "there and back", "far", "jumps"):
        k = k[:, :1].expand_as(k)
    if kind in ("one pair", "there and back", "far"):
        v = v[:, :1].expand_as(v)
    if kind == "there and back":
        k = k * (1 - 2 * (torch.arange(T) // 64 % 2))[:, None, None]
    return F.normalize(k, dim=-1), v * 1e4 if kind == "far" else v


def largest(config, kind, T, dtype, every=50):
    """The largest norm of a layer of the memory at the largest step, a row for every choice of extreme gates (TTT has no other gate than its step).
    `jumps`: the last of them goes from one extreme to the other and back every so many tokens; a momentum that does pushes an exact memory as one
    pushes a swing."""
    torch.manual_seed(0)
    memory = config.build(32).memory
    gates = len(memory.gate_bias)
    driven = max(1, gates - 1)
    extremes = torch.cartesian_prod(*[torch.tensor([-30.0, 0.0, 30.0])] * driven).view(-1, 1, driven)
    k, v = (y.to(dtype).expand(len(extremes), -1, -1, -1) for y in hostile(kind, T, 32))
    x = torch.zeros(len(extremes), T, 32)
    x[..., :driven] = extremes
    if kind == "jumps":
        x[:, ::every, driven - 1] *= -1
    state, worst = None, 0.0
    with torch.no_grad():
        memory.gates.weight.copy_(torch.eye(gates, 32))
        memory.gate_bias.zero_()
        if driven < gates:
            memory.gates.weight[-1], memory.gate_bias[-1] = 0, 30
        for at in torch.arange(T).split(256):
            o, state, _ = memory(x[:, at], k[:, at], k[:, at], v[:, at], state, None)
            worst = max([worst, *(W.flatten(1).norm(dim=1).max().item() for W in state.memory.weights)])
            if not o.isfinite().all():
                return math.inf
    return worst


def bound(config, kind, T):
    """Exact: what answers K orthogonal keys with the longest value. Else the start, and a thousand pushes of full length: no push lasts longer, and the
    gradient has turned by then. A target out of reach pulls all the time. TTT moves by the mean of a chunk's pushes, and never forgets."""
    made = config.memory(32)
    if made.clip is None:
        return 32**0.5 * hostile_values(kind, T)
    if made.ttt:
        return 32**0.5 * 2 + made.cap * made.clip * -(-T // made.chunk)
    return 32**0.5 * 2 + made.cap * made.clip * (T if kind == "far" else 1000)


def hostile_values(kind, T):
    torch.manual_seed(0)
    return hostile(kind, T, 32)[1].norm(dim=-1).max().item()


def stays_bounded(form, kind, dtype, T):
    config = FORMS[form]
    found = largest(config, kind, T, dtype)
    assert found < bound(config, kind, T)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dtypes
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("form", FORMS)
def test_the_memory_stays_bounded(form, kind, dtype):
    stays_bounded(form, kind, dtype, 4096)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("form", FORMS)
def test_the_memory_stays_bounded_for_64k_tokens(form, kind, dtype):
    stays_bounded(form, kind, dtype, 65536)


LONG = {
    "mag": TitansMAGConfig(attention=AttentionConfig(heads=2, window=64), memory=TitansLMMConfig(heads=2)),
    "mal": TitansMALConfig(attention=AttentionConfig(heads=2, window=64), memory=TitansLMMConfig(heads=2)),
    "mac": TitansMACConfig(segment=64, heads=2, memory=TitansLMMConfig(heads=2)),
}


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("kind", ["random", "one token", "far"])
@pytest.mark.parametrize("name", LONG)
def test_the_architectures_stay_bounded_for_8k_tokens(name, kind, dtype):
    """By what the guards say alone: no push is longer than cap clip, and there is one for every token. `far`: one token, whose value is out of reach."""
    config, T = LONG[name], 8192
    made = config.memory.memory(32)
    torch.manual_seed(0)
    x = torch.randn(1, T if kind == "random" else 1, 32).expand(1, T, 32)
    for decay, momentum in itertools.product((-30.0, 30.0), repeat=2):
        layer = config.build(32).to(dtype)
        lmm = (layer.inner if name == "mac" else layer).memory
        memory = lmm.memory
        with torch.no_grad():
            lmm.into.qkv.weight[-32:] *= 1e4 if kind == "far" else 1
            memory.gates.weight.zero_()
            memory.gate_bias.copy_(torch.tensor([decay, momentum, 30.0]).repeat_interleave(2))
            out = layer(x.to(dtype))
        weights = [w for leaf, w in states.leaves(out.state) if ".weights." in leaf]
        assert len(weights) == len(memory.first) and out.y.isfinite().all()
        for w, first in zip(weights, memory.first, strict=True):
            assert (w - first).flatten(2).norm(dim=2).max() <= made.cap * made.clip * (T + config.persistent), (decay, momentum)


def test_without_its_guards_it_does_not(monkeypatch):
    """One repeated key, or a target out of reach, without the clip; momentum that jumps without the brake."""
    for form, kind in (("matrix", "one key"), ("plain mlp", "one key"), ("ttt linear", "far"), ("ttt mlp", "far")):
        config = FORMS[form]
        assert largest(replace(config, clip=0.0), kind, 4096, torch.float32) > bound(config, kind, 4096), form
    monkeypatch.setattr(Kind, "brake", False)
    assert largest(FORMS["exact"], "jumps", 4096, torch.float32) > 1e6


@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_have_finite_gradients(form):
    layer, x = FORMS[form].build(32), torch.randn(2, 130, 32, requires_grad=True)
    for gates in itertools.product((-30.0, 30.0), repeat=len(layer.memory.gate_bias)):
        with torch.no_grad():
            layer.memory.gate_bias.copy_(torch.tensor(gates))
        grads = torch.autograd.grad(layer(x).y.square().sum(), [x, *layer.parameters()])
        assert all(grad.isfinite().all() for grad in grads), gates


def test_the_push_is_the_gradient_of_what_is_missed():
    """Of all layers together, by autograd, before the clip."""
    layer, x = noisy(SMALL.build(DIM)), inputs(9)
    out = layer(x)
    _, k, v = convolved(layer, x)
    size = x.new_zeros(())
    for b, h in itertools.product(range(2), range(2)):
        one = layer.memory.memory()._replace(gain=layer.memory.gain[h], bias=layer.memory.bias[h])
        W = [w[b, h].detach().requires_grad_() for w in out.state.memory.memory.weights]
        grads = torch.autograd.grad((answer(one, W, k[b, -1, h].detach()) - v[b, -1, h].detach()).square().sum() / 2, W)
        size += sum(g.square().sum() for g in grads).sqrt() / 4
    close(out.aux["push"], size, "push", 1e-10)
    close(layer(torch.cat([x, inputs(5, seed=1)], 1), lengths=torch.tensor([9, 9])).aux["push"], size, "push of padded rows", 1e-10)
