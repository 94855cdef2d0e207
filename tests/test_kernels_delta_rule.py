"""The delta rule where one knows the answer, at its extremes, and in mixed precision. The sweep against `reference` is in test_kernels_ops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.chunks import GROUP
from memarch.kernels.delta_rule import delta_rule
from memarch.kernels.delta_rule.torch_impl import grid, invert

IMPLS = ["reference", "torch"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(T: int, B: int = 2, H: int = 2, K: int = 6, V: int = 5) -> list[Tensor]:
    return [draw(B, T, H, K), F.normalize(draw(B, T, H, K), dim=-1), draw(B, T, H, V), draw(B, T, H).sigmoid(), -F.softplus(draw(B, T, H))]


def orthonormal(T: int, K: int) -> Tensor:
    return torch.linalg.qr(draw(K, K))[0][:T].view(1, T, 1, K)


@pytest.mark.parametrize("impl", IMPLS)
def test_orthonormal_keys_are_read_back_exactly(impl):
    k, v, one = orthonormal(40, 48), draw(1, 40, 1, 7), torch.ones(1, 40, 1, dtype=torch.float64)
    o, state = delta_rule(k, k, v, one, None, impl=impl)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(torch.einsum("bthk,bhkv->bthv", k, state), v)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_repeated_key_overwrites_or_adds(impl):
    k, v = orthonormal(1, 8).expand(1, 50, 1, 8), draw(1, 50, 1, 3)
    one = torch.ones(1, 50, 1, dtype=torch.float64)
    torch.testing.assert_close(delta_rule(k, k, v, one, None, impl=impl)[0], v)
    torch.testing.assert_close(delta_rule(k, k, v, None, None, impl=impl)[0], v.cumsum(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_erasing_it_is_masked_attention_without_softmax(impl):
    q, k, v, _, g = inputs(70)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    torch.testing.assert_close(delta_rule(q, k, v, None, None, impl=impl)[0], torch.einsum("bhts,bshv->bthv", scores, v))
    G = g.cumsum(1).movedim(1, 2)
    scores = scores * (G[..., :, None] - G[..., None, :]).tril().exp()
    torch.testing.assert_close(delta_rule(q, k, v, None, g, impl=impl)[0], torch.einsum("bhts,bshv->bthv", scores, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_constant_gate_is_retention(impl):
    q, k, v, _, _ = inputs(70)
    gamma = 1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)
    far = (torch.arange(70)[:, None] - torch.arange(70)).double()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (gamma[:, None, None] ** far).tril()
    o, _ = delta_rule(q, k, v, None, gamma.log().expand(2, 70, 2), impl=impl)
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_beta_zero_only_decays(impl):
    q, k, v, beta, g = inputs(70)
    start = draw(2, 2, 6, 5)
    _, state = delta_rule(q, k, v, beta * 0, g, start, impl=impl)
    torch.testing.assert_close(state, start * g.sum(1).exp()[..., None, None])


@pytest.mark.parametrize("beta", [True, False])
def test_gate_zero_is_no_gate(beta):
    q, k, v, b, g = inputs(70)
    given = delta_rule(q, k, v, b if beta else None, g * 0)
    for a, c in zip(given, delta_rule(q, k, v, b if beta else None, None), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70])
def test_pads_answer_zero_whatever_they_hold(impl, T):
    """Even NaN: what stands there may never have been computed."""
    real = (torch.arange(T) < torch.tensor([0, T])[:, None])[..., None]
    xs = [torch.where(real[..., None] if x.ndim == 4 else real, x, torch.nan).requires_grad_() for x in inputs(T)]
    o, state = delta_rule(*xs, draw(2, 2, 6, 5), lengths=torch.tensor([0, T]), impl=impl)
    assert (o[0] == 0).all() and o.isfinite().all() and state.isfinite().all()
    for x in torch.autograd.grad(o.sum() + state.sum(), xs):
        assert (x[0] == 0).all() and x.isfinite().all()


def test_no_future():
    q, k, v, beta, g = inputs(100)
    before = delta_rule(q, k, v, beta, g)[0]
    for x in (q, k, v, beta, g):
        changed = [y.clone() if y is x else y for y in (q, k, v, beta, g)]
        next(y for y, z in zip(changed, (q, k, v, beta, g), strict=True) if z is x)[:, 50] *= 0.5
        after = delta_rule(*changed)[0]
        torch.testing.assert_close(after[:, :50], before[:, :50], rtol=0, atol=1e-13)
        assert not torch.allclose(after[:, 50:], before[:, 50:])


@pytest.mark.parametrize("decay", [0.0, -35.0, -700.0, "mixed"])
@pytest.mark.parametrize("erase", [True, False])
def test_extreme_decay(decay, erase):
    """Nothing overflows, and in float32 the gradient of the gate keeps its relative precision although it is e^decay small."""
    q, k, v, beta, g = inputs(130)
    g = torch.where(torch.rand_like(g) < 0.5, 0.0, -35.0).double() if decay == "mixed" else torch.full_like(g, decay)
    found = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float64, "torch"), (torch.float32, "torch")):
        xs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v, beta, g)]
        o, state = delta_rule(*xs[:3], xs[3] if erase else None, xs[4], impl=impl)
        used = [x for x, use in zip(xs, (1, 1, 1, erase, 1), strict=True) if use]
        found.append([o, state, *torch.autograd.grad(o.square().sum() + state.sum(), used)])
    for truth, exact, single in zip(*found, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(exact, truth, rtol=1e-10, atol=1e-10)
        assert (single - truth).norm() <= 1e-5 * truth.norm() + 1e-30


def test_many_groups_of_chunks():
    """Rows, heads and chunks enough for several groups, the last one not full."""
    T, B, H = 300, 3, 4
    N, C = grid(T, 6, 5)
    assert B * H * C < GROUP < B * H * C * N
    q, k, v, beta, g = (x.requires_grad_() for x in inputs(T, B, H))
    found = []
    for impl in IMPLS:
        o, state = delta_rule(q, k, v, beta, g, impl=impl)
        found.append([o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), (q, k, v, beta, g))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_wide_heads_take_longer_chunks():
    assert grid(256, 64, 64) == (8, 32) and grid(256, 128, 128) == (4, 64) and grid(33, 64, 64) == (2, 17)
    q, k, v, beta, g = (x.requires_grad_() for x in inputs(130, 1, 1, 128, 128))
    found = []
    for impl in IMPLS:
        o, state = delta_rule(q, k, v, beta, g, impl=impl)
        found.append([o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), (q, k, v, beta, g))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 33, 48, 64])
def test_invert(C):
    L = 0.2 * draw(3, C, C)  # what is on and above the diagonal must not matter
    torch.testing.assert_close(invert(L), torch.linalg.inv(torch.eye(C, dtype=L.dtype) + L.tril(-1)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70])
def test_dtypes(impl, T):
    """o in v's dtype, the state in float32 at least; gates may be wider than q, k, v."""
    q, k, v, beta, g = inputs(T)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        o, state = delta_rule(q.to(dtype), k.to(dtype), v.to(dtype), beta, g, impl=impl)
        assert (o.dtype, state.dtype) == (dtype, kept)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)] + [x.float().requires_grad_() for x in (beta, g)]
    o, state = delta_rule(*low, torch.zeros(2, 2, 6, 5).bfloat16().requires_grad_(), impl=impl)
    for x, y in zip(low, torch.autograd.grad(o.float().sum() + state.sum(), low), strict=True):
        assert x.dtype == y.dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70])
def test_autocast_does_not_reach_inside(impl, T):
    xs = [x.float().requires_grad_() for x in (*inputs(T), draw(2, 2, 6, 5))]
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            o, state = delta_rule(*xs, impl=impl)
        found.append([o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), xs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_memory_saved_for_the_backward_is_linear():
    """Inputs, a memory for every chunk, a [C, C] inverse for every chunk: nothing of size [T, T], nothing twice."""

    def saved(T: int) -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        xs = [x.requires_grad_() for x in inputs(T, 1, 1, 16, 16)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            delta_rule(*xs)
        return total

    C = grid(1024, 16, 16)[1]
    assert saved(1024) == 1024 * (3 * 16 + 2 + 16 * 16 // C + C)
    assert saved(4096) == 4 * saved(1024)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, b, g: (q[..., :3], k, v, b, g), "same B, T, H"),
        (lambda q, k, v, b, g: (q, k, v[:, :2], b, g), "same B, T, H"),
        (lambda q, k, v, b, g: (q[:, :0], k[:, :0], v[:, :0], None, None), "at least one token"),
        (lambda q, k, v, b, g: (q, k, v, b[..., None], g), "beta is one number per token and head"),
        (lambda q, k, v, b, g: (q, k, v, b, k), "g is one number per token and head"),
        (lambda q, k, v, b, g: (q, k, v, b, g, torch.zeros(2, 2, 5, 6)), "keys first"),
    ],
)
def test_errors_teach(change, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(*change(*inputs(4)))


def test_second_derivatives_are_refused_aloud():
    xs = [x.requires_grad_() for x in inputs(70)]
    (grad,) = torch.autograd.grad(delta_rule(*xs)[0].square().sum(), xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.square().sum().backward()
