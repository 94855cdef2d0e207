"""The gated memory unit against its formula, and SambaY around it."""

import pytest
import torch
from torch.nn import functional as F

from memarch import create_model
from memarch.layers import AttentionConfig, GMUConfig, MambaConfig
from memarch.layers.mamba import Readout
from zoo import DIM, F64, close, noisy, same_state


def over(layer, x, m):
    return layer(x, below={"readout": (Readout(torch.full_like(m, torch.nan)), Readout(m))}).y  # of several notes the newest


def test_it_is_its_formula():
    x, m = torch.randn(2, 9, DIM, dtype=F64), torch.randn(2, 9, 3 * DIM, dtype=F64)
    plain, normed = (noisy(GMUConfig(expand=3, norm=norm).build(DIM)) for norm in (False, True))
    for layer in (plain, normed):
        gated = m * F.silu(x @ layer.gate.weight.T)
        if layer is normed:
            gated = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm.weight
        close(over(layer, x, m), gated @ layer.out.weight.T, "output", 1e-12)


def test_it_is_linear_in_what_was_read_and_without_a_memory_an_mlp():
    layer, x = noisy(GMUConfig().build(DIM)), torch.randn(2, 9, DIM, dtype=F64)
    a, b = torch.randn(2, 2, 9, 2 * DIM, dtype=F64)
    close(over(layer, x, 3 * a - b), 3 * over(layer, x, a) - over(layer, x, b), "linear", 1e-12)
    close(over(layer, x, torch.ones_like(a)), layer.out(F.silu(layer.gate(x))), "ones", 1e-12)


def test_the_init_is_torchs_own_scaled_where_it_writes():
    layer = GMUConfig(norm=True).build(64, depth=9)
    for weight, bound in ((layer.gate.weight, 64**-0.5), (layer.out.weight, 128**-0.5 / 18**0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert (layer.norm.weight == 1).all()


def test_another_width_is_refused():
    below = MambaConfig(share=("readout",)).build(DIM)(torch.randn(1, 3, DIM)).note
    with pytest.raises(ValueError, match="gmu gates 48 channels, but the layer below has read 32 of 16 dims"):
        GMUConfig(expand=3).build(DIM)(torch.randn(1, 3, DIM), below={"readout": (below["readout"],)})
    with pytest.raises(ValueError, match="expand must be at least 1, got 0"):
        GMUConfig(expand=0)


@pytest.mark.parametrize("lengths", [None, [9, 4]])
@pytest.mark.parametrize("window", [None, 5])
def test_a_note_of_one_token_is_what_that_token_sees(window, lengths):
    """The last real token of each row, after rows of different age, at the right end of its keys."""
    writer = noisy(AttentionConfig(heads=2, groups=1, window=window, share=True).build(DIM))
    state = writer(torch.randn(2, 7, DIM, dtype=F64), lengths=torch.tensor([7, 2])).state
    x = torch.randn(2, 9, DIM, dtype=F64)
    lengths = None if lengths is None else torch.tensor(lengths)
    note = writer(x, state, lengths=lengths).note["kv"].last(lengths)
    for b, n in enumerate((9, 9) if lengths is None else lengths.tolist()):
        row = writer(x[b : b + 1, :n], type(state)(*(leaf[b : b + 1] for leaf in state))).note["kv"]
        assert note.qpos[b].tolist() == row.qpos[0, -1:].tolist()
        seen = row.kpos[0, -(window or 99) :]
        seen = seen[seen >= 0]
        for name in ("k", "v", "kpos"):
            close(getattr(note, name)[b, -len(seen) :], getattr(row, name)[0, -len(seen) :], name, 1e-12)


# ------------------------------------------------------------------------------------------------ SambaY


def test_the_layout_is_the_published_one():
    """0-based: even blocks below n/2 are Mamba and odd ones windows; n/2 leaves the readout, n/2 + 1 the keys; then GMU and cross attention."""
    config = create_model("sambay-d16", device="meta").config
    kinds = [(config.block(i).mixer.kind, getattr(config.block(i).mixer, "window", None), getattr(config.block(i).mixer, "share", None)) for i in range(16)]
    assert kinds[:8] == [("mamba", None, ()), ("attention", 128, False)] * 4
    assert kinds[8:10] == [("mamba", None, ("readout",)), ("attention", None, True)]
    assert kinds[10:] == [("gmu", None, None), ("cross_attention", None, None)] * 3
    assert config.dim == 1984 and config.block(1).mixer.groups == 4 and config.block(0).ffn.hidden == 7936


@pytest.mark.parametrize("n", [8, 12, 16, 20, 24])
def test_sizes_are_what_the_authors_count(n):
    """Their formula has the terms in n^3 alone, without embeddings and Mamba's step; norms, convolutions and the odd blocks out are of order n^2."""
    config = create_model(f"sambay-d{n}", device="meta").config
    count = config.num_params() - (2 * config.vocab_size + config.dim * n / 16) * config.dim
    counted = 14.5 * 124**2 * n**3 + 144 * 124 * n**3
    assert 0 < count - counted < 0.21 / n * counted


def test_keys_and_readout_are_written_once():
    """What is kept of the past is the lower half's: the state of the upper half is empty, however many layers read."""
    model = create_model("sambay-tiny").double()
    posted = []
    for block in model.core.blocks:
        block.register_forward_hook(lambda _, args, out: posted.append((set(out[0].note), out[0].state == ())))
    x = torch.randint(256, (2, 70))
    whole = model(x)
    assert posted == [(set(), False)] * 4 + [({"readout"}, False), ({"kv"}, False)] + [(set(), True)] * 2
    first = model(x[:, :33])
    rest = model(x[:, 33:], first.state)
    close(torch.cat([first.logits, rest.logits], 1), whole.logits, "logits")
    same_state(rest.state, whole.state, "state")
