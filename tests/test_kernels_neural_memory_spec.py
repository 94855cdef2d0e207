"""What follows from the neural memory's recurrence, and is not the recurrence: what a state must hold, what is left, what is forgotten, what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memarch import kernels
from memarch.kernels.neural_memory import Memory, neural_memory
from test_kernels_neural_memory import IMPLS, KINDS, answer, inputs, leaves, mlp

CHUNK = 8
IN_CHUNKS = {
    "linear": lambda: (Memory(), {"grad_point": "chunk", "chunk": CHUNK}),
    "mlp": KINDS["mlp"],
    "everything": KINDS["everything"],
}
in_chunks = pytest.mark.parametrize("kind", IN_CHUNKS)
impls = pytest.mark.parametrize("impl", IMPLS)


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def parts(xs: list[Tensor], at: int) -> tuple[list[Tensor], list[Tensor]]:
    return [x[:, :at] for x in xs], [x[:, at:] for x in xs]


# The state.


@impls
@in_chunks
@pytest.mark.parametrize("cut", range(1, 20))
def test_a_state_without_its_place_is_one_at_a_chunks_start(kind, impl, cut):
    """There it says as much, and goes on as exactly. Anywhere else the place matters: what follows is another answer."""
    memory, options = IN_CHUNKS[kind]()
    xs = inputs(21)
    truth, final = neural_memory(*xs, memory=memory, **options)
    first, rest = parts(xs, cut)
    _, state = neural_memory(*first, memory=memory, **options)
    o, last = neural_memory(*rest, state._replace(point=(), place=()), memory=memory, impl=impl, **options)
    if cut % CHUNK == 0:
        same((o, last), (truth[:, cut:], final))
    else:
        assert (o - truth[:, cut:]).abs().max() > 1e-4


@in_chunks
def test_a_state_without_its_place_costs_no_chunk_more(kind):
    memory, options = IN_CHUNKS[kind]()
    xs = inputs(2 * CHUNK)
    _, state = neural_memory(*xs, memory=memory, **options)
    flops = []
    for given in (None, state, state._replace(point=(), place=())):
        with kernels.flop_counter() as counter, torch.enable_grad():
            neural_memory(*(x.clone().requires_grad_() for x in xs), given, memory=memory, **options)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[2] < flops[1]


@impls
@in_chunks
def test_gradients_reach_a_state_without_its_place(kind, impl):
    """They are those of the weights, which it stands for."""
    memory, options = IN_CHUNKS[kind]()
    xs = inputs(CHUNK)
    _, state = neural_memory(*xs, memory=memory, **options)
    found = []
    for left_out in (False, True):
        w = tuple(x.clone().requires_grad_() for x in state.weights)
        s = tuple(x.clone().requires_grad_() for x in state.momentum)
        given = state._replace(weights=w, momentum=s, **({"point": (), "place": ()} if left_out else {"point": w}))
        o, new = neural_memory(*xs, given, memory=memory, impl=impl, **options)
        loss = o.square().sum() + sum(x.square().sum() for x in leaves(new) if x.requires_grad)
        found.append(torch.autograd.grad(loss, (*w, *s)))
    same(*found)


@impls
@pytest.mark.parametrize("kind", KINDS)
def test_the_final_state_has_gradients(kind, impl):
    """Of every token's key, value and gates, down to the first; of no query."""
    memory, options = KINDS[kind]()
    q, *others = xs = [x.requires_grad_() for x in inputs(21)]
    _, state = neural_memory(*xs, memory=memory, impl=impl, **options)
    loss = sum(w.square().sum() for w in state.weights)
    grads = torch.autograd.grad(loss, others, retain_graph=True)
    none = torch.autograd.grad(loss, q, allow_unused=True, materialize_grads=True)[0]
    assert (none == 0).all()
    for name, g in zip(("k", "v", "log_decay", "log_momentum", "step"), grads, strict=True):
        reached = g.norm(dim=-1) if g.ndim == 4 else g.abs()  # [B, T, H]
        first = 1 if name.startswith("log") else 0  # before the first token there may be nothing to keep
        assert (reached[:, first:] > 0).all(), name


# What is left.


@impls
@pytest.mark.parametrize("decay_to", ["zero", "init"])
@pytest.mark.parametrize("options", [{}, {"grad_point": "chunk", "chunk": CHUNK}], ids=["exact", "chunk"])
def test_what_is_not_written_to_decays(options, decay_to, impl):
    q, k, v, la, le, step = inputs(21)
    memory = mlp(2, decay_to=decay_to)
    _, state = neural_memory(q, k, v, la, le, 0 * step, memory=memory, impl=impl, **options)
    left = la.sum(1).exp()[..., None, None] if decay_to == "zero" else 1.0  # [B, H, 1, 1]
    for w, w0 in zip(state.weights, memory.weights, strict=True):
        torch.testing.assert_close(w, (left * w0).expand_as(w), rtol=1e-10, atol=1e-12)
    assert all((s == 0).all() for s in state.momentum)


@impls
@pytest.mark.parametrize("more", [1, 4, 6, 20])
def test_one_write_in_an_mlp_fades_in_and_out_as_the_gates_say(more, impl):
    """Token 10 writes -step grad, taken at the memory of its chunk's start, a^8 W_0; n tokens later (a^{n+1} - eta^{n+1}) / (a - eta) of it is there."""
    at, a, eta = 10, 0.9, 0.7
    T = at + more
    (q, k, v, *_), memory = inputs(T, B=1, H=1), mlp(2, "ln", H=1)
    one = torch.ones(1, T, 1, dtype=torch.float64)
    step = 0 * one
    step[0, at] = 0.3
    _, state = neural_memory(
        q, k, v, (one * a).log(), (one * eta).log(), step, memory=memory, grad_point="chunk", chunk=CHUNK, impl=impl
    )  # fmt: skip
    point = [(a**CHUNK * w[0]).requires_grad_() for w in memory.weights]
    head = memory._replace(gain=memory.gain[0], bias=memory.bias[0])
    grads = torch.autograd.grad((answer(head, point, k[0, at, 0]) - v[0, at, 0]).square().sum() / 2, point)
    share = (a**more - eta**more) / (a - eta)
    for w, w0, g in zip(state.weights, memory.weights, grads, strict=True):
        torch.testing.assert_close(w[0, 0], a**T * w0[0] - 0.3 * share * g, rtol=1e-10, atol=1e-10)


def shut(xs: list[Tensor], at: int) -> list[Tensor]:
    """Token `at` forgets everything, and writes nothing."""
    xs = [x.clone() for x in xs]
    xs[3][:, at], xs[4][:, at], xs[5][:, at] = -800, -800, 0
    return xs


@impls
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_closed_gates_forget_a_chunk_when_it_is_over(kind, impl):
    """Memory and momentum are zero at once. But the rest of the chunk mends the errors of the memory it began with, so what was before comes back
    that way, unless the chunk ends here."""
    memory, options = IN_CHUNKS[kind]()
    xs = inputs(32)
    other = [x.clone() for x in xs]
    other[2][:, :CHUNK] += 1  # values of the first chunk: what later chunks know of it is in the memory
    for at, forgotten in ((2 * CHUNK - 1, True), (2 * CHUNK - 4, False)):
        _, state = neural_memory(*(x[:, : at + 1] for x in shut(xs, at)), memory=memory, impl=impl, **options)
        assert all((x == 0).all() for x in (*state.weights, *state.momentum))
        a, b = (neural_memory(*shut(x, at), memory=memory, impl=impl, **options)[0][:, at + 1 :] for x in (xs, other))
        if forgotten:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        else:
            assert ((a - b).abs().amax((0, 2, 3)) > 1e-6).all()


# What it costs.


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: pair for at, pair in self.alive.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_peak_memory_grows_with_the_tokens(kind):
    """By q, k, v and o as they are laid out for chunks, and a few numbers: no weights per token, nothing of [T, T]. Of the forward without a graph."""
    K, chunk = 16, 64
    memory = Memory() if kind == "linear" else Memory((torch.randn(1, K, 4 * K), torch.randn(1, 4 * K, K)))
    options: dict[str, Any] = {} if kind == "linear" else {"grad_point": "chunk", "chunk": chunk}

    def most(T: int) -> int:
        xs = [x.float() for x in inputs(T, 1, 1, K, K)]
        with torch.no_grad(), Peak() as peak:
            neural_memory(*xs, memory=memory, impl="torch", **options)
        return peak.most

    slope = (most(16384) - most(8192)) / 8192  # bytes a token, beyond what one group of chunks needs
    assert slope < 5 * 4 * K
