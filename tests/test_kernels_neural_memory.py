"""The neural memory against the definitions of its papers by autograd, where one knows the answer, at its extremes, and what it keeps.
The sweep against `reference` is in test_kernels_ops."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memarch import kernels
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.neural_memory import Memory, State, dual, linear, neural_memory, start
from memarch.kernels.neural_memory.inner import Net, clipped, clipped_back, curve, gradient

IMPLS = ["reference", "torch"]
POSTS = ["none", "res", "rms", "ln"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(T: int, B: int = 2, H: int = 2, K: int = 5, V: int = 5) -> list[Tensor]:
    """q, k, v, log_decay, log_momentum, step"""
    q, k = F.normalize(draw(B, T, H, K), dim=-1), F.normalize(draw(B, T, H, K), dim=-1)
    return [q, k, draw(B, T, H, V), -0.1 * F.softplus(draw(B, T, H)), -F.softplus(draw(B, T, H)), 0.05 * draw(B, T, H).sigmoid()]


def mlp(depth: int, post: str = "none", H: int = 2, K: int = 5, hidden: int = 7, **options: Any) -> Memory:
    """The first layer with a bias."""
    widths = [K, *[hidden] * (depth - 1), K]
    weights = tuple(draw(H, a + (l == 0), b) / a**0.5 for l, (a, b) in enumerate(itertools.pairwise(widths)))
    return Memory(weights, post=post, gain=1 + 0.1 * draw(H, K) if post in ("rms", "ln") else None, bias=0.1 * draw(H, K) if post == "ln" else None, **options)


def answer(memory: Memory, weights: list[Tensor], x: Tensor) -> Tensor:
    """Written down once more, for one row and head: x [K]."""
    z = x
    for l, W in enumerate(weights):
        if l:
            z = F.gelu(z) if memory.activation == "gelu" else F.silu(z)
        z = (torch.cat([z, z.new_ones(1)]) if len(W) > len(z) else z) @ W
    if memory.post == "ln":
        z = F.layer_norm(z, z.shape, eps=1e-6)
    if memory.post == "rms":
        z = z / (z.square().mean() + 1e-6).sqrt()
    z = z if memory.gain is None else z * memory.gain
    z = z if memory.bias is None else z + memory.bias
    return z if memory.post == "none" else x + z


def by_autograd(xs: list[Tensor], memory: Memory, chunk: int, window: int = 1, momentum: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Titans' definition for one row and head, every token's weights written out and every gradient taken by autograd of the loss."""
    q, k, v, log_decay, log_momentum, step = (x[0, :, 0] for x in xs)
    memory = memory._replace(weights=tuple(w[0] for w in memory.weights), **{n: x[0] for n in ("gain", "bias") if (x := getattr(memory, n)) is not None})
    W, S, outs = list(memory.weights), [torch.zeros_like(w) for w in memory.weights], []
    for t in range(len(q)):
        if t % chunk == 0:
            W0 = [w.clone().requires_grad_() for w in W]
        first = max(t - t % chunk, t - window + 1)
        loss = sum((answer(memory, W0, k[i]) - v[i]).square().sum() / 2 for i in range(first, t + 1))
        g = torch.autograd.grad(loss, W0)
        S = [(log_momentum[t].exp() * s if momentum else 0) - step[t] * x for s, x in zip(S, g, strict=True)]
        keep = log_decay[t].exp()
        rest = memory.weights if memory.decay_to == "init" else [0] * len(W)
        W = [keep * w + (1 - keep) * r + s for w, r, s in zip(W, rest, S, strict=True)]
        outs.append(answer(memory, W, q[t]))
    return torch.stack(outs), W, S


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("depth, activation", [(1, "gelu"), (2, "gelu"), (2, "silu"), (3, "silu")])
def test_the_definition(depth, activation, post, impl):
    for momentum, grad_point, decay_to in ((True, "exact", "zero"), (True, "chunk", "init"), (False, "chunk", "zero")):
        xs, memory = inputs(21), mlp(depth, post, activation=activation, decay_to=decay_to)
        truth, W, S = by_autograd(xs, memory, 8 if grad_point == "chunk" else 1, momentum=momentum)
        xs[4] = xs[4] if momentum else None
        o, state = neural_memory(*xs, memory=memory, grad_point=grad_point, chunk=8, impl=impl)
        for a, b in zip((truth, *W, *(S if momentum else ())), (o[0, :, 0], *(x[0, 0] for x in (*state.weights, *state.momentum))), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_omega_rule(impl):
    """Each step follows the gradient of the loss of the last tokens of the chunk (Atlas, arXiv 2505.23735, equation 9)."""
    xs, memory = inputs(21), mlp(2, "ln")
    truth, W, S = by_autograd(xs, memory, 8, window=3)
    o, state = neural_memory(*xs, memory=memory, grad_point="chunk", chunk=8, window=3, impl=impl)
    for a, b in zip((truth, *W, *S), (o[0, :, 0], *(x[0, 0] for x in (*state.weights, *state.momentum))), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(o, neural_memory(*xs, memory=memory, grad_point="chunk", chunk=8)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("depth", [1, 2])
def test_ttt(depth, impl):
    """TTT (arXiv 2407.04620): a mini-batch of gradients at its first weights, step eta_i, every step so far scaled by 1/t at its t-th token, biases,
    a residual around the normalised answer."""
    b, (q, k, v, _, _, eta) = 4, inputs(18)
    memory = mlp(depth, "ln", pull=1 / torch.arange(1, b + 1, dtype=torch.float64))
    one = memory._replace(weights=tuple(w[0] for w in memory.weights), gain=memory.gain[0], bias=memory.bias[0])
    W, outs = list(one.weights), []
    for begin in range(0, 18, b):
        W0, total = [w.clone().requires_grad_() for w in W], [torch.zeros_like(w) for w in W]
        for i in range(begin, min(begin + b, 18)):
            g = torch.autograd.grad((answer(one, W0, k[0, i, 0]) - v[0, i, 0]).square().sum() / 2, W0)
            total = [x + eta[0, i, 0] * y for x, y in zip(total, g, strict=True)]
            W = [w.detach() - x / (i - begin + 1) for w, x in zip(W0, total, strict=True)]
            outs.append(answer(one, W, q[0, i, 0]))
    o, _ = neural_memory(q, k, v, torch.zeros_like(eta), None, eta, memory=memory, grad_point="chunk", chunk=b, impl=impl)
    torch.testing.assert_close(o[0, :, 0], torch.stack(outs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_momentum_and_decay_it_is_the_delta_rule(impl):
    q, k, v, _, _, step = inputs(70, V=3)
    o, state = neural_memory(q, k, v, torch.zeros_like(step), None, 8 * step, impl=impl)
    wanted, S = delta_rule(q, k, v, 8 * step, None)
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(state.weights[0], S)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gated_delta_rule_measures_on_the_decayed_memory(impl):
    """Titans does on the memory as it was: the two agree with beta = step / a and values a v, and not with beta = step."""
    q, k, v, g, _, step = inputs(70, V=3)
    o, state = neural_memory(q, k, v, 5 * g, None, 8 * step, impl=impl)
    a = (5 * g).exp()
    wanted, S = delta_rule(q, k, a[..., None] * v, 8 * step / a, 5 * g)
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(state.weights[0], S)
    assert (o - delta_rule(q, k, v, 8 * step, 5 * g)[0]).abs().max() > 0.01


@pytest.mark.parametrize("chunk", [1, 4, 16, 70])
def test_the_exact_form_does_not_depend_on_the_chunk(chunk, monkeypatch):
    xs = [x.requires_grad_() for x in inputs(70)]
    found = []
    for c in (32, chunk):
        monkeypatch.setattr(linear, "grid", lambda T, K, V, c=c: ((T + c - 1) // c, c))
        o, state = neural_memory(*xs)
        found.append([o, *state.weights, *state.momentum, *torch.autograd.grad(o.square().sum() + state.weights[0].sum(), xs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_chunks_of_one_token_are_exact(kind):
    xs, memory = inputs(21), Memory() if kind == "linear" else mlp(2, "ln")
    truth = neural_memory(*xs, memory=memory, impl="reference")[0]
    for impl in IMPLS:
        torch.testing.assert_close(neural_memory(*xs, memory=memory, grad_point="chunk", chunk=1, impl=impl)[0], truth)
    assert not torch.allclose(neural_memory(*xs, memory=memory, grad_point="chunk", chunk=2)[0], truth)


# What the state is for.

KINDS: dict[str, Callable[[], tuple[Memory, dict[str, Any]]]] = {
    "linear": lambda: (Memory(), {}),
    "linear to its start": lambda: (mlp(1, "res", decay_to="init"), {}),
    "mlp": lambda: (mlp(2, "ln"), {"grad_point": "chunk", "chunk": 8}),
    "everything": lambda: (mlp(3, "ln", decay_to="init", pull=draw(8).sigmoid()), {"grad_point": "chunk", "chunk": 8, "window": 3, "clip": 0.5}),
    "mlp, exact": lambda: (mlp(2, "rms"), {}),
}


def leaves(state: State) -> list[Tensor]:
    return [x for field in state for x in (field if isinstance(field, tuple) else (field,))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("cuts", [[1] * 21, [10, 11], [3, 7, 1, 8, 2], [8, 13]], ids=["single", "halves", "ragged", "8+13"])
def test_cuts_change_nothing(kind, impl, momentum, cuts):
    memory, options = KINDS[kind]()
    xs = [x.requires_grad_() for x in inputs(21)]
    memory = memory._replace(weights=tuple(w.clone().requires_grad_() for w in memory.weights))
    found = []
    for pieces in ([21], cuts):
        state, outs = None, []
        for piece in zip(*(x.split(pieces, 1) for x in xs), strict=True):
            gates = piece if momentum else (*piece[:4], None, piece[5])
            o, state = neural_memory(*gates, state, memory=memory, impl=impl, **options)
            outs.append(o)
        wanted = [x for x in (*xs, *memory.weights) if momentum or x is not xs[4]]
        loss = torch.cat(outs, 1).square().sum() + sum(x.square().sum() for x in leaves(state) if x.is_floating_point() and x.requires_grad)
        found.append([torch.cat(outs, 1), *leaves(state), *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_at_different_places(kind, impl):
    """Three calls with rows of different lengths are each row's own tokens in one."""
    memory, options = KINDS[kind]()
    calls, state = [inputs(12, B=3) for _ in range(3)], None
    lengths = [torch.tensor(x) for x in ([12, 5, 0], [3, 12, 1], [8, 0, 12])]
    outs = []
    for xs, many in zip(calls, lengths, strict=True):
        o, state = neural_memory(*xs, state, memory=memory, lengths=many, impl=impl, **options)
        outs.append(o)
    for b in range(3):
        alone = [torch.cat([xs[i][b : b + 1, : n[b]] for xs, n in zip(calls, lengths, strict=True)], 1) for i in range(6)]
        o, final = neural_memory(*alone, memory=memory, impl="reference", **options)
        torch.testing.assert_close(torch.cat([x[b : b + 1, : n[b]] for x, n in zip(outs, lengths, strict=True)], 1), o, rtol=1e-10, atol=1e-10)
        for x, y in zip(leaves(state), leaves(final), strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_is_the_start(kind):
    memory, options = KINDS[kind]()
    xs = inputs(21)
    begin = start(xs[1], xs[2], memory=memory, **{n: x for n, x in options.items() if n != "clip"})
    for a, b in zip(*(neural_memory(*xs, state, memory=memory, **options) for state in (None, begin)), strict=True):
        for x, y in zip(*((leaves(z) if isinstance(z, State) else [z]) for z in (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_no_future_and_at_once(kind):
    """A changed token changes nothing before it, and is read by itself and by the next one, also inside a chunk."""
    memory, options = KINDS[kind]()
    xs = inputs(30)
    before = neural_memory(*xs, memory=memory, **options)[0]
    for i in range(6):
        changed = [x.clone() for x in xs]
        changed[i][:, 19] *= 0.5
        after = neural_memory(*changed, memory=memory, **options)[0]
        torch.testing.assert_close(after[:, :19], before[:, :19], rtol=0, atol=1e-13)
        differs = (after - before).abs().amax((0, 2, 3))
        assert differs[19] > 1e-6 and (i == 0 or differs[20] > 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_heads_do_not_meet(kind):
    memory, options = KINDS[kind]()
    xs = inputs(21)
    whole = neural_memory(*xs, memory=memory, **options)[0]
    torch.testing.assert_close(neural_memory(*(x.flip(0) for x in xs), memory=memory, **options)[0].flip(0), whole)
    one = memory._replace(**{n: x[1:] for n in ("gain", "bias") if (x := getattr(memory, n)) is not None}, weights=tuple(w[1:] for w in memory.weights))
    torch.testing.assert_close(neural_memory(*(x[:, :, 1:] for x in xs), memory=one, **options)[0], whole[:, :, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_writes_too(kind):
    memory, options = KINDS[kind]()
    xs = inputs(21)
    o, state = neural_memory(*xs, memory=memory, **options)
    more = [x[:, :1] for x in xs]
    with torch.inference_mode():
        again, held = neural_memory(*xs, memory=memory, **options)
        for x, y in zip((again, *leaves(held)), (o, *leaves(state)), strict=True):
            torch.testing.assert_close(x, y)
        once, _ = neural_memory(*more, held, memory=memory, **options)
    torch.testing.assert_close(once, neural_memory(*more, state, memory=memory, **options)[0])


# Where one knows the answer.


@pytest.mark.parametrize("impl", IMPLS)
def test_orthonormal_keys_are_read_back_and_replaced(impl):
    k, v = torch.linalg.qr(draw(8, 8))[0].view(1, 8, 1, 8), draw(1, 8, 1, 3)
    off, one = torch.zeros(1, 8, 1, dtype=torch.float64), torch.ones(1, 8, 1, dtype=torch.float64)
    o, state = neural_memory(k, k, v, off, None, one, impl=impl)
    torch.testing.assert_close(o, v)
    o, state = neural_memory(k, k, 2 * v, off, None, one, state, impl=impl)
    torch.testing.assert_close(o, 2 * v)
    torch.testing.assert_close(k[0, :, 0] @ state.weights[0][0, 0], 2 * v[0, :, 0])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_write_fades_in_and_out_as_the_gates_say(impl):
    """With a and eta constant, what token 0 writes is in the memory after n more tokens times (a^{n+1} - eta^{n+1}) / (a - eta)."""
    T, a, eta = 50, 0.9, 0.7
    k = F.normalize(torch.ones(1, T, 1, 4, dtype=torch.float64), dim=-1)
    step = torch.zeros(1, T, 1, dtype=torch.float64)
    step[0, 0, 0] = 1
    v, log = draw(1, T, 1, 3), torch.ones_like(step)
    o, _ = neural_memory(k, k, v, log * torch.tensor(a).double().log(), log * torch.tensor(eta).double().log(), step, impl=impl)
    n = torch.arange(T, dtype=torch.float64) + 1
    torch.testing.assert_close(o[0, :, 0], (a**n - eta**n)[:, None] / (a - eta) * v[0, :1, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_step_zero_ignores_the_values(kind, impl):
    memory, options = KINDS[kind]()
    q, k, v, la, le, step = inputs(21)
    a, b = (neural_memory(q, k, x, la, le, 0 * step, memory=memory, impl=impl, **options)[0] for x in (v, draw(*v.shape)))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_gates_forget_everything(impl):
    """But with a step the error still reads what was there before: the gated delta rule would not."""
    xs = inputs(40)
    shut = [x.clone() for x in xs]
    for x in shut[3:5]:
        x[:, 20] = -800
    shut[5][:, 20] = 0
    other = [x.clone() for x in shut]
    other[2][:, :20] = draw(*other[2][:, :20].shape)
    a, b = (neural_memory(*x, impl=impl)[0] for x in (shut, other))
    torch.testing.assert_close(a[:, 20:], b[:, 20:], rtol=0, atol=1e-12)
    for x in (shut, other):
        x[5][:, 20] = 0.5
    a, b = (neural_memory(*x, impl=impl)[0] for x in (shut, other))
    assert (a[:, 20:] - b[:, 20:]).abs().max() > 1e-3


def test_recall_the_exact_gradient_is_better():
    """One pass over N <= d random pairs, then the values are asked for."""
    N, d = 32, 64
    k, v = F.normalize(F.silu(draw(4, N, 1, d)), dim=-1), draw(4, N, 1, d)
    off, step = torch.zeros(4, N, 1, dtype=torch.float64), torch.full((4, N, 1), 0.2, dtype=torch.float64)
    missed = []
    for options in ({}, {"grad_point": "chunk", "chunk": N}):
        _, state = neural_memory(k, k, v, off, None, 4 * step if not options else step, **options)
        missed.append((torch.einsum("btk,bkv->btv", k[:, :, 0], state.weights[0][:, 0]) - v[:, :, 0]).square().mean())
    assert missed[0] < 0.5 * missed[1]


# The inner arithmetic.


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_the_curves_are_derivatives(kind):
    x = draw(50).requires_grad_()
    y = F.gelu(x) if kind == "gelu" else F.silu(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for order in range(3):
        for a, b in zip((y, first, second)[: order + 1], curve(x, kind, order), strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("kind", POSTS)
def test_the_error_is_the_gradient_of_the_loss_and_its_backward_too(kind):
    outer = [1 + 0.1 * draw(2, 1, 5) if kind in ("rms", "ln") else None, draw(2, 1, 5) if kind == "ln" else None]
    xs = [x.requires_grad_() for x in (draw(2, 3, 5), draw(2, 3, 5), draw(2, 3, 5), *(x for x in outer if x is not None))]
    z, k, v = xs[:3]
    net = Net("gelu", kind, *(None if x is None else xs[i + 3] for i, x in enumerate(outer)), None)
    (d,) = torch.autograd.grad((net.answer(z, k) - v).square().sum() / 2, z, create_graph=True)
    torch.testing.assert_close(net.error(z, k, v), d)
    for y, back in ((net.answer(z, k), lambda t: net.answer_back(z, t)), (d, lambda t: net.error_back(z, k, v, t))):
        t = draw(2, 3, 5)
        given = [torch.zeros_like(x) if g is None else g for x, g in zip(xs, torch.autograd.grad(y, xs, t, allow_unused=True, retain_graph=True), strict=True)]
        found = list(back(t))
        found = found if len(found) == 5 else [*found[:2], None, *found[2:]]
        for x, a, b in zip(xs, given, found, strict=False):
            b = torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(b.sum(1, keepdim=True) if x.shape[1] == 1 and b.shape[1] > 1 else b, a)


def test_the_clip():
    x, d, du = draw(40, 4).requires_grad_(), draw(40, 5).requires_grad_(), draw(40, 5)
    u = clipped(x, d, 3.0)
    size = u.norm(dim=-1) * x.norm(dim=-1)
    assert size.max() <= 3 + 1e-12 and (u == d).all(-1).sum() == (size < 3 - 1e-12).sum() and 5 < (size < 3 - 1e-12).sum() < 35
    for a, b in zip(torch.autograd.grad(u, (x, d), du), clipped_back(x.detach(), d.detach(), 3.0, du), strict=True):
        torch.testing.assert_close(b, a)
    zero = torch.zeros(2, 4, dtype=torch.float64)
    assert all(y.isfinite().all() for y in (clipped(zero, zero, 1.0), *clipped_back(zero, zero, 1.0, zero)))


def test_gradient_is_that_of_every_layer():
    memory = mlp(3, "ln")
    weights = [w.clone().requires_grad_() for w in memory.weights]
    k, v = draw(2, 4, 5), draw(2, 4, 5)
    w = gradient(weights, k, v, Net("gelu", "ln", memory.gain[:, None], memory.bias[:, None], None))
    loss = 0
    for h in range(2):
        one = memory._replace(gain=memory.gain[h], bias=memory.bias[h])
        loss = loss + sum((answer(one, [x[h] for x in weights], k[h, i]) - v[h, i]).square().sum() / 2 for i in range(4))
    for a, x, d in zip(torch.autograd.grad(loss, weights), w.x, w.d, strict=True):
        torch.testing.assert_close(x.mT @ d, a)


# Stability.


def constant(T: int, log_decay: float, eta: float, step: float) -> list[Tensor]:
    one = torch.ones(1, T, 1)
    return [one * log_decay, one * torch.tensor(eta).log(), one * step]


@pytest.mark.parametrize("eta, step", [(0.5, 1.0), (0.9, 0.18), (0.99, 0.02)])
def test_chunk_start_gradients_diverge_where_the_exact_rule_does_not(eta, step):
    """64 wide, 2048 tokens, keys after silu, the largest steps that the exact rule bears. In chunks of 64 a tenth of them is borne."""
    k, v = F.normalize(F.silu(torch.randn(1, 2048, 1, 64)), dim=-1), torch.randn(1, 2048, 1, 64)

    def size(factor: float, **options: Any) -> float:
        o, _ = neural_memory(k, k, v, *constant(2048, -1e-3, eta, factor * step), **options)
        return o[:, 1024:].square().mean().item()

    assert size(1) < 30 and size(0.1, grad_point="chunk", chunk=64) < 30
    assert not size(1, grad_point="chunk", chunk=64) < 1e6


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("keys", ["one", "random"])
@pytest.mark.parametrize("log_decay, eta", [(-1e-5, 0.999), (-1e-3, 0.9), (-20.0, 1e-8)])
def test_the_clip_bounds_the_state(kind, keys, log_decay, eta):
    """With no token's gradient longer than clip, |S| <= clip step / (1 - eta) and, of what decays to zero, |M| <= |S| times the tokens it remembers."""
    T, clip, step = 4096, 4.0, 0.2 * (1 - eta)
    memory = Memory() if kind == "linear" else mlp(2, "ln", 1, 16, 32)
    k = F.normalize(torch.randn(1, 1 if keys == "one" else T, 1, 16), dim=-1).expand(1, T, 1, 16)
    memory = memory._replace(**{n: None if x is None else x.float() for n, x in zip(("gain", "bias"), (memory.gain, memory.bias), strict=True)})
    memory = memory._replace(weights=tuple(w.float() for w in memory.weights))
    o, state = neural_memory(k, k, torch.randn(1, T, 1, 16), *constant(T, log_decay, eta, step), memory=memory, grad_point="chunk", clip=clip)
    bound = clip * step / (1 - eta)
    remembered = min(T, 1 / -torch.tensor(log_decay).expm1().item())
    assert o.isfinite().all()
    assert max(x.norm().item() for x in state.momentum) <= 1.01 * bound
    first = [w.norm().item() for w in memory.weights] or [0.0]
    assert all(x.norm().item() <= 1.01 * bound * remembered + y for x, y in zip(state.weights, first, strict=True))


def test_without_the_clip_one_repeated_key_diverges():
    k = F.normalize(torch.ones(1, 2048, 1, 16), dim=-1)
    v = torch.randn(1, 2048, 1, 16)
    o = [neural_memory(k, k, v, *constant(2048, -1e-5, 0.99, 0.002), grad_point="chunk", clip=clip)[0].abs().max() for clip in (None, 4.0)]
    assert o[0] > 1e4 and o[1] < 300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_decay", [0.0, -20.0, -700.0])
@pytest.mark.parametrize("log_momentum", [0.0, -20.0, -700.0])
def test_extreme_gates(kind, log_decay, log_momentum):
    memory, options = KINDS[kind]()
    q, k, v, la, le, step = inputs(21)
    xs = [x.requires_grad_() for x in (q, k, v, la * 0 + log_decay, le * 0 + log_momentum, 0.05 * step)]
    found = []
    for impl in IMPLS:
        o, state = neural_memory(*xs, memory=memory, impl=impl, **options)
        found.append([o, *state.weights, *torch.autograd.grad(o.square().sum() + state.weights[0].sum(), xs)])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_decay", [0.0, -35.0, "mixed"])
@pytest.mark.parametrize("log_momentum", [-0.1, -35.0, "mixed"])
def test_float32_keeps_its_relative_precision(log_decay, log_momentum):
    """Also of gate gradients that are e^-35 small: nothing is subtracted to get them."""
    q, k, v, la, le, step = inputs(130)
    la, le = (torch.where(torch.rand_like(x) < 0.5, -0.01, -35.0) if y == "mixed" else torch.full_like(x, y) for x, y in ((la, log_decay), (le, log_momentum)))
    found = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "torch")):
        xs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v, la, le, step)]
        o, state = neural_memory(*xs, impl=impl)
        found.append([o, *state.weights, *torch.autograd.grad(o.square().sum() + state.weights[0].sum(), xs)])
    for truth, single in zip(*found, strict=True):
        assert (single - truth).norm() <= 2e-6 * truth.norm()


# What it keeps, counts and refuses.


@pytest.mark.parametrize("momentum", [True, False])
def test_memory_saved_for_the_backward(momentum):
    """The inputs, and the memory (and its momentum) once per chunk; for the exact form an inverse per chunk. Nothing per token, nothing of [T, T]."""

    def saved(T: int, memory: Memory, **options: Any) -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        q, k, v, la, le, step = (x.requires_grad_() for x in inputs(T, 1, 1, 16, 16))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            neural_memory(q, k, v, la, le if momentum else None, step, memory=memory, **options)
        return total

    each, copies = 3 * 16 + 2 + momentum, 1 + momentum
    C = linear.grid(1024, 16, 16)[1]
    assert saved(1024, Memory()) == 1024 * (each + copies * 16 * 16 // C + C)
    assert saved(4096, Memory()) == 4 * saved(1024, Memory())
    P, chunk = 2 * 16 * 32, {"grad_point": "chunk", "chunk": 64}
    assert saved(1024, Memory((draw(1, 16, 32), draw(1, 32, 16))), **chunk) == 1024 * (each + copies * P // 64)


class Products(TorchDispatchMode):
    """Counts matrix products, those in place too, which torch's counter does not see."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].rstrip("_")
        if name in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name, options", [("linear", {}), ("dual", {"grad_point": "chunk"})])
@pytest.mark.parametrize("momentum", [True, False])
def test_flops_are_counted(name, options, momentum):
    """Inside the operators; without a graph the products are counted one by one, which must agree."""
    xs = [x.requires_grad_() for x in inputs(256, K=32, V=32)]
    if not momentum:
        xs[4] = None
    memory = Memory() if name == "linear" else Memory((draw(2, 32, 64), draw(2, 64, 32)))
    op = f"neural_memory_{name}"
    with kernels.flop_counter() as counter:
        neural_memory(*xs, memory=memory, **options)[0].sum().backward()
    count = {str(n).rsplit(".", 1)[-1]: x for n, x in counter.get_flop_counts()["Global"].items()}
    assert 2 <= count[f"{op}_backward"] / count[op] <= 4
    with Products() as products, torch.no_grad():
        neural_memory(*xs, memory=memory, **options)
    assert abs(products.flops / count[op] - 1) < 0.05


@pytest.mark.parametrize("kind", ["linear", "mlp", "everything"])
def test_opcheck(kind, monkeypatch):
    """Of the operator as the public function calls it, aligned and in the middle of a chunk."""
    memory, options = KINDS[kind]()
    module, calls = linear if kind == "linear" else dual, []
    monkeypatch.setattr(module, "operator", lambda *a, call=module.operator: (calls.append(a), call(*a))[1])
    xs = [x.requires_grad_() for x in inputs(21)]
    _, state = neural_memory(*xs, memory=memory, **options)
    neural_memory(*xs, state, memory=memory, lengths=torch.tensor([21, 9]), **options)
    monkeypatch.undo()
    for call in calls:
        leaf = [[y.detach().requires_grad_() for y in x] if isinstance(x, list) else x for x in call]
        torch.library.opcheck(module.operator, tuple(x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaf))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 21])
def test_pads_answer_zero_whatever_they_hold(impl, kind, T):
    """Even NaN: what stands there may never have been computed."""
    memory, options = KINDS[kind]()
    real = (torch.arange(T) < torch.tensor([0, T])[:, None])[..., None]
    xs = [torch.where(real[..., None] if x.ndim == 4 else real, x, torch.nan).requires_grad_() for x in inputs(T)]
    weights = tuple(w.clone().requires_grad_() for w in memory.weights)
    o, state = neural_memory(*xs, memory=memory._replace(weights=weights), lengths=torch.tensor([0, T]), impl=impl, **options)
    assert (o[0] == 0).all() and o.isfinite().all()
    assert all(x.isfinite().all() for x in leaves(state))
    loss = o.square().sum() + sum(x.square().sum() for x in state.weights)
    grads = torch.autograd.grad(loss, (*xs, *weights))
    assert all(g.isfinite().all() for g in grads) and all((g[0] == 0).all() for g in grads[: len(xs)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(impl, kind):
    """o in v's dtype, the state in float32 at least; autocast does not reach inside."""
    memory, options = KINDS[kind]()
    xs = inputs(21)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        o, state = neural_memory(*(x.to(dtype) for x in xs[:3]), *xs[3:], memory=memory, impl=impl, **options)
        assert o.dtype == dtype and {x.dtype for x in (*state.weights, *state.momentum, *state.point)} == {kept}
    low = [x.bfloat16().requires_grad_() for x in xs[:3]] + [x.float().requires_grad_() for x in xs[3:]]
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            o, state = neural_memory(*low, memory=memory, impl=impl, **options)
        found.append([o, *state.weights, *torch.autograd.grad(o.float().square().sum() + state.weights[0].sum(), low)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"q": draw(2, 4, 2, 3)}, {}, "same B, T, H"),
        ({"step": draw(2, 4)}, {}, "step is one number per token and head"),
        ({}, {"grad_point": "start"}, "grad_point is one of exact, chunk"),
        ({}, {"memory": Memory(post="layernorm")}, "post is one of none, res, rms, ln"),
        ({}, {"memory": Memory((draw(2, 3, 5),))}, r"weights\[0\] is \[H, 5, out\], or \[H, 6, out\] with a bias"),
        ({}, {"memory": Memory((draw(2, 5, 4),))}, "the last layer's answers are 4 wide, the values are 5"),
        ({}, {"memory": Memory(gain=draw(2, 5))}, "goes with post rms or ln"),
        ({}, {"memory": Memory(pull=draw(8))}, "one number for every place in a chunk"),
        ({}, {"window": 2}, "with grad_point='chunk' only"),
        ({}, {"clip": 1.0}, "solves a linear system"),
        ({}, {"clip": -1.0, "grad_point": "chunk"}, "clip is positive or None"),
        ({"state": State((draw(2, 2, 5, 4),), (draw(2, 2, 5, 5),), (), (), ())}, {}, r"the state of this memory has weights \[\(2, 2, 5, 5\)\]"),
        ({"lengths": torch.tensor([1])}, {}, "lengths counts the real tokens"),
    ],
)
def test_errors_teach(change, options, message):
    given = dict(zip(("q", "k", "v", "log_decay", "log_momentum", "step"), inputs(4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        neural_memory(**given, **options)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_second_derivatives_are_refused_aloud(kind):
    memory, options = KINDS[kind]()
    xs = [x.requires_grad_() for x in inputs(21)]
    (grad,) = torch.autograd.grad(neural_memory(*xs, memory=memory, **options)[0].square().sum(), xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.square().sum().backward()
