"""HiSS: what a chunk says depends on that chunk alone, what is answered on the chunks that are complete, and the backbone runs once a chunk."""

import pytest
import torch

from memarch import LM, ConfigError, LMConfig, create_model, decode
from memarch import state as states
from memarch.evaluation.size import state_size
from memarch.layers import AttentionConfig, CrossAttentionConfig, GatedDeltaConfig, MambaConfig, MoEConfig, SwiGLUConfig
from memarch.wrappers import HiSSConfig, LowConfig, RMTConfig
from zoo import DIM, F64, close, cuts, in_pieces, noisy, same_state

LOWS = {
    "mamba": LowConfig(mixer=MambaConfig(state=3), layers=2, dim=6),
    "attention": LowConfig(mixer=AttentionConfig(heads=2), ffn=SwiGLUConfig(hidden=8)),
    "gated delta": LowConfig(mixer=GatedDeltaConfig(heads=2)),
}
BACKBONES = {"recurrent": {"kind": "gated_delta", "heads": 2}, "growing": {"kind": "attention", "heads": 2}, "mamba": {"kind": "mamba", "state": 3}}
on_lows = pytest.mark.parametrize("low", LOWS.values(), ids=LOWS)


def built(chunk=4, low=LOWS["mamba"], inner="recurrent", layers=2, wrap=()):
    """The wrapper around a backbone, in float64 and with noise on every weight."""
    model = LM(LMConfig(dim=DIM, layers=layers, parts=parts(inner), wrap=(HiSSConfig(chunk=chunk, low=low), *wrap)))
    return noisy(model.backbone)


def parts(inner):
    return decode(LMConfig, {"parts": {"A": {"mixer": BACKBONES[inner]}}}).parts


def inputs(T, batch=2, seed=0):
    return torch.randn(batch, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by_the_book(hiss, x):
    """Sample by sample: the low stack anew for every chunk, the backbone one step for every chunk, the last answer again and again."""
    ys, high, answer = [], hiss.inner.start(len(x)), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        if t % hiss.chunk == 0:
            low = hiss.low.start(len(x))
        h = hiss.low(x[:, t : t + 1], low)
        low = h.state
        if t % hiss.chunk == hiss.chunk - 1:
            out = hiss.inner(h.y, high)
            high, answer = out.state, out.y[:, 0]
        ys.append(answer)
    return torch.stack(ys, 1), high


@pytest.mark.parametrize("inner", BACKBONES)
@on_lows
def test_it_is_what_the_definition_says(low, inner):
    hiss, x = built(low=low, inner=inner), inputs(23)
    y, high = by_the_book(hiss, x)
    out = hiss(x)
    close(out.y, y, "answers")
    same_state(out.state.high, high, "backbone")
    assert out.state.place.tolist() == [3, 3]
    assert not out.y[:, :3].any() and out.y[:, 3].all(), "nothing is known before the first chunk is complete"


@on_lows
def test_a_chunk_is_read_on_its_own(low):
    hiss, x = built(low=low), inputs(20)
    before = hiss.whole(x, hiss.low.start(2)).read
    for t in (0, 6, 19):
        changed = x.clone()
        changed[:, t] += 1
        different = (hiss.whole(changed, hiss.low.start(2)).read != before).any(-1).all(0)
        assert different.tolist() == [j == t // 4 for j in range(5)], f"token {t}"


@on_lows
def test_an_answer_has_read_what_its_chunks_hold_and_no_more(low):
    hiss, x = built(low=low), inputs(20)
    before = hiss(x).y
    for t in range(20):
        changed = x.clone()
        changed[:, t:] += 1
        first = 4 * (t // 4) + 3  # where the chunk of t is complete
        different = (hiss(changed).y != before).any(-1).all(0)
        assert not different[:first].any() and different[first:].all(), f"token {t}"


@on_lows
def test_the_order_within_a_chunk_matters(low):
    hiss, x = built(low=low), inputs(8)
    shuffled = x[:, [2, 0, 3, 1, 4, 5, 6, 7]]
    assert (hiss(shuffled).y[:, 3] - hiss(x).y[:, 3]).abs().min() > 0


@pytest.mark.parametrize("inner", BACKBONES)
@on_lows
def test_chunks_of_one_token_are_an_encoder_below_a_flat_model(low, inner):
    hiss, x = built(chunk=1, low=low, inner=inner), inputs(9)
    encoded = hiss.low(x.reshape(-1, 1, DIM)).y.view_as(x)
    flat = hiss.inner(encoded)
    for out in (hiss(x), in_pieces(hiss, x, [2, 3, 1, 3])):
        close(out.y, flat.y, "answers")
        same_state(out.state.high, flat.state, "backbone")


@on_lows
def test_rows_at_different_places_of_their_chunks(low):
    hiss = built(low=low)
    rows = [inputs(n, 1, seed=n) for n in (1, 2, 3, 4, 5, 11)]
    first = states.concat([hiss(x).state for x in rows])
    assert sorted(first.place.tolist()) == [0, 1, 1, 2, 3, 3]
    for T in (1, 2, 3, 4, 9):
        more = inputs(T, len(rows), seed=20)
        out = hiss(more, first)
        for b, x in enumerate(rows):
            alone = hiss(torch.cat([x, more[b : b + 1]], 1))
            close(out.y[b : b + 1], alone.y[:, -T:], f"row {b}, {T} tokens more")
            same_state(states.take(out.state, torch.tensor([b])), alone.state, f"row {b}, {T} tokens more")


def test_the_backbone_runs_once_a_chunk():
    hiss, calls = built(), []
    hiss.inner.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    in_pieces(hiss, inputs(23), [1] * 23)
    assert calls == [1] * 5
    calls.clear()
    hiss(inputs(23))
    assert calls == [5]
    calls.clear()
    in_pieces(hiss, inputs(23), [2, 7, 1, 13])
    assert calls == [2, 3]


def test_keys_of_the_backbone_are_one_a_chunk():
    hiss = built(inner="growing")
    assert hiss.grows() is None
    for pieces in ([40], [1] * 40, cuts(40, 1)):
        state = in_pieces(hiss, inputs(40), pieces).state
        assert state.high[0].k.shape[1] == 10
    data = {"parts.M.mixer": {"kind": "attention", "heads": 2}}
    flat, slow = (state_size(create_model("mamba-tiny", device="meta", set=set)) for set in (data, data | {"wrap": [{"kind": "hiss", "chunk": 4}]}))
    assert slow.per_token == flat.per_token // 4 > 0


@pytest.mark.parametrize("inner", ["recurrent", "growing"])
def test_a_model_takes_back_every_state_it_gave(inner):
    """Whatever place rows stand at, and however much the backbone has grown, the check of a given state must not refuse it."""
    config = {
        "dim": DIM,
        "layers": 1,
        "parts": {"A": {"mixer": BACKBONES[inner]}},
        "wrap": [{"kind": "hiss", "chunk": 4, "low": {"mixer": BACKBONES["growing"]}}],
    }
    model, state = LM(decode(LMConfig, config)), None
    tokens = torch.randint(256, (2, 40))
    whole = model(tokens)
    logits = []
    for piece in tokens.split(cuts(40, 3), 1):
        out = model(piece, state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [(RMTConfig(segment=6, memory=2),), (RMTConfig(segment=6, memory=2), HiSSConfig(chunk=2, low=LOWS["attention"]))], ids=["rmt", "both"]
)
def test_wrappers_nest(wrap):
    hiss, x = built(chunk=3, wrap=wrap), inputs(29)
    whole = hiss(x)
    for pieces in ([1] * 29, cuts(29, 2)):
        out = in_pieces(hiss, x, pieces)
        close(out.y, whole.y, "answers")
        same_state(out.state, whole.state, "final")


@pytest.mark.parametrize("layers", [1, 2])
def test_how_strong_a_reading_is_comes_through(layers):
    """From the first step on: what twice the reading adds is near to twice what the reading adds. Norms alone would make it 1 times."""
    low = LM(LMConfig(dim=32, layers=1, parts=parts("mamba"), wrap=(HiSSConfig(low=LowConfig(layers=layers)),))).backbone.low
    x = torch.randn(50, 10, 32, generator=torch.Generator().manual_seed(0))
    zero, once, twice = (low(a * x).y[:, -1] for a in (0, 0.5, 1))
    assert 1.75 < (twice - zero).norm() / (once - zero).norm() < 2.25


def test_losses_of_the_low_stack_reach_the_output():
    low = LowConfig(mixer=GatedDeltaConfig(heads=2), ffn=MoEConfig(experts=4, hidden=8))
    hiss, x = built(low=low), inputs(12)
    whole, pieces = hiss(x), hiss(x, hiss(x[:, :1]).state)
    assert whole.aux.keys() == pieces.aux.keys() and any(name.startswith("loss/low.0.ffn") for name in whole.aux)
    direct = hiss.low(x.reshape(-1, 4, DIM)).aux
    for name, value in direct.items():
        close(whole.aux[name], value, name)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match=r"chunk must be at least 1 token, got 0"):
        HiSSConfig(chunk=0)
    with pytest.raises(ConfigError, match=r"low.dim must be at least 1"):
        LowConfig(dim=0)
    with pytest.raises(ConfigError, match=r"low.mixer 'cross_attention' reads the note 'kv', and nothing below it writes one"):
        built(low=LowConfig(mixer=CrossAttentionConfig(heads=2)))
