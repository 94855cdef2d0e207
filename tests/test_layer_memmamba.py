"""MemMamba against a reading of its definition token by token, and what the definition promises."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memarch import create_model
from memarch.config import ConfigError
from memarch.layers import MambaConfig, MemMambaConfig, memmamba
from memarch.layers.mamba import Step
from memarch.layers.parts import notes
from memarch.layers.parts.notes import Kept, collect
from memarch.state import take
from zoo import DIM, F64, Chain, close, cuts, noisy, same_state

SMALL = MemMambaConfig(mamba=MambaConfig(state=2), window=4, slots=3, note=5, heads=2)
CONFIGS = {
    "learned, priority": SMALL,
    "learned, fifo": replace(SMALL, policy="fifo", accept=0.62, open=0.5, attn=6),
    "periodic": replace(SMALL, gate="periodic", period=(20, 9), policy="fifo"),
    "delta": replace(SMALL, gate="delta", accept=0.2, window=3),
    "always": replace(SMALL, gate="always", slots=2),
    "always, fifo": replace(SMALL, gate="always", policy="fifo", window=1),
    "across layers": replace(SMALL, reach=2, share=True),
    "across layers only": replace(SMALL, reach=1, share=True, cross_token=False),
}
DT = 0.1 + 0.2 * torch.rand(2, 400, generator=torch.Generator().manual_seed(5), dtype=F64)


def naive(layer, x, dt=None, below=()):
    """One row x [T, D] -> outputs, what every token sees [(window, e, s), ..], the pool at the end, the open window's peak and score."""
    cfg = layer.cfg
    pool, sights, fused, peak, score = [], [], [], None, None
    for t, u in enumerate(x):
        sights.append(list(pool))
        c = torch.zeros_like(u)
        if cfg.cross_token:
            before = x[t - 1] if t else torch.zeros_like(u)
            f = (layer.open.weight[0] @ before + layer.open.bias[0]).sigmoid()
            if f > cfg.open:
                c = c + read(layer.token, u, [(n, 0) for n in pool], f)
        if cfg.reach:
            c = c + read(layer.layer, u, [(n, layer.layer.distance[d]) for d, theirs in enumerate(below[-cfg.reach :][::-1]) for n in theirs[t]])
        fused.append(u + c)

        i = u.new_ones(())
        if cfg.gate == "learned":
            i = (layer.score.weight[0] @ u + layer.score.bias[0]).sigmoid()
        elif cfg.gate == "delta":
            i = dt[t]
        peak, score = (u, i) if t % cfg.window == 0 else (torch.maximum(peak, u), torch.maximum(score, i))
        if (t + 1) % cfg.window == 0:
            begin = t + 1 - cfg.window
            if score > cfg.accept and (cfg.gate != "periodic" or begin % cfg.period[0] < cfg.period[1]):
                pool.append((begin // cfg.window, score, layer.note.weight @ peak))
            if len(pool) > cfg.slots:  # the oldest goes, or the worst, the younger of equals
                pool.remove(pool[0] if cfg.policy == "fifo" else min(pool, key=lambda n: (n[1].item(), -n[0])))
            peak, score = torch.zeros_like(u), u.new_zeros(())
    y = layer.mamba(torch.stack(fused)[None]).y[0]
    return y, sights, pool, peak, score


def read(recall, u, seen, f=1.0):
    if not seen:
        return torch.zeros_like(u)
    q = (recall.q.weight @ u).view(recall.heads, -1)
    k = torch.stack([recall.k.weight @ s + d for (_, _, s), d in seen]).view(len(seen), recall.heads, -1)
    v = torch.stack([recall.v.weight @ s for (_, _, s), _ in seen]).view(len(seen), recall.heads, -1)
    weights = torch.stack([e for (_, e, _), _ in seen])[:, None] * torch.einsum("hd,nhd->nh", q / q.shape[1] ** 0.5, k).exp()
    o = torch.einsum("nh,nhd->hd", weights / (1 + weights.sum(0)), v)  # 1 is the slot that is always there
    return recall.alpha * (recall.out.weight @ (f * o.flatten()))


def stacked(config):
    """The layer, and the two below it that post notes where it reads some; their windows and pools differ."""
    posts = replace(SMALL, share=True)
    under = [replace(posts, window=3), replace(posts, slots=4, policy="fifo")] if config.reach else []
    return [noisy(c.build(DIM, seed=i)) for i, c in enumerate([*under, config])]


def run(layers, x, state, dt, lengths=None):
    """Side by side, not one after the other: all of them get x."""
    below = {} if dt is None else {"step": (Step(dt),)}
    outs = []
    for layer, s in zip(layers, [None] * len(layers) if state is None else state, strict=True):
        outs.append(layer(x, s, below=below, lengths=lengths))
        below = {**below, "pool": (*below.get("pool", ()), *((outs[-1].note["pool"],) if layer.cfg.share else ()))}
    return outs


def gradients(layers, total):
    for layer in layers:
        layer.zero_grad()
    total.backward()
    return {f"{i}.{name}": p.grad.clone() for i, layer in enumerate(layers) for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_its_definition(name, block, monkeypatch):
    """Outputs, what is left at the end and every gradient, in one piece and in uneven ones."""
    monkeypatch.setattr(notes, "BLOCK", block)
    config = CONFIGS[name]
    layers, T = stacked(config), 61
    x = torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(3), dtype=F64)
    dt = DT[:, :T] if config.gate == "delta" else None
    side = torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(4), dtype=F64)

    wanted = []
    for b in range(2):
        below = []
        for layer in layers:
            wanted.append(naive(layer, x[b], None if dt is None else dt[b], below))
            below.append(wanted[-1][1])
    wanted = [wanted[len(layers) - 1], wanted[-1]]
    total = sum((w[0] * side[b]).sum() + sum(e.square() + s.sum() for _, e, s in w[2]) for b, w in enumerate(wanted))
    gradient = gradients(layers, total)
    assert any(len(w[2]) == config.slots for w in wanted), "the pool must fill up"

    for pieces in ([T], cuts(T, 1), [1] * T):
        state, ys, begin = None, [], 0
        for n in pieces:
            outs = run(layers, x[:, begin : begin + n], state, None if dt is None else dt[:, begin : begin + n])
            state, begin = [h.state for h in outs], begin + n
            ys.append(outs[-1].y)
        assert n < T or config.gate == "always" or 0 < outs[-1].aux["accepted"] < 1, "some are refused"
        y, last = torch.cat(ys, 1), state[-1]
        for b, (want, _, pool, peak, score) in enumerate(wanted):
            close(y[b], want, "output", 1e-10)
            assert last.pool.window[b].tolist() == [n[0] for n in pool] + [-1] * (config.slots - len(pool))
            for k, (_, e, s) in enumerate(pool):
                close(last.pool.e[b, k], e, "e", 1e-12)
                close(last.pool.s[b, k], s, "s", 1e-12)
            assert not last.pool.s[b, len(pool) :].any() and not last.pool.e[b, len(pool) :].any()
            close(last.peak[b], torch.cat([peak, score[None]]), "peak", 1e-12)
            if config.cross_token:
                close(last.before[b], layers[-1].open.weight @ x[b, -1], "before", 1e-12)
        found = gradients(layers, (y * side).sum() + last.pool.e.square().sum() + last.pool.s.sum())
        assert found.keys() >= gradient.keys()
        for key, g in found.items():
            close(g, gradient.get(key, torch.zeros_like(g)), f"gradient of {key}", 1e-9)


@pytest.mark.parametrize("block", [6, 512])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_at_different_places(name, block, monkeypatch):
    monkeypatch.setattr(notes, "BLOCK", block)
    config = CONFIGS[name]
    layers = stacked(config)
    x = torch.randn(4, 90, DIM, generator=torch.Generator().manual_seed(6), dtype=F64)
    dt = DT.repeat(2, 1)[:, :90] if config.gate == "delta" else None
    fed, state, seen = torch.zeros(4, dtype=torch.int64), None, [[] for _ in range(4)]
    for lengths in ([30, 0, 7, 29], [0, 5, 30, 12], [25, 25, 1, 0], [1, 30, 11, 30]):
        lengths = torch.tensor(lengths)
        at = (fed[:, None] + torch.arange(30)).clamp(max=89)
        outs = run(layers, x[torch.arange(4)[:, None], at], state, None if dt is None else dt.gather(1, at), lengths)
        state, fed = [h.state for h in outs], fed + lengths
        for b in range(4):
            seen[b].append(outs[-1].y[b, : lengths[b]])
    for b in range(4):
        n = slice(0, int(fed[b]))
        whole = run(layers, x[b : b + 1, n], None, None if dt is None else dt[b : b + 1, n])[-1]
        close(torch.cat(seen[b]), whole.y[0], f"row {b}", 1e-10)
        same_state(type(whole.state)(*(_row(leaf, b) for leaf in state[-1])), whole.state, f"row {b}", 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_one_token_at_a_time_without_gradients(name, monkeypatch):
    """Where it is enough to look whether a note is taken, and a window without one costs no new pool. Rows at different places, and one that stands still."""
    config, taken = CONFIGS[name], []
    layers, collect = stacked(config), memmamba.collect
    monkeypatch.setattr(memmamba, "collect", lambda *given: taken.append(given[2].any()) or collect(*given))
    x = torch.randn(3, 61, DIM, generator=torch.Generator().manual_seed(3), dtype=F64)
    dt = DT.repeat(2, 1)[:3, :61] if config.gate == "delta" else None
    state, ys, seen = None, [], torch.zeros(3, dtype=torch.int64)
    lengths = torch.stack([torch.ones(61, dtype=torch.int64), torch.arange(61) % 3 != 1, torch.zeros(61, dtype=torch.int64)], 1).long()  # [T, B]
    for count in lengths:
        at = (torch.arange(3), seen.clamp(max=60))
        outs = run(layers, x[at][:, None], state, None if dt is None else dt[at][:, None], count)
        state, seen = [h.state for h in outs], seen + count
        ys.append(outs[-1].y[:, 0])
    assert taken and all(taken) and len(taken) <= sum(int(n) // layer.cfg.window for n in seen for layer in layers)
    for b in range(2):
        whole = run(layers, x[b : b + 1, : seen[b]], None, None if dt is None else dt[b : b + 1, : seen[b]])[-1]
        close(torch.stack(ys)[lengths[:, b] > 0, b], whole.y[0], f"row {b}", 1e-10)
        same_state(take(state[-1], torch.tensor([b])), whole.state, f"row {b}", 1e-10)
    same_state(take(state[-1], torch.tensor([2])), layers[-1].start(1), "the row that stands still", 0)


def _row(leaf, b):
    return leaf[b : b + 1] if isinstance(leaf, torch.Tensor) else type(leaf)(*(part[b : b + 1] for part in leaf))


def test_with_alpha_0_it_is_its_mamba_bit_for_bit():
    x = torch.randn(2, 700, DIM)
    mamba = MambaConfig().build(DIM, seed=4)(x)
    layer = MemMambaConfig(alpha=0.0, window=8).build(DIM, seed=4)
    found = layer(x)
    assert torch.equal(found.y, mamba.y) and torch.equal(found.state.mamba.memory, mamba.state.memory)
    found.y.square().sum().backward()
    learns = {name for name, p in layer.named_parameters() if "mamba" not in name and p.grad is not None and p.grad.any()}
    assert learns == {"token.alpha"}


def test_with_an_alpha_everything_learns_from_the_first_step_on():
    layer = MemMambaConfig(window=8, slots=4).build(DIM)
    layer(torch.randn(2, 200, DIM)).y.square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


def test_nothing_is_kept_that_must_beat_1():
    x, layer = torch.randn(2, 700, DIM), MemMambaConfig(accept=1.0, window=8, share=True).build(DIM, seed=4)
    found = layer(x)
    assert torch.equal(found.y, layer.mamba(x).y)
    assert (found.state.pool.window == -1).all() and not found.note["pool"].seen.any() and found.aux["accepted"] == 0


def test_the_first_window_reads_nothing():
    layer, x = noisy(SMALL.build(DIM)), torch.randn(1, 9, DIM, dtype=F64)
    found, plain = layer(x).y, layer.mamba(x).y
    assert torch.equal(found[:, :4], plain[:, :4]) and not torch.equal(found[:, 4], plain[:, 4])


def sight(pool, t):
    """The notes that token t of the first row sees, by their scores."""
    block, at = divmod(t, pool.seen.shape[2])
    return sorted(pool.e[0, block, pool.seen[0, block, at]].tolist())


@pytest.mark.parametrize("block", [8, 10, 512])
def test_a_token_changes_nothing_that_its_own_window_sees(block, monkeypatch):
    monkeypatch.setattr(notes, "BLOCK", block)
    layer, x = noisy(replace(SMALL, share=True, slots=2).build(DIM)), torch.randn(1, 40, DIM, dtype=F64)
    before = layer(x)
    for t in range(40):
        changed = x.clone()
        changed[:, t] += 3
        after = layer(changed)
        assert torch.equal(after.y[:, :t], before.y[:, :t])
        for s in range(4 * (t // 4) + 4):
            assert sight(after.note["pool"], s) == sight(before.note["pool"], s), f"token {t} changed what token {s} sees"


@pytest.mark.parametrize("policy", ["priority", "fifo"])
@pytest.mark.parametrize("block", [7, 64, 512])
def test_who_is_in_the_pool(policy, block, monkeypatch):
    """The K best, or the K latest, of what was accepted before; among equals the earlier."""
    monkeypatch.setattr(notes, "BLOCK", block)
    G, K, w = 60, 5, 4
    generator = torch.Generator().manual_seed(1)
    e = (torch.randint(1, 9, (1, G), generator=generator) / 8).double()
    accepted = torch.rand(1, G, generator=generator) < 0.7
    s = torch.arange(G, dtype=F64)[None, :, None] + 1.0  # names the window
    empty = Kept(torch.zeros(1, K, 1, dtype=F64), torch.zeros(1, K, dtype=F64), torch.full((1, K), -1))
    pool, kept = collect(s, e, accepted, empty, torch.zeros(1, dtype=torch.int64), G * w, w, policy)
    n = pool.seen.shape[2]

    def best(j):
        before = [i for i in range(j) if accepted[0, i]]
        return sorted(before[-K:] if policy == "fifo" else sorted(before, key=lambda i: (-e[0, i].item(), i))[:K])

    for t in range(G * w):
        found = pool.s[0, t // n, pool.seen[0, t // n, t % n], 0] - 1
        assert found.sort().values.tolist() == best(t // w)
    assert kept.window[0].tolist() == best(G) and kept.s[0, :, 0].tolist() == [i + 1 for i in best(G)]


@pytest.mark.parametrize("policy, found", [("priority", True), ("fifo", False)])
def test_a_needle_is_kept_by_priority_and_lost_by_fifo(policy, found):
    layer, x = replace(SMALL, policy=policy, accept=0.0).build(DIM), torch.randn(1, 400, DIM)
    x[0, 30] = 4 * layer.score.weight[0] / layer.score.weight.norm()
    assert (7 in layer(x).state.pool.window[0].tolist()) is found


def test_the_order_of_the_slots_does_not_matter():
    layer, x = noisy(SMALL.build(DIM)), torch.randn(2, 60, DIM, dtype=F64)
    state = layer(x[:, :34]).state
    other = state._replace(pool=Kept(*(leaf[:, [2, 0, 1]] for leaf in state.pool)))
    a, b = layer(x[:, 34:], state), layer(x[:, 34:], other)
    close(a.y, b.y, "output", 1e-12)
    assert a.state.pool.window.sort().values.equal(b.state.pool.window.sort().values)


def test_only_layers_within_reach_are_read():
    posts = replace(SMALL, share=True)
    layers, x = [noisy(posts.build(DIM, seed=i)) for i in range(3)], torch.randn(1, 30, DIM, dtype=F64)
    pools = [layer(x).note["pool"] for layer in layers]
    reader = noisy(replace(SMALL, reach=2).build(DIM, seed=3))

    def y(*changed):
        return reader(x, below={"pool": tuple(p._replace(s=p.s + 1) if i in changed else p for i, p in enumerate(pools))}).y

    assert torch.equal(y(), y(0))
    assert not torch.equal(y(), y(1)) and not torch.equal(y(), y(2)) and not torch.equal(y(1), y(2))


def test_a_pattern_without_a_writer_does_not_build():
    with pytest.raises(ConfigError, match=r"block 0 \('N'\): it reads the note 'pool', which no block below writes"):
        create_model("memmamba-tiny", device="meta", set={"pattern": "NMM"})
    with pytest.raises(ConfigError, match="it reads the note 'step'"):
        create_model("memmamba-tiny", device="meta", set={"parts.M.mixer": {"kind": "memmamba", "gate": "delta"}})


def test_notes_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"reads notes of width 5, and a layer below posts 6\. Give both the same note"):
        Chain(replace(SMALL, share=True, note=6).build(DIM), replace(SMALL, reach=1).build(DIM))(torch.randn(1, 9, DIM))


def test_its_inner_mamba_posts_what_it_says():
    config = replace(SMALL, share=True, mamba=MambaConfig(state=2, share=("readout", "step")))
    layer = config.build(DIM)
    assert layer.writes == ("readout", "step", "pool") and set(layer(torch.randn(1, 9, DIM)).note) == set(layer.writes)


def test_cost_is_linear():
    """Flops, what is kept for the backward, and candidates of a block."""
    layer = MemMambaConfig(mamba=MambaConfig(state=2), window=4, slots=8, note=4, share=True).build(8)
    flops, kept, candidates = [], [], set()
    for T in (1024, 2048, 4096):
        sizes = {}

        def keep(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            pool = layer(torch.randn(1, T, 8)).note["pool"]
        flops.append(counter.get_total_flops())
        kept.append(sum(sizes.values()))
        candidates.add(pool.s.shape[2])
    assert candidates == {8 + 512 // 4}
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.02)


def test_what_is_kept_does_not_depend_on_autocast():
    layer, x = MemMambaConfig(window=8, slots=4, share=True).build(64), torch.randn(2, 300, 64)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    for a, b in zip(plain.state.pool, low.state.pool, strict=True):
        assert torch.equal(a, b)
    assert low.note["pool"].s.dtype == low.note["pool"].e.dtype == low.state.peak.dtype == torch.float32
    assert 0 < (low.y - plain.y).abs().max() < 0.05 * plain.y.abs().max()


def test_weights_in_bfloat16():
    layer = MemMambaConfig(window=8, slots=4, share=True, reach=1).build(64).bfloat16()
    x = torch.randn(2, 100, 64).bfloat16()
    below = {"pool": (MemMambaConfig(share=True).build(64).bfloat16()(x).note["pool"],)}
    found = layer(x, below=below)
    assert found.y.dtype == torch.bfloat16 and {leaf.dtype for leaf in (found.state.peak, *found.state.pool[:2])} == {torch.float32}
    assert layer(x[:, :1], found.state, below={"pool": (MemMambaConfig(share=True).build(64).bfloat16()(x[:, :1]).note["pool"],)}).y.isfinite().all()


def test_gauges():
    layer = replace(SMALL, gate="periodic", period=(20, 9), open=0.0).build(DIM)
    aux = layer(torch.randn(1, 40, DIM), lengths=torch.tensor([34])).aux
    assert aux["accepted"].item() == 6 / 8 and aux["full"] == 1 and 0 < aux["open"] < 1  # those that begin at 0, 4, 8, 20, 24 and 28
    assert layer(torch.randn(1, 1, DIM)).aux["accepted"] == 0
    assert not any(value.requires_grad for value in aux.values())


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"accept": -0.1}, "never negative"),
        ({"period": (50, 200)}, "period is"),
        ({"reach": -1}, "reach counts layers, 0 for none, got -1"),
        ({"cross_token": False}, "set share, or take kind mamba"),
    ],
)
def test_what_cannot_be_is_said(wrong, says):
    with pytest.raises(ConfigError, match=says):
        MemMambaConfig(**wrong)


def test_heads_divide():
    with pytest.raises(ConfigError, match="heads 3 must divide the width of attention, 16"):
        MemMambaConfig(heads=3).build(DIM)


def test_pools_with_and_without_notes_are_read_together():
    """Over several blocks, with gradients and without."""
    few, many = ({"accept": 1.0}, {"gate": "always"})
    below = [noisy(MemMambaConfig(mamba=MambaConfig(state=2), window=4, slots=3, note=5, share=True, **more).build(DIM)) for more in (few, many)]
    reader = noisy(MemMambaConfig(mamba=MambaConfig(state=2), window=4, slots=3, note=5, reach=2).build(DIM))
    x = torch.randn(1, notes.BLOCK + 90, DIM, dtype=F64)

    def read():
        return reader(x, below={"pool": tuple(layer(x).note["pool"] for layer in below)}).y

    with torch.no_grad():
        found = read()
    close(found, read(), "without gradients", 1e-12)
