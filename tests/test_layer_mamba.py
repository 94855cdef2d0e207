"""Mamba against its formula, its published initialisation and its published sizes; against transformers' own in test_convert.py."""

import math

import pytest
import torch
from torch.nn import functional as F

from memarch import create_model, kernels
from memarch.kernels import native
from memarch.layers import MambaConfig
from memarch.layers import mamba as layers
from memarch.optim import OptimConfig, param_groups
from zoo import DIM, F64, close, noisy, same_state


def test_it_is_its_formula():
    layer = noisy(MambaConfig(state=3, conv=2, expand=3, rank=2, bias=True).build(DIM))
    u = torch.randn(2, 40, DIM, dtype=F64)
    x, z = (u @ layer.into.weight.T + layer.into.bias).chunk(2, -1)
    x = F.pad(x, (0, 0, 1, 0))
    x = F.silu(x[:, :-1] * layer.conv.weight[:, 0] + x[:, 1:] * layer.conv.weight[:, 1] + layer.conv.bias)  # the last tap is the token itself
    p, B, C = (x @ layer.select.weight.T).split([2, 3, 3], -1)
    dt, A = (1 + (p @ layer.dt.weight.T + layer.dt.bias).exp()).log(), -layer.A_log.exp()
    h, out = torch.zeros(2, 3 * DIM, 3, dtype=F64), []
    for t in range(40):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + layer.D * x[:, t])
    y = (torch.stack(out, 1) * F.silu(z)) @ layer.out.weight.T + layer.out.bias
    found = layer(u)
    close(found.y, y, "output", 1e-10)
    close(found.state.memory, h, "memory", 1e-10)


def test_it_shares_what_it_reads_and_how_large_its_steps_are():
    """The readout is h C + D x, before the gate; posting changes nothing but rounding. One layer with the weights of the other, over two pieces."""
    plain, sharing = (noisy(MambaConfig(state=3, share=share).build(DIM)) for share in ((), ("readout", "step")))
    assert plain.writes == () and sharing.writes == ("readout", "step") and not plain(torch.randn(1, 2, DIM, dtype=F64)).note
    u, state, given = torch.randn(2, 40, DIM, dtype=F64), None, {}

    def spy(x, dt, A, B, C, D, z, memory, lengths):
        given.update(x=x, dt=dt, A=A, B=B, C=C, D=D)
        return scan(x, dt, A, B, C, D, z, memory, lengths=lengths)

    scan, whole = layers.selective_scan, plain(u)
    h, ys = torch.zeros(2, 2 * DIM, 3, dtype=F64), []
    for piece in u.split([13, 27], 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "selective_scan", spy)
            found = sharing(piece, state)
        state = found.state
        ys.append(found.y)
        for t in range(piece.shape[1]):
            x, dt, B, C = (given[name][:, t] for name in ("x", "dt", "B", "C"))
            h = (dt[..., None] * given["A"]).exp() * h + (dt * x)[..., None] * B[:, None]
            close(found.note["readout"].y[:, t], (h * C[:, None]).sum(-1) + given["D"] * x, "readout", 1e-12)
            close(found.note["step"].dt[:, t], dt.mean(-1), "step", 1e-12)
    close(torch.cat(ys, 1), whole.y, "output", 1e-12)
    same_state(state, whole.state, "state", 1e-12)


def test_the_init_is_the_published_one():
    depth, dim = 9, 64
    layer = MambaConfig(bias=True).build(dim, depth=depth)
    assert torch.equal(layer.A_log, torch.arange(1, 17).log().expand(128, 16)), "S4D-real: 1 .. N in every channel"
    assert (layer.D == 1).all()
    fan_in = {"into": dim, "select": 128, "dt": 4, "out": 128}
    bounds = {f"{name}.weight": n**-0.5 for name, n in fan_in.items()} | {"conv.weight": 0.5, "conv.bias": 0.5}
    bounds["out.weight"] /= math.sqrt(depth)
    for name, bound in bounds.items():
        most = layer.get_parameter(name).abs().max().item()
        assert 0.9 * bound < most <= bound, name
    assert not layer.into.bias.any() and not layer.out.bias.any()


def test_steps_begin_log_uniform_between_their_limits():
    step = F.softplus(MambaConfig().build(2048).dt.bias.double())
    assert 1e-3 - 1e-6 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.1 + 1e-6
    close(step.log10().sort().values, torch.linspace(-3, -1, 4096, dtype=F64), "quantiles", 0.05)


def test_no_step_begins_below_the_floor():
    step = F.softplus(MambaConfig(step=(1e-6, 1e-2), floor=1e-3).build(2048).dt.bias.double())
    at = (step - 1e-3).abs() < 1e-8
    assert step[~at].min() > 1e-3 and 0.7 < at.double().mean() < 0.8, "three of four decades are below"


def test_with_init_recall_a_query_finds_its_key():
    """What a token writes under is what the token before would read, so a query reads the token that stood behind its key."""
    layer = MambaConfig(init="recall").build(DIM)
    x, _ = layer.into(torch.randn(2, 9, DIM)).chunk(2, -1)
    _, B, C = layer.select(F.silu(layer.conv(x)[0])).split(layer.sizes, -1)
    close(B[:, 1:], C[:, :-1], "B", 1e-6)
    assert C.std() > 0.2 and layer.A_log.exp().max() < 0.0161


def test_what_stands_for_time_does_not_decay():
    model = create_model("mamba-tiny")
    names = {p: name.rpartition("mixer.")[2] for name, p in model.backbone.blocks.named_parameters() if "mixer" in name}
    groups = {g["name"]: {names[p] for p in g["params"] if p in names} for g in param_groups(model, OptimConfig())}
    assert groups == {"matrices": {"into.weight", "conv.weight", "select.weight", "dt.weight", "out.weight"}, "vectors": {"A_log", "D", "dt.bias", "conv.bias"}}


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
def test_steps_decays_and_state_are_float32(how, monkeypatch):
    """A step rounded to bfloat16 is off by 1/256 in every exponent, and over many tokens that adds up."""
    given = {}

    def spy(x, dt, A, B, C, D, z, memory, lengths):
        given.update(x=x, dt=dt, A=A)
        return scan(x, dt, A, B, C, D, z, memory, lengths=lengths)

    scan = layers.selective_scan
    monkeypatch.setattr(layers, "selective_scan", spy)
    layer, x = MambaConfig().build(DIM), torch.randn(2, 9, DIM)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert torch.equal(given["A"], -layer.A_log.exp())
    else:
        layer = layer.bfloat16()
        out = layer(x.bfloat16())
    assert given["x"].dtype == out.y.dtype == torch.bfloat16
    assert given["dt"].dtype == given["A"].dtype == out.state.memory.dtype == torch.float32
    assert not torch.equal(given["dt"], given["dt"].bfloat16().float()), "computed in float32, not only stored so"


@pytest.fixture
def one_call(monkeypatch, native_library):
    """How often a token went through the C++ of a whole layer."""
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    native.build()
    calls, run = [], layers.token.token
    monkeypatch.setattr(layers.token, "token", lambda *given: calls.append(1) or run(*given))
    return calls


ONE_CALL = [MambaConfig(), MambaConfig(state=3, conv=1), MambaConfig(state=17, conv=2, expand=3, rank=2, bias=True, conv_bias=False)]


@pytest.mark.parametrize("cfg", ONE_CALL, ids=str)
@torch.no_grad()
def test_one_token_in_one_call_is_what_its_parts_give(cfg, one_call):
    """In float64 to rounding; in float32 the error against float64 is at most twice that of the parts. Steps are small, large and beyond softplus."""
    layer = noisy(cfg.build(DIM))
    layer.dt.bias.copy_(torch.linspace(-40, 40, len(layer.dt.bias)))
    state, u = layer(torch.randn(3, 9, DIM, dtype=F64)).state, torch.randn(3, 1, DIM, dtype=F64)
    kept = [leaf.clone() for leaf in state]
    found = layer(u, state)
    assert len(one_call) == 1 and all(map(torch.equal, state, kept)), "and the state it was given is as it was"
    with kernels.using("torch"):
        truth = layer(u, state)
        close(found.y, truth.y, "output", 1e-12)
        same_state(found.state, truth.state, "state", 1e-12)
        layer, u, state = layer.float(), u.float(), type(state)(*(leaf.float() for leaf in state))
        parts = layer(u, state)
    found = layer(u, state)
    assert len(one_call) == 2
    for a, b, exact in zip((found.y, *found.state), (parts.y, *parts.state), (truth.y, *truth.state), strict=True):
        error, own = ((v - exact).square().mean().sqrt() if v.numel() else 0 for v in (a, b))
        assert a.shape == b.shape and (not a.numel() or error <= 2 * own + 16 * torch.finfo(torch.float32).eps * exact.square().mean().sqrt())


def test_who_wants_more_than_a_token_goes_through_the_parts(one_call):
    """Gradients, notes, several tokens, lengths, low precision, a forced implementation, a compiled graph."""
    layer, u = MambaConfig(state=3).build(DIM), torch.randn(2, 1, DIM)
    with torch.no_grad():
        state = layer(torch.randn(2, 5, DIM)).state
    assert layer(u, state).y.requires_grad
    with torch.no_grad():
        layer(u.expand(-1, 2, -1), state)
        layer(u)
        layer(u, state, lengths=torch.tensor([0, 1]))
        sharing = MambaConfig(state=3, share=("step",)).build(DIM)
        assert sharing(u, state).note
        with torch.autocast("cpu", torch.bfloat16):
            layer(u, state)
        for op in ("selective_scan", "short_conv"):
            with kernels.using(**{op: "reference"}):
                layer(u, state)
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend="eager")(u, state)
        low = MambaConfig(state=3).build(DIM).bfloat16()
        low(u.bfloat16(), low.start(2))
        with pytest.raises(ValueError, match="state is"):
            layer(u[:1], state)
        assert not one_call
        layer(u, state)
    assert len(one_call) == 1


PUBLISHED = {"130m": 129_135_360, "370m": 371_516_416, "790m": 793_204_224, "1.4b": 1_372_178_432, "2.8b": 2_768_345_600}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_those_of_the_published_models(size):
    assert create_model(f"mamba-{size}", device="meta").config.num_params() == PUBLISHED[size]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"state": 0}, "state must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, or null for dim / 16, got 0"),
        ({"step": (0.1, 0.01)}, "step is a range"),
        ({"floor": 0.0}, "floor must be above 0"),
        ({"conv": 1, "init": "recall"}, "conv must be at least 2"),
    ],
)
def test_what_cannot_be_is_said(wrong, says):
    with pytest.raises(ValueError, match=says):
        MambaConfig(**wrong)
