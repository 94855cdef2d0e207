"""The laws of docs/design/contract.md over the tables. Every name here is a mixer, wrapper, preset or random stack; none is left out."""

import itertools

import pytest
import torch

import zoo
from memarch import state as states
from memarch.models.packing import run_packed
from zoo import F64, close, cuts, in_pieces, same_state, tokens

SUBJECTS = zoo.everything()
on_all = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def weigh(out):
    """A scalar that every output and every floating leaf of the final state enters with a weight of its own. Histories count from the newest."""
    total = out.y.new_zeros(())
    for leaf in (out.y, *(leaf for _, leaf in states.leaves(out.state))):
        if leaf.is_floating_point() and leaf.numel():
            x = leaf.flatten(2) if leaf.ndim > 2 else leaf[..., None]  # [B, n, rest]
            place = 1.7 * torch.arange(x.shape[1] - 1, -1, -1)[:, None] + 0.3 * torch.arange(x.shape[2])
            total = total + (x * place.to(F64).cos() * (1 + torch.arange(x.shape[0], dtype=F64))[:, None, None]).sum()
    return total


def gradients(mixer, x, run):
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    out = run(x)
    weigh(out).backward()
    grads = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    return out, x.grad, grads


@on_all
def test_law_1_pieces_equal_whole(subject):
    mixer, x = subject.build(), tokens(subject)
    T = x.shape[1]
    assert subject.span * 3 < T, "the input must cross the part's own chunk, window, segment or ring at least three times"
    whole, dx, dp = gradients(mixer, x, mixer)
    for name, pieces in {"halves": [T // 2, T - T // 2], "ragged": cuts(T, 1), "other ragged": cuts(T, 2), "all single": [1] * T}.items():
        out, ex, ep = gradients(mixer, x, lambda z, p=pieces: in_pieces(mixer, z, p))
        close(out.y, whole.y, f"{name}: output")
        same_state(out.state, whole.state, name)
        close(ex, dx, f"{name}: gradient of the input")
        assert ep.keys() == dp.keys(), name
        for key in dp:
            close(ep[key], dp[key], f"{name}: gradient of {key}")


@on_all
def test_law_2_no_future(subject):
    mixer = subject.build()
    x, last = tokens(subject, length=subject.tokens + mixer.every - 1), subject.tokens - 1
    before = mixer(x).y
    for t in (1, subject.tokens // 2, last):
        changed = x.clone()
        changed[:, t:] += 1.0
        close(mixer(changed).y[:, :t], before[:, :t], f"outputs before token {t}", 1e-12)
        now = slice(t, t + mixer.every)
        assert not torch.equal(mixer(changed).y[:, now], before[:, now]), f"token {t} does not reach the next new answer"


@on_all
def test_law_3_none_is_start(subject):
    mixer, x = subject.build(), tokens(subject)
    a, b = mixer(x), mixer(x, mixer.start(2))
    close(a.y, b.y, "output")
    same_state(a.state, b.state, "final")


@on_all
def test_law_4_state_size(subject):
    mixer, x = subject.build(), tokens(subject)
    with torch.no_grad():
        first = mixer(x, mixer.start(2))
        second = mixer(x, first.state)
        for piece in x.split(1, 1):
            second = mixer(piece, second.state)
    sizes = [states.nbytes(mixer.start(2)), states.nbytes(first.state), states.nbytes(second.state)]
    if mixer.grows() is None:
        assert sizes[0] < sizes[1] < sizes[2], f"declared as growing, but the sizes are {sizes}"
    else:
        assert sizes[1] == sizes[2], f"declared as bounded, but the sizes are {sizes}"
        assert mixer.grows() > 0 or sizes[0] == sizes[1], f"declared as constant, but the sizes are {sizes}"
    for name, leaf in states.leaves(second.state):
        assert leaf.shape[0] == 2, f"{name} has no row dimension"
        assert leaf.dtype in (F64, torch.int64), f"{name} is {leaf.dtype}: float64 must stay, positions are int64"


@on_all
def test_law_5_padding_is_invisible(subject):
    mixer = subject.build()
    T = subject.tokens
    lengths = torch.tensor([T, 0, T // 2, 3])
    x, more = tokens(subject, 4), tokens(subject, 4, T // 2 + 2, seed=4)
    second = torch.tensor([2, more.shape[1], 0, more.shape[1] - 1])
    with torch.no_grad():
        one = mixer(x, lengths=lengths)
        two = mixer(more, one.state, lengths=second)  # the rows stand at different places now
        last = mixer(more, two.state)
        for b in range(4):
            row = slice(b, b + 1)
            state = mixer.start(1)
            for given, n, got in ((x, lengths[b], one.y), (more, second[b], two.y), (more, torch.tensor(more.shape[1]), last.y)):
                if n:
                    alone = mixer(given[row, :n], state)
                    state = alone.state
                    close(got[row, :n], alone.y, f"row {b}")
            same_state(states.take(last.state, torch.tensor([b])), state, f"row {b}")


@on_all
def test_law_5_packed_equals_separate(subject):
    mixer = subject.build()
    T = subject.tokens
    x, lengths = tokens(subject, 3), torch.tensor([T, T - 3, 0])
    starts = torch.zeros(3, T, dtype=torch.bool)
    starts[0, [4, 5, T // 2]] = True
    starts[1, 0] = True
    with torch.no_grad():
        before = mixer(tokens(subject, 3, 7, seed=8))
        packed = run_packed(mixer, x, before.state, starts, lengths)
        for b, edges in ((0, [0, 4, 5, T // 2, T]), (1, [0, T - 3])):
            state = states.take(before.state, torch.tensor([b])) if b == 0 else mixer.start(1)
            for begin, end in itertools.pairwise(edges):
                alone = mixer(x[b : b + 1, begin:end], state)
                close(packed.y[b : b + 1, begin:end], alone.y, f"row {b}, document at {begin}")
                state = mixer.start(1)
            same_state(states.take(packed.state, torch.tensor([b])), alone.state, f"row {b}")
        same_state(states.take(packed.state, torch.tensor([2])), states.take(before.state, torch.tensor([2])), "the row without a token")
        fresh = run_packed(mixer, x, None, starts, lengths)
        close(fresh.y[:1, :4], mixer(x[:1, :4]).y, "without a state position 0 is a start")


@on_all
def test_law_7_every_parameter_learns(subject):
    mixer, x = subject.build(), tokens(subject)
    _, _, grads = gradients(mixer, x, mixer)
    for name, p in mixer.named_parameters():
        if p.requires_grad:
            assert not p.numel() or (name in grads and grads[name].abs().max() > 0), f"{name} gets no gradient"
        else:
            assert name not in grads, f"{name} is frozen and got a gradient"


@on_all
def test_law_7_builds_and_starts_on_meta(subject):
    with torch.device("meta"):
        mixer = subject.make()
        state = mixer.start(3)
    real = subject.make()
    assert {n: p.shape for n, p in mixer.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert [(n, s.shape, s.dtype) for n, s in states.leaves(state)] == [(n, s.shape, s.dtype) for n, s in states.leaves(real.start(3))]
    assert all(p.is_meta for p in mixer.parameters())
    assert all(s.is_meta for _, s in states.leaves(state)), "a tensor was made without a device"


@on_all
def test_law_7_init_fills_everything_and_only_from_the_seed(subject):
    a, b = subject.make(), subject.make()
    for module, seed in ((a, 0), (b, 1)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in (*module.parameters(), *(t for t in module.buffers() if t.is_floating_point())):
                tensor.fill_(float("nan"))
        zoo.initialised(module, seed=7)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.isfinite().all(), f"{name} is not filled by init_"
        assert torch.equal(p, q), f"{name} does not depend on the seed alone"


@on_all
def test_law_9_state_survives_a_file(subject, tmp_path):
    mixer, x = subject.build(), tokens(subject)
    mixer.config = {"subject": subject.name}  # what a model has, and a bare mixer has not
    state = mixer(x).state
    states.save(state, tmp_path / "state.safetensors", mixer)
    loaded = states.load(tmp_path / "state.safetensors", mixer)
    for (name, a), (_, b) in zip(states.leaves(state), states.leaves(loaded), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(mixer(x, state).y, mixer(x, loaded).y)


@on_all
def test_law_10_rows(subject):
    mixer, x = subject.build(), tokens(subject, 3)
    more = tokens(subject, 3, 9, seed=9)
    with torch.no_grad():
        state = mixer(x).state
        plain = mixer(more, state).y
        order = torch.tensor([2, 0, 1, 2])
        close(mixer(more[order], states.take(state, order)).y, plain[order], "reordered rows")
        young = mixer(x[:1, :4]).state  # rows of different age in one batch
        both = states.concat([states.take(state, torch.tensor([1])), young])
        y = mixer(more[:2], both).y
        close(y[:1], mixer(more[:1], states.take(state, torch.tensor([1]))).y, "the first of two joined rows")
        close(y[1:], mixer(more[1:2], young).y, "the second of two joined rows")
        mask = torch.tensor([False, True, False])
        y = mixer(more, states.reset(state, mask, mixer.start(3))).y
        close(y[1:2], mixer(more[1:2]).y, "a row that was reset")
        close(y[[0, 2]], plain[[0, 2]], "its neighbours")


@on_all
def test_law_10_leaves_own_their_memory_and_the_given_state_is_never_changed(subject):
    mixer, x = subject.build(), tokens(subject)
    state = mixer(x).state
    for label, value in (("start", mixer.start(2)), ("after a call", state), ("after a token", mixer(x[:, :1], state).state)):
        seen = set()
        for name, leaf in states.leaves(value):
            storage = leaf.untyped_storage()
            assert storage.nbytes() == leaf.numel() * leaf.element_size(), f"{label}: {name} is a part of a bigger buffer"
            assert not leaf.numel() or storage.data_ptr() not in seen, f"{label}: {name} shares its memory with another leaf"
            seen.add(storage.data_ptr())
    kept = [(name, leaf.clone()) for name, leaf in states.leaves(state)]
    for given in (x, x[:, :1]):
        new = mixer(given, state).state
        for (name, before), (_, after) in zip(kept, states.leaves(state), strict=True):
            assert torch.equal(before, after), f"the call changed the state it was given: {name}"
        theirs = {leaf.untyped_storage().data_ptr() for _, leaf in states.leaves(state) if leaf.numel()}
        for name, leaf in states.leaves(new):
            same = leaf.numel() and leaf.untyped_storage().data_ptr() in theirs
            assert not same or torch.equal(leaf, dict(states.leaves(state))[name]), f"{name} is written into the given state's memory"
