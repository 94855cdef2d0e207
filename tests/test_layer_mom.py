"""Mixture-of-memories against loops over memories, and against the layer it is made of; float64."""

import pytest
import torch
from torch.nn import functional as F

from memarch import state as states
from memarch.layers import DeltaNetConfig, GatedDeltaConfig, GLAConfig, LinearAttentionConfig, MoMConfig, RetNetConfig
from memarch.layers.parts import buckets
from zoo import DIM, F64, close, noisy

INNER = [
    GatedDeltaConfig(heads=2),
    DeltaNetConfig(heads=2, conv=2),
    GLAConfig(heads=2, rank=3, conv=3),
    LinearAttentionConfig(heads=2),
    RetNetConfig(heads=2),
]
kinds = pytest.mark.parametrize("inner", INNER, ids=lambda c: c.kind)


def inputs(T=70, B=2):
    return torch.randn(B, T, DIM, dtype=F64)


def built(**config):
    return noisy(MoMConfig(**config).build(DIM))


def same_weights(mom, single, memory=0):
    """Give the inner layer alone the weights of one memory."""
    with torch.no_grad():
        qkv, kv = sum(mom.sizes), mom.kv.weight[memory].mT
        single.into.qkv.weight.copy_(torch.cat([mom.q.weight, kv[: qkv - mom.sizes[0]]]))
        if mom.rule.raw:
            getattr(single, mom.rule.gates).weight.copy_(kv[qkv - mom.sizes[0] :])
        own = {name: p for name, p in mom.state_dict().items() if name.startswith(("read.", "A_log", "dt_bias", "up.", "maps"))}
        own |= {f"into.{name}": p for name, p in mom.state_dict().items() if name.startswith("conv.")}
        missing = single.load_state_dict(own, strict=False)
        assert not missing.unexpected_keys
        assert set(missing.missing_keys) <= {"into.qkv.weight", f"{mom.rule.gates}.weight"}


@kinds
def test_one_memory_is_the_inner_layer(inner):
    mom, single = built(memories=1, topk=1, shared=False, inner=inner), noisy(inner.build(DIM))
    same_weights(mom, single)
    x = inputs()
    a, b = mom(x), single(x)
    close(a.y, b.y, "output", 1e-12)
    for (name, left), (_, right) in zip(states.leaves(a.state), states.leaves(b.state), strict=True):
        close(left.squeeze(1), right, name, 1e-12)


@kinds
def test_separate_false_and_every_memory_chosen_is_one_layer(inner):
    """All memories see everything and are the same, and their weights sum to 1."""
    mom, single = built(memories=3, topk=3, shared=False, separate=False, inner=inner), noisy(inner.build(DIM))
    same_weights(mom, single)
    x = inputs()
    close(mom(x).y, single(x).y, "output", 1e-12)


def by_loop(mom, x, lengths=None):
    """A loop over rows and memories: the tokens that chose a memory, in order, through the rule alone; then each token's weighted sum."""
    B, T, _ = x.shape
    cfg, rule = mom.cfg, mom.rule
    p = (x @ mom.router.weight.mT).softmax(-1)
    out = x.new_zeros(B, T, rule.heads, rule.value)
    final = mom.start(B)
    for b in range(B):
        end = T if lengths is None else int(lengths[b])
        for m in range(mom.M):
            ranks = [sorted(range(cfg.memories), key=lambda i: -p[b, t, i]).index(m) if m < cfg.memories else 0 for t in range(end)]
            mine = [t for t in range(end) if m == cfg.memories or ranks[t] < cfg.topk]
            if not mine:
                continue
            assert mine == sorted(mine)
            z = x[b, mine][None]
            kv = z @ mom.kv.weight[m if cfg.separate else 0]
            parts = torch.cat([mom.q(z), kv[..., : sum(mom.sizes[1:])]], -1)
            tail = None
            if mom.conv is not None:
                parts, tail = mom.conv(parts)
            parts = F.silu(parts) if mom.ends.act else parts
            q, k, v = (part.unflatten(-1, (rule.heads, -1)) for part in parts.split(mom.sizes, -1))
            o, memory = rule(mom, q, k, v, kv[..., sum(mom.sizes[1:]) :], None, None)
            best = p[b, mine].topk(cfg.topk, -1).values.sum(-1)
            w = p[b, mine, m] / best if m < cfg.memories else torch.ones(len(mine), dtype=F64)
            out[b, mine] += w[:, None, None] * o[0]
            for (_, leaf), (_, new) in zip(states.leaves(final.memory), states.leaves(memory), strict=True):
                leaf[b, m] = new[0]
            if tail is not None:
                final.tail[b, m] = tail[0]
    return mom.read(out, x), final


@kinds
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lengths", [None, [0, 3, 70]], ids=["full", "ragged"])
def test_it_is_the_loop_over_memories(inner, shared, lengths):
    mom, x = built(memories=4, shared=shared, inner=inner), inputs(B=3)
    sizes = None if lengths is None else torch.tensor(lengths)
    with torch.no_grad():
        found, (y, final) = mom(x, lengths=sizes), by_loop(mom, x, lengths)
    for b in range(3):
        end = 70 if lengths is None else lengths[b]
        close(found.y[b, :end], y[b, :end], "output", 1e-12)
    for (name, a), (_, b) in zip(states.leaves(found.state), states.leaves(final), strict=True):
        close(a, b, name, 1e-12)


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 200])
def test_all_tokens_to_one_memory(T):
    """The others stay as they are, bit for bit; so does their convolution's tail. T = 1, 2, 3 are shorter than the convolution."""
    mom = built(memories=4, topk=1, shared=False, inner=GatedDeltaConfig(heads=2))
    x = inputs(T).abs()
    state = mom(inputs(20)).state
    with torch.no_grad():
        mom.router.weight.zero_()
        mom.router.weight[2] = 1
        found, (y, _) = mom(x), by_loop(mom, x)
        close(found.y, y, "output", 1e-12)
        after = mom(x, state).state
    for (name, a), (_, b) in zip(states.leaves(after), states.leaves(state), strict=True):
        assert torch.equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]]), name
        assert not torch.equal(a[:, 2], b[:, 2]), name


def test_memories_have_no_order():
    mom, x = built(memories=4, inner=GatedDeltaConfig(heads=2)), inputs()
    before = mom(x).y
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        mom.router.weight.copy_(mom.router.weight[order])
        mom.kv.weight.copy_(mom.kv.weight[torch.cat([order, torch.tensor([4])])])
    close(mom(x).y, before, "output", 1e-12)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_exactly_causal(mode):
    """Also where a change reorders what follows in the buckets, in both modes, at a length where an unstable sort shuffles."""
    mom = built(memories=4, inner=GatedDeltaConfig(heads=2)).train(mode)
    x = inputs(300)
    before = mom(x).y
    for t in (7, 150, 299):
        other = x.clone()
        other[:, t] += 3 * torch.randn(2, DIM, dtype=F64)
        close(mom(other).y[:, :t], before[:, :t], f"before {t}", 1e-13)
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(mom(x).y[:, 100].sum(), x)
    assert (grad[:, 101:] == 0).all()
    assert (grad[:, 100] != 0).any()


def test_rows_do_not_meet():
    mom, x = built(memories=4, inner=GatedDeltaConfig(heads=2)), inputs(B=3)
    whole = mom(x).y
    close(torch.cat([mom(x[b : b + 1]).y for b in range(3)]), whole, "alone", 1e-12)


def test_balance_is_k_when_even_and_M_when_the_same_few_share_everything():
    mom = built(memories=4, topk=2, balance=1.0, inner=GatedDeltaConfig(heads=2))
    x = F.one_hot(torch.arange(64) % 4, DIM).to(F64)[None]
    with torch.no_grad():
        mom.router.weight.zero_()
        mom.router.weight[:, :4] = torch.eye(4) * 3 + torch.eye(4).roll(1, 1) * 2  # every memory is first once and second once
        even = mom(x).aux
        mom.router.weight.zero_()
        mom.router.weight[:2, :4] = 100
        few = mom(x).aux
    assert even["loss/balance"].item() == pytest.approx(2, abs=1e-9)
    assert even["busiest"].item() == pytest.approx(0.5)
    assert few["loss/balance"].item() == pytest.approx(4, abs=1e-9)
    assert few["busiest"].item() == 1


def test_balance_moves_the_router_and_only_it():
    mom = built(memories=4, balance=1.0, inner=GatedDeltaConfig(heads=2))
    mom(inputs()).aux["loss/balance"].backward()
    moved = {name for name, p in mom.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"router.weight"}


def test_pads_do_not_count_in_the_balance():
    mom, x = built(memories=4, balance=1.0, inner=GatedDeltaConfig(heads=2)), inputs()
    short = mom(x[:, :30]).aux
    padded = mom(x, lengths=torch.tensor([30, 30])).aux
    for name in short:
        close(padded[name], short[name], name, 1e-12)


def test_ties_go_to_the_first():
    mom = built(memories=5, topk=2, shared=False, inner=GatedDeltaConfig(heads=2))
    with torch.no_grad():
        mom.router.weight.zero_()
    _, ids, _ = mom.route(inputs(100), None)
    assert (ids == torch.tensor([0, 1])).all()


def test_bfloat16_routes_as_float32_does():
    """Under autocast the router is not rounded: a token chooses the same memories."""
    mom = MoMConfig(memories=16, inner=GatedDeltaConfig(heads=2)).build(DIM)
    x = torch.randn(2, 200, DIM)
    plain = mom.route(x, None)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mom.route(x, None)[1], plain)


def test_what_a_token_costs_does_not_depend_on_the_number_of_memories():
    """Slots, the rows of all buckets with their padding, for random tokens: nearly as many as there are pairs."""
    for M in (4, 16, 64):
        ids = torch.rand(2, 1024, M).topk(2).indices
        plan = buckets.sort(ids, M)
        assert len(plan.pairs) <= 1.4 * ids.numel(), M


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
def test_buckets(skew):
    """Every pair has one slot and every slot one pair; tokens of a bucket are in order; uneven buckets do not pay for the longest."""
    B, T, k, M = 3, 97, 2, 6
    score = torch.rand(B, T, M) + skew * torch.arange(M) / M
    ids = score.topk(k).indices
    ids[1, 50:] = M  # pads
    plan = buckets.sort(ids, M)
    flat = ids.flatten()
    assert (plan.slots[flat == M] == -1).all()
    real = (flat < M).nonzero().squeeze(1)
    assert torch.equal(plan.pairs[plan.slots[real]], real)
    assert (plan.pairs >= 0).sum() == len(real)
    begin = 0
    for group in plan.groups:
        of = torch.arange(M)[group.which]
        rows = plan.pairs[begin : begin + group.many * B * group.width].view(group.many, B, group.width)
        for m, lines in zip(of.tolist(), rows, strict=True):
            for b, line in enumerate(lines):
                pairs = line[line >= 0]
                assert (line[len(pairs) :] == -1).all()
                assert (flat[pairs] == m).all() and (pairs // (T * k) == b).all()
                assert (pairs.diff() > 0).all()
        assert torch.equal((rows >= 0).sum(-1).flatten(), group.lengths)
        begin += rows.numel()
    assert begin == len(plan.pairs)
    assert begin <= 2 * len(real)


def test_move_reads_its_gradient():
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    there = torch.tensor([8, 1, -1, 6, 2, 0, 9])
    back = torch.full((10,), -1)
    for i, j in enumerate(there.tolist()):
        if j >= 0:
            back[j] = i
    assert torch.autograd.gradcheck(lambda x: buckets.Move.apply(x, there, back, 2), x)


def test_state_bytes_are_those_of_the_memories():
    """Spec: (M + shared) H K V elements in fp32 and a tail of (taps - 1) H (2 K + V) for each."""
    mom = MoMConfig(memories=4, inner=GatedDeltaConfig(heads=2, head_dim=8, value_dim=6)).build(DIM)
    assert states.nbytes(mom.start(3)) == 3 * 5 * (2 * 8 * 6 + 3 * 2 * (2 * 8 + 6)) * 4
