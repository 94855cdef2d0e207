"""The neural memory in C++: the sweep of every other implementation, and what is its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import test_kernels_ops as ops
from memarch.kernels import native
from memarch.kernels.neural_memory import Memory, neural_memory

pytestmark = pytest.mark.usefixtures("native_library")
poison = ops.poison


@pytest.fixture(autouse=True)
def compiler(native_library):
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())


def test_cpp_equals_reference(poison):
    """The sweep of every other implementation."""
    ops.test_equals_reference("neural_memory", "cpp")
    ops.test_reads_nothing_it_did_not_write("neural_memory", "cpp", None)
    ops.test_outputs_own_their_memory("neural_memory", "cpp")
    ops.test_inputs_are_left_alone("neural_memory", "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    ops.test_low_precision_by_the_2x_3x_rule("neural_memory", "cpp", dtype)


def wide(K: int, hidden: int, T: int, B: int = 1, H: int = 3) -> tuple[list[Tensor], Memory]:
    """Widths of several vectors and a rest; one bias."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    k = torch.nn.functional.normalize(draw(B, T, H, K), dim=-1)
    gates = [-0.1 * draw(B, T, H).abs(), -draw(B, T, H).abs(), 0.1 * draw(B, T, H).sigmoid()]
    weights = draw(H, K, hidden) / K**0.5, draw(H, hidden + 1, K) / hidden**0.5
    memory = Memory(weights, post="ln", gain=1 + 0.1 * draw(H, K), bias=0.1 * draw(H, K), decay_to="init")
    return [draw(B, T, H, K), k, draw(B, T, H, K), *gates], memory


@pytest.mark.parametrize("K, hidden", [(32, 64), (17, 35), (8, 9), (40, 3)])
@pytest.mark.parametrize("chunk", [16, 25])
def test_any_width(K, hidden, chunk):
    """Whole tiles of a product, and what is left beside and below them."""
    xs, memory = wide(K, hidden, 70)
    found = []
    for impl in ("torch", "cpp"):
        given = [x.clone().requires_grad_() for x in (*xs, *memory.weights)]
        o, state = neural_memory(*given[:6], memory=memory._replace(weights=tuple(given[6:])), grad_point="chunk", chunk=chunk, clip=2.0, impl=impl)
        loss = o.square().sum() + sum(w.square().sum() for w in (*state.weights, *state.momentum))
        found.append([o, *state.weights, *state.momentum, *torch.autograd.grad(loss, given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


GATED = {
    "all": (0.1, 1.0, {}),
    "as they are, no momentum": (0.1, None, {"decay_to": "zero"}),
    "strong": (5.0, 5.0, {}),  # products of e^-160, whose gradients are as small
    "none": (0.0, 0.0, {}),
    "window": (0.1, 1.0, {"window": 3}),
    "window, no momentum": (0.1, None, {"window": 30}),
    "pull": (0.1, 1.0, {"pull": True}),
    "pull, window, no momentum, to zero": (0.1, None, {"pull": True, "window": 3, "decay_to": "zero"}),
}


def gated(name: str, T: int, chunk: int, K: int, hidden: int) -> tuple[list[Tensor | None], Callable[..., list[Tensor]]]:
    """The gates and the pull, and a function of them to all that a call gives: from inside a chunk, with rows of unequal lengths."""
    decay, momentum, options = GATED[name]
    (xs, memory), window = wide(K, hidden, T, B=2, H=2), options.get("window", 1)
    gates = [10 * decay * xs[3], None if momentum is None else momentum * xs[4], xs[5], torch.rand(chunk, dtype=torch.float64) if "pull" in options else None]

    def call(impl: str, log_decay: Tensor, log_momentum: Tensor | None, step: Tensor, pull: Tensor | None) -> list[Tensor]:
        some, state, outs = memory._replace(pull=pull, decay_to=options.get("decay_to", "init")), None, []
        tokens = [*xs[:3], log_decay, log_momentum, step]
        for part, lengths in ((slice(0, T // 3), None), (slice(T // 3, T), torch.tensor([T - T // 3, T // 2]))):
            given = [x if x is None else x[:, part] for x in tokens]
            o, state = neural_memory(*given, state, memory=some, grad_point="chunk", chunk=chunk, window=window, lengths=lengths, impl=impl)
            outs.append(o)
        return [*outs, *state.weights, *state.momentum, *state.point]

    return gates, call


@pytest.mark.parametrize("name", GATED)
def test_gates_equal_those_of_torch(name):
    gates, call = gated(name, 70, 25, 8, 9)
    found = []
    for impl in ("torch", "cpp"):
        given = [x if x is None else x.clone().requires_grad_() for x in gates]
        outs = call(impl, *given)
        sources = [x for x in given if x is not None]
        found.append([*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), sources)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GATED)
def test_gates_gradcheck(name):
    gates, call = gated(name, 9, 4, 3, 2)
    given = [x if x is None else x.clone().requires_grad_() for x in gates]
    assert torch.autograd.gradcheck(lambda *xs: tuple(call("cpp", *xs)), given)


def test_small_gradients_of_gates_keep_their_digits():
    """Through gates of e^-3 the first tokens of a chunk are all but forgotten; what is left of their gradients is right by itself, not next to the others'."""
    xs, memory = wide(4, 5, 32, H=1)
    found = []
    for impl in ("torch", "cpp"):
        decay = torch.full_like(xs[3], -3.0).requires_grad_()
        o, _ = neural_memory(*xs[:3], decay, None, xs[5], memory=memory._replace(decay_to="zero"), grad_point="chunk", chunk=32, impl=impl)
        found.append(torch.autograd.grad(o[:, -1].square().sum(), decay)[0])
    assert 0 < found[0].abs().min() < 1e-30
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_activation_in_float32(activation):
    """At every size of its argument: a memory of one hidden number, never written to, answers phi(w k)."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -1e-4, 0.0, 1e-4, 1e4])])[None, :, None, None]
    one, off = torch.ones(1, 1, 1), torch.zeros(1, x.shape[1], 1)
    o, _ = neural_memory(x, x, x, off, None, off, memory=Memory((one, one), activation=activation), grad_point="chunk", impl="cpp")
    phi = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    torch.testing.assert_close(o.double(), phi(x.double()), rtol=2e-6, atol=5e-7)


def test_threads_do_not_matter():
    xs, memory = wide(32, 64, 70, B=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(neural_memory(*xs, memory=memory, grad_point="chunk", chunk=16, impl="cpp")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_one_token_without_gradients():
    """As decoding does it."""
    for T in (1, 65):  # of 65 the states, where the next token completes a chunk, or does not
        for case in ops.CASES["neural_memory"](T):
            given = ops.prepare(case.inputs, grad=False)
            found = []
            for impl in ("reference", "cpp"):
                inputs = dict(given)
                if T > 1:
                    inputs["state"] = neural_memory(**given, impl="reference")[1]
                    inputs |= {n: x[:, :1] for n, x in given.items() if n in ops.STATEFUL["neural_memory"] and x is not None}
                    inputs["lengths"] = None if given["lengths"] is None else torch.tensor([0, 1, 1])
                found.append(ops.flat(neural_memory(**inputs, impl=impl)))
            for a, b in zip(*found, strict=True):
                ops.close(b, a, 1e-10, case.name)
